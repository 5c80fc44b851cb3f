"""The kinds of file a model is exported to: how each is written, and opened again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from tokbench.errors import UserError, nearest
from tokbench.exporting.runtimes import INPUT, OUTPUT, Run, open_onnxruntime, open_pt2


@dataclass(frozen=True)
class Format:
    """What a kind of file needs: Python packages, and the extra of tokbench that installs them.

    write(program, path) writes an exported program; open(path) gives what maps images (B, C, H, W) to outputs (B, D).
    """

    packages: tuple[str, ...]
    extra: str
    write: Callable[[torch.export.ExportedProgram, Path], None]
    open: Callable[[Path], Run]

    def require_packages(self, name: str) -> None:
        """Raise UserError, with the pip line, for a package that is missing."""
        missing = [package for package in self.packages if find_spec(package) is None]
        if missing:
            raise UserError(f"format {name!r} needs {' and '.join(missing)}: pip install 'tokbench[{self.extra}]'")


def find_format(path: Path, name: str | None = None) -> str:
    """The format of that name, by default the one that the file's name ends in. Raises UserError for no such one."""
    known = [f".{known}" for known in FORMATS]
    if name is not None and name not in FORMATS:
        raise UserError(f"there is no format {name!r}; there are {' and '.join(FORMATS)}.{nearest(name, FORMATS)}")
    if path.suffix not in known:
        raise UserError(f"{str(path)!r} must end in {f'.{name}' if name else ' or '.join(known)}")
    if name is not None and path.suffix != f".{name}":
        raise UserError(f"--format {name} and {str(path)!r} contradict each other: one of them is enough")
    return path.suffix[1:]


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    from tokbench.exporting.onnx import translations

    written = torch.onnx.export(
        program, dynamo=True, input_names=[INPUT], output_names=[OUTPUT], custom_translation_table=translations(),
        verbose=False,
    )  # fmt: skip
    assert written is not None
    written.save(path)


FORMATS = {
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), "onnx", _write_onnx, open_onnxruntime),
    "pt2": Format((), "", torch.export.save, open_pt2),
}
