"""Drawing and saving figures, independent of the user's matplotlib settings.

Import this before anything else of matplotlib.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# matplotlib cannot be imported if MPLBACKEND names a backend that is not installed, as in a notebook's shell.
_backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402
from matplotlib import style  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from tokbench.errors import UserError, nearest  # noqa: E402
from tokbench.report.styles import Theme  # noqa: E402
from tokbench.results.folder import write_out  # noqa: E402

if _backend is not None:
    os.environ["MPLBACKEND"] = _backend
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = _backend

FORMATS = ("png", "svg", "pdf")
# No math between two $, text stays text in PDF, and ids in SVG are the same in every drawing.
_SETTINGS: dict[str, Any] = {"text.parse_math": False, "pdf.fonttype": 42, "svg.hashsalt": "tokbench"}
_NO_DATE: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
_MOST_PIXELS = 30_000  # of a side; matplotlib can do 65,536, in 500 MB


@contextmanager
def drawing(theme: Theme, settings: dict[str, Any]) -> Iterator[None]:
    """Draw figures with these colors and settings, and matplotlib's defaults for the rest."""
    colors = {
        **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), theme.background),
        **dict.fromkeys(("text.color", "axes.labelcolor"), theme.ink),
        **dict.fromkeys(("xtick.color", "ytick.color", "hatch.color"), theme.muted),
        "axes.edgecolor": theme.axis,
        "grid.color": theme.grid,
    }
    with style.context(["default", {**colors, **_SETTINGS, **settings}]):
        yield


def require_format(out: Path) -> None:
    """Raise UserError unless figures can be written to files with the suffix of `out`."""
    suffix = out.suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        hint = nearest(suffix, FORMATS)
        raise UserError(f"cannot draw to {out}: the suffix must be one of {', '.join(FORMATS)}.{hint}")


def save(figure: Figure, out: Path, dpi: int) -> None:
    """Write a figure atomically and make its folders. Raises UserError if that fails."""
    kind = out.suffix.lstrip(".").lower()
    dpi = min(dpi, int(_MOST_PIXELS / max(figure.get_size_inches())))
    write_out(out, lambda file: figure.savefig(file, format=kind, dpi=dpi, metadata=_NO_DATE.get(kind, {})))
