"""Python code that rebuilds a measured cell: model, method and schedule."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from contextlib import suppress
from itertools import pairwise
from keyword import iskeyword
from pathlib import Path
from typing import Any

from tokbench.errors import UserError, printable
from tokbench.report.styles import STYLES
from tokbench.results.cell import Cell
from tokbench.results.folder import RunFolder
from tokbench.results.records import Manifest

_CAST = {None: "", "fp32": "", "bf16": ".bfloat16()", "fp16": ".half()"}


def python_of(cell: Cell, folder: RunFolder) -> tuple[str, list[str]]:
    """Lines of Python that rebuild a cell of this run, and notes on them.

    Values from the run are inserted as literals only. Raises UserError for an unknown dtype.
    """
    if cell.dtype not in _CAST:
        raise UserError(f"the run {folder.path} was made in {cell.dtype!r}, which this tokbench does not know")
    lines = ["import tokbench"]
    notes: list[str] = []
    if cell.method not in STYLES:
        paths, notes = _plugins(folder.manifest, cell.method)
        if paths:
            lines += ["from tokbench.plugins import load_plugins", f"load_plugins([{', '.join(map(_literal, paths))}])"]
    words, named = loaded(cell, folder.manifest)
    device = f".to({_literal(cell.device)})" if cell.device not in (None, "cpu") else ""
    lines.append(f"model = tokbench.load_model({_arguments(*words, **named)}){device}{_CAST[cell.dtype]}")
    if not cell.is_baseline:
        schedule, params = applied(cell)
        lines.append(f"tokbench.apply(model, {_arguments(cell.method, schedule, **params)})")
    if cell.runtime == "compile" and cell["speedup"]:
        lines.append("model.compile(dynamic=False, fullgraph=True)")
        notes.append("speed is that of the compiled model, for one batch size")
    elif cell.runtime not in (None, "eager") and cell["speedup"]:
        notes.append(f"speed is that of {cell.runtime}: export it, and run the file there")
    return "\n".join(lines), notes


def applied(cell: Cell) -> tuple[str, dict[str, Any]]:
    """The schedule and the parameters that a cell was measured with."""
    # Calibrated values are included, so that no calibration images are needed.
    calibrated = {name: value for name, value in (cell.calibrated or {}).items() if name in cell.params}
    return cell.resolved or cell.schedule, {**dict(sorted(cell.params.items())), **calibrated}


def loaded(cell: Cell, manifest: Manifest) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments of `tokbench.load_model` for a cell's model."""
    specs = [spec for session in manifest.sessions for spec in session.grid.models if spec.get("label") == cell.model]
    spec = next((spec for spec in reversed(specs) if spec.get("name")), {"name": cell.model})
    words = [spec[key] for key in ("name", "checkpoint") if spec.get(key)]
    return words, {key: spec[key] for key in ("input_size", "random_weights") if spec.get(key)}


def export_of(cell: Cell, folder: RunFolder) -> list[str]:
    """The command that writes a cell of this run to a file, and lines that run that file with ONNX Runtime."""
    paths = [] if cell.method in STYLES else _plugins(folder.manifest, cell.method)[0]
    plugins = [word for path in paths for word in ("--plugin", path)]
    command = ["tokbench", "export", str(folder.path), "--cell", cell.id, *plugins, "--out", "model.onnx"]
    return [
        shlex.join(map(printable, command)),
        "import onnxruntime",
        'output = onnxruntime.InferenceSession("model.onnx").run(None, {"images": images})[0]',
    ]


def _arguments(*values: Any, **named: Any) -> str:
    """The arguments of a call as code, also for names that are not identifiers."""
    plain = {name for name in named if name.isascii() and name.isidentifier() and not iskeyword(name)}
    words = [_literal(value) for value in values]
    words += [f"{name}={_literal(value)}" for name, value in named.items() if name in plain]
    odd = [f"{_literal(name)}: {_literal(value)}" for name, value in named.items() if name not in plain]
    return ", ".join([*words, f"**{{{', '.join(odd)}}}"] if odd else words)


def _literal(value: Any) -> str:
    """A JSON value as Python, in double quotes if possible."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    text = repr(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and "'" not in value and '"' not in value else text


def _plugins(manifest: Manifest, method: str) -> tuple[list[str], list[str]]:
    """A run's plugin files as the command line named them, and notes on what may be wrong with them now."""
    if not manifest.plugins:
        return [], [f"{method} is no method of tokbench, and the run loaded no plugin: register it before these lines"]
    named: dict[str, str] = {}
    for session in manifest.sessions:
        with suppress(ValueError):  # a command that was written by hand
            words = shlex.split(session.command or "")
            parts = [part for word in words for part in re.split(r"(?<=^--plugin)=", word, maxsplit=1)]
            after = (word for option, word in pairwise(parts) if option == "--plugin")
            named |= {Path(path).name: path for path in after}
    paths, notes = [], []
    for name, digest in manifest.plugins.items():
        path = named.get(name, name)
        paths.append(path)
        if not Path(path).is_file():
            notes.append(f"the plugin {path!r} is not found from this folder: say where it is")
        elif hashlib.sha256(Path(path).read_bytes()).hexdigest() != digest:
            notes.append(f"the plugin {path!r} is no longer the file that the run loaded")
    return paths, notes
