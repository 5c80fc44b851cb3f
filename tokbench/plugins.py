"""Plugins: Python files, given with --plugin, that register methods."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import tokbench.fusion  # noqa: F401  (registers the methods that a plugin may not replace)
from tokbench.errors import UserError, require_file, shortened
from tokbench.fusion.core import METHODS

LOADED: dict[str, str] = {}
"""Plugins loaded in this process: file name → SHA-256 (hex) of its content, for the manifest of a run."""

_PATHS: dict[str, str] = {}


def loaded_paths() -> list[str]:
    """The files that were loaded, for another process to load them too."""
    return [_PATHS.get(name, name) for name in LOADED]


def load_plugins(paths: Iterable[str | Path]) -> list[str]:
    """Run each file and return the names of the methods they registered.

    Raises UserError for a file that does not exist, fails, or registers no method.
    """
    return [name for path in paths for name in _load(Path(path))]


def _load(path: Path) -> list[str]:
    require_file(path, "plugin", "give the Python file in it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"plugin '{str(path)[:100]}' cannot be read: {error.strerror}") from error
    at = str(path.resolve())
    name = f"tokbench_plugin_{path.stem}_{hashlib.sha256(os.fsencode(at)).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin '{path}' is not a Python file; its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    folder = os.getcwd()
    try:
        spec.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: a plugin must not make a command look successful
        del sys.modules[name]
        where, kind = _line_of(error, path), type(error).__name__
        raise UserError(f"plugin '{path}'{where}: {kind}: {shortened(error)}") from error
    finally:
        os.chdir(folder)  # what the command line names is in the folder that it was typed in
    registered = [method for method, kind in METHODS.items() if kind.__module__ == name]
    if not registered:
        raise UserError(f"plugin '{path}' registers no method; put @tokbench.register_method above its class")
    # By its name, so that a run may go on where the file has moved; by its path where two have one name.
    _PATHS.setdefault(path.name, at)
    LOADED[path.name if _PATHS[path.name] == at else at] = hashlib.sha256(content).hexdigest()
    return registered


def _line_of(error: BaseException, path: Path) -> str:
    """The line of the plugin that failed, as ", line 12"; "" if none of its lines is in the traceback."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""
