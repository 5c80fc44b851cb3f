"""The schedule grammar: text such as `constant:13` or `keep:0.7@3,6,9` → tokens to remove in each block."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tokbench.errors import UserError, nearest

GRAMMAR = {
    "constant": ("constant:13", "remove 13 tokens at every block (13 alone means the same)"),
    "linear": ("linear:13,-1", "13 per block on average; -1 falls from 26 to 0 over the depth, 1 rises, 0 is constant"),
    "list": ("list:8,8,0,4", "remove that many at block 0, 1, 2, …; none after the end of the list"),
    "keep": ("keep:0.7@3,6,9", "keep 70 % of the patch tokens at blocks 3, 6 and 9 (blocks count from 0)"),
    "ratio": ("ratio:0.9", "keep 90 % of the patch tokens at every block"),
    "diffrate": ("diffrate:2.9", "DiffRate's own list at 2.9 GFLOPs, for the DeiT or MAE that it was searched for"),
    "flops": ("flops:0.5", "scale the method's own schedule until its FLOPs are nearest half the unreduced model's"),
    "searched": ("searched:flops:0.35", "what `tokbench search` finds for that budget; or searched:speedup:1.5"),
}
# Budgets of a search: an example, and what it means.
BUDGETS = {
    "flops": ("flops:0.35", "a share of the unreduced model's FLOPs, above 0 and below 1"),
    "speedup": ("speedup:1.5", "a speed-up above 1 over the unreduced model on this device"),
}

# What a schedule that was looked up says of itself.
SEARCHED = ", rates searched on ImageNet-1k"


class ScheduleError(UserError):
    """A schedule that does not parse; the message quotes it and names the wrong part."""


@dataclass(frozen=True)
class Schedule:
    """A parsed schedule. `str()` gives its canonical text, which parses to the same schedule.

    found: how many tokens go from each block, of a named schedule that was looked up for a model.
    """

    kind: str
    values: tuple[float, ...]
    blocks: tuple[int, ...] = ()
    found: tuple[int, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        values = (int(value) if value == int(value) else value for value in self.values)
        text = f"{self.kind}:{','.join(map(repr, values))}{SEARCHED if self.found else ''}"
        return f"{text}@{','.join(map(str, self.blocks))}" if self.blocks else text

    def removals(self, block: int, depth: int, patches: int) -> int:
        """Tokens to remove in `block` (from 0) of `depth` blocks, given `patches` patch tokens at its input.

        The formulas are those of docs/methods.md, computed in Python floats; their rounding is part of the definition.
        """
        first = self.values[0]
        match self.kind:
            case "constant":
                return int(first)
            case "linear":
                low = int(first * (1 - self.values[1]))
                high = 2 * first - low
                step = (high - low) / (depth - 1) if depth > 1 else 0.0
                return int(low + block * step)
            case "list":
                return int(self.values[block]) if block < len(self.values) else 0
            case "keep":
                return patches - math.ceil(first * patches) if block in self.blocks else 0
            case "ratio":
                return math.floor(patches - patches * first)
            case "diffrate" if self.found:
                return self.found[block]
        raise ScheduleError(f"schedule '{self}' must be resolved for a model first; use tokbench.apply")

    @property
    def budget(self) -> str:
        """What a searched schedule may spend, as in `flops:0.35`; "" for any other."""
        return str(self).removeprefix("searched:") if self.kind.startswith("searched:") else ""


def parse_schedule(text: str | int | Schedule) -> Schedule:
    """Parse a schedule. Raises ScheduleError, which names the wrong part."""
    if isinstance(text, Schedule):
        return text
    text = str(text).strip()
    kind, colon, rest = text.partition(":")
    if not colon:
        kind, rest = "constant", text
        if not _is_number(text):
            example = GRAMMAR[text][0] if text in GRAMMAR else "constant:13"
            hint = nearest(text, GRAMMAR) if text not in GRAMMAR else ""
            if all(map(_is_count, text.split(","))):
                hint = f" Several schedules are several flags: --schedule {' --schedule '.join(text.split(','))}."
            raise ScheduleError(f"schedule '{text}': expected KIND:VALUES, such as '{example}'.{hint}")
    if kind not in GRAMMAR:
        raise ScheduleError(
            f"schedule '{text}': unknown kind '{kind}'; the kinds are {', '.join(GRAMMAR)}.{nearest(kind, GRAMMAR)}"
        )
    return _parsed(kind, text, rest)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _is_count(text: str) -> bool:
    # No model has a billion tokens, and Python refuses to read thousands of digits.
    return text.strip().isdecimal() and len(text.strip()) < 10


def _wrong(text: str, part: str, why: str) -> ScheduleError:
    kind = text.partition(":")[0]
    example = GRAMMAR[kind if kind in GRAMMAR else "constant"][0]
    return ScheduleError(f"schedule '{text}': {why}, got '{part}'; an example is '{example}'")


def _count(text: str, part: str) -> int:
    if not _is_count(part):
        kind = "" if ":" in text else ", or a share as in flops:0.5"
        raise _wrong(text, part, f"expected a whole number of tokens, 0 or more{kind}")
    return int(part)


def _fraction(text: str, part: str, name: str) -> float:
    if not _is_number(part) or not 0 < float(part) <= 1:
        raise _wrong(text, part, f"expected {name} above 0 and at most 1")
    return float(part)


def _parsed(kind: str, text: str, rest: str) -> Schedule:
    match kind:
        case "list":
            return Schedule(kind, tuple(_count(text, part) for part in rest.split(",")))
        case "linear":
            count, comma, slope = rest.partition(",")
            if not comma:
                raise _wrong(text, rest, "expected a token count and a slope, separated by a comma")
            if not _is_number(slope) or not -1 <= float(slope) <= 1:
                raise _wrong(text, slope, "expected a slope from -1 (falling) to 1 (rising)")
            return Schedule(kind, (_count(text, count), float(slope)))
        case "keep":
            return _parsed_keep(text, rest)
        case "ratio":
            return Schedule(kind, (_fraction(text, rest, "the share of tokens to keep"),))
        case "diffrate":
            budget = rest.removesuffix(SEARCHED)
            if not _is_number(budget) or not float(budget) > 0:
                raise _wrong(text, rest, "expected the GFLOPs that the rates were searched for")
            return Schedule(kind, (float(budget),))
        case "flops":
            return Schedule(kind, (_fraction(text, rest, "a share of the unreduced model's FLOPs"),))
        case "searched":
            return _parsed_search(text, rest)
    return Schedule(kind, (_count(text, rest),))


def _parsed_keep(text: str, rest: str) -> Schedule:
    rate, at, blocks = rest.partition("@")
    keep = _fraction(text, rate, "a keep rate")
    if not at:
        raise _wrong(text, rest, "expected '@' and the blocks it acts in after the keep rate")
    for part in blocks.split(","):
        if not _is_count(part):
            raise _wrong(text, part, "expected block numbers, counted from 0")
    numbers = tuple(int(part) for part in blocks.split(","))
    if len(set(numbers)) < len(numbers):
        raise _wrong(text, blocks, "expected each block once")
    return Schedule("keep", (keep,), tuple(sorted(numbers)))


def _parsed_search(text: str, rest: str) -> Schedule:
    kind, _, value = rest.partition(":")
    if kind not in BUDGETS:
        raise _wrong(text, rest, f"expected a budget, {' or '.join(example for example, _ in BUDGETS.values())}")
    number = float(value) if _is_number(value) else 0.0
    if not (0 < number < 1 if kind == "flops" else number > 1):
        raise _wrong(text, value, f"expected {BUDGETS[kind][1]}")
    return Schedule(f"searched:{kind}", (number,))
