"""Figures become files: which kinds there are, and the same figure always gives the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tokbench.errors import UserError, nearest
from tokbench.results.folder import replace_file

FORMATS = ("png", "svg", "pdf")
# Text stays text in PDF, and ids in SVG do not change from one drawing to the next.
RC: dict[Any, Any] = {"pdf.fonttype": 42, "svg.hashsalt": "tokbench"}
_NO_DATE: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def require_format(out: Path) -> None:
    """Raise UserError unless the suffix of `out` names a kind of file that figures can be written to."""
    suffix = out.suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        hint = nearest(suffix, FORMATS)
        raise UserError(f"cannot draw to {out}: the suffix must be one of {', '.join(FORMATS)}.{hint}")


def save(figure: Figure, out: Path, dpi: int) -> None:
    """Write a figure, folders included, as a whole. Raises UserError where the file cannot be written."""
    kind = out.suffix.lstrip(".").lower()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, lambda file: figure.savefig(file, format=kind, dpi=dpi, metadata=_NO_DATE.get(kind, {})))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}.") from error
