"""What methods there are, without importing torch: read from their source and, where loaded, from the registry."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FUSION = Path(__file__).parent / "fusion"
# The methods that tokbench adds for any other to beat.
CONTROLS = frozenset({"topk", "random", "free"})
# What a class's source names, in words.
_NEEDS = {
    "view.mean_keys": "keys",
    "view.keys": "keys",
    "view.values": "values",
    "view.class_attention": "class attention",
    "view.class_rows": "class attention",
    "view.attention": "attention",
    "view.plain_attention": "attention",
    "view.token_map": "token map",
    "view.begun": "first tokens",
    "counts_by_image": "images for FLOPs and speed",
    "AUTO": "images for auto",
}


@dataclass(frozen=True)
class Entry:
    """A method: its name, its paper, and its parameters with their defaults.

    needs: what it looks at in a model beside the tokens, such as "keys".
    """

    name: str
    paper: str
    parameters: dict[str, Any]
    needs: tuple[str, ...] = ()


def catalogue() -> list[Entry]:
    """Every method in the order of registration.

    Built-in ones are read from the source, where a class under `@register_method` gives name, paper and defaults as
    literals. Once the registry is loaded, as it is by plugins, it is asked instead.
    """
    core = sys.modules.get("tokbench.fusion.core")
    if core is not None and "tokbench.fusion.tome" in sys.modules:
        return [
            Entry(name, method.paper, core.make_method(name).parameters(), _needs_of(method))
            for name, method in core.METHODS.items()
        ]
    return built_in()


def built_in() -> list[Entry]:
    """The methods of tokbench itself, read from the source of the modules that tokbench.fusion imports."""
    imports = ast.parse((_FUSION / "__init__.py").read_text(encoding="utf-8")).body
    modules = [alias.name for node in imports if isinstance(node, ast.ImportFrom) for alias in node.names]
    return [entry for module in modules for entry in _read(_FUSION / f"{module}.py")]


def _read(path: Path) -> list[Entry]:
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return [_entry(node) for node in classes if "register_method" in map(ast.unparse, node.decorator_list)]


def _entry(node: ast.ClassDef) -> Entry:
    said: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for line in node.body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            if line.targets[0].id in ("name", "paper"):
                said[line.targets[0].id] = ast.literal_eval(line.value)
        elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value is not None:
            parameters[line.target.id] = ast.literal_eval(line.value)
    return Entry(said["name"], said["paper"], parameters, _needs(node))


def _needs(node: ast.AST) -> tuple[str, ...]:
    """What a method's source asks a `view` for, and whether tokens depend on the image."""
    used = {ast.unparse(part) for part in ast.walk(node) if isinstance(part, (ast.Attribute, ast.Name))}
    return tuple(dict.fromkeys(words for name, words in _NEEDS.items() if name in used))


def _needs_of(method: type) -> tuple[str, ...]:
    try:
        return _needs(ast.parse(textwrap.dedent(inspect.getsource(method))))
    except (OSError, TypeError):  # written where there is no file
        return ()
