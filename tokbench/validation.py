"""Values from outside, checked by pydantic and told in one line."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from tokbench.errors import UserError, nearest

FORBID = ConfigDict(extra="forbid")

T = TypeVar("T")


def told(kind: type[T]) -> type[T]:
    """Class decorator for pydantic's dataclasses: made of wrong values they raise UserError."""
    make = kind.__init__

    def __init__(self: T, *values: Any, **named: Any) -> None:
        try:
            make(self, *values, **named)
        except ValidationError as error:
            raise UserError(first_fault(error, kind)) from error

    kind.__init__ = __init__  # type: ignore[assignment,method-assign]
    return kind


def validated(kind: type[T], plain: Any) -> T:
    """Plain values as that kind. Raises UserError where they cannot be."""
    try:
        return TypeAdapter(kind).validate_python(plain)
    except ValidationError as error:
        raise UserError(first_fault(error, kind)) from error


_KINDS = {
    "string_type": "text", "float_type": "a number", "float_parsing": "a number", "int_type": "a whole number",
    "int_from_float": "a whole number", "finite_number": "a number", "list_type": "a list", "tuple_type": "a list",
    "dict_type": "a table", "model_type": "a table", "dataclass_type": "a table", "bool_type": "true or false",
    "path_type": "text", "too_short": "a list of one or more",
}  # fmt: skip
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def first_fault(error: ValidationError, kind: Any = None) -> str:
    """The first thing that is wrong with what was to become of that kind: where, what it must be, and what it is."""
    fault = error.errors(include_url=False)[0]
    context, where = fault.get("ctx", {}), list(fault["loc"])
    if where and isinstance(where[0], int) and is_dataclass(kind):  # given by its place
        where[0] = fields(kind)[where[0]].name
    name = _path(where)
    match fault["type"]:
        case "missing":
            return f"{name!r} is missing"
        case "value_error":
            return f"{name}: {context['error']}" if name else str(context["error"])
        case "extra_forbidden" | "unexpected_keyword_argument":
            *places, word = where
            known = _fields(kind, places)
            there = f"; there are {', '.join(known)}.{nearest(str(word), known)}" if known else ""
            return f"{_path(places) or getattr(kind, '__name__', 'it')} has no field {word!r}{there}"
        case "literal_error":
            words = context["expected"]
            close = nearest(str(fault["input"]), words.replace(" or ", ", ").replace("'", "").split(", "))
            return f"{name}: unknown word {fault['input']!r}; use {words}.{close}"
    bounds = [f"{word} {context[key]:g}" for key, word in _BOUNDS.items() if key in context]
    wanted = _KINDS.get(fault["type"]) or " ".join(bounds) or fault["msg"]
    return f"{name!r} must be {wanted}, not {shown(fault['input'])}"


def _fields(kind: Any, places: Sequence[int | str]) -> list[str]:
    """The names that a dataclass has, or the one at these places inside it."""
    for place in places:
        if isinstance(place, str) and is_dataclass(kind):
            inside = _parts(get_type_hints(kind)[place])
            kind = next((part for part in inside if is_dataclass(part)), None)
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []


def _parts(hint: Any) -> list[Any]:
    return [hint, *(part for own in get_args(hint) for part in _parts(own))]


def _path(places: Sequence[int | str]) -> str:
    """`models[0].name`, without the kinds of which a union tried each."""
    words = [f"[{place}]" if isinstance(place, int) else f".{place}" for place in places if "-" not in str(place)]
    return "".join(words).lstrip(".")


def shown(value: Any) -> str:
    """A value in an error message."""
    return textwrap.shorten(ascii(value), 60)
