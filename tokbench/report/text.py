"""How names, numbers and intervals are written, everywhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from tokbench.errors import printable
from tokbench.report.styles import method_style
from tokbench.results.cell import Cell, Figure
from tokbench.results.metrics import METRICS


def number(value: float, digits: int) -> str:
    """A number as printed: −0.1, and 0.0 instead of −0.0."""
    text = f"{value:,.{digits}f}"
    return (text.removeprefix("-") if float(text.replace(",", "")) == 0 else text).replace("-", "−")


def interval(figure: Figure, digits: int) -> str:
    """`[−1.3, 1.1]`, "" if no interval is known."""
    return f"[{', '.join(number(end, digits) for end in figure.interval)}]" if figure.interval else ""


def figure_text(cell: Cell, metric: str, *, bounds: bool = False, unit: str = "") -> str:
    """A cell's figure with as many digits as its images allow, "" if it was not measured.

    bounds: with its interval, if known. unit: between the two.
    """
    figure, digits = cell[metric], METRICS[metric].digits_for(cell.images)
    if figure is None:
        return ""
    ends = interval(figure, digits) if bounds else ""
    return f"{number(figure.value, digits)}{unit}{' ' if ends else ''}{ends}"


def side_of(figure: Figure | None, low: float = 0, high: float | None = None) -> int | None:
    """-1 if the figure's interval lies below `low`, 1 if above `high` (default: `low`), else 0: not significant.

    None if there is no interval.
    """
    if figure is None or figure.interval is None:
        return None
    first, last = figure.interval
    return -1 if last < low else int(first > (low if high is None else high))


def variant_name(method: str, variant: str) -> str:
    """The method as papers call it, and the parameters it was given: `tome:a=1` → "ToMe:a=1"."""
    return method_style(method).name + variant.removeprefix(method)


def short_schedule(schedule: str) -> str:
    """A short and unambiguous name of a schedule: `constant:13` is "r=13", `keep:0.7@3,6,9`
    "keep 0.7@3,6,9", `flops:0.5` "50 % FLOPs", `list:8,8,8,0` "list 3×8 0".
    """
    if schedule.startswith("searched:"):
        return f"{short_schedule(schedule.removeprefix('searched:'))} (searched)"
    kind, _, rest = schedule.rpartition(":")
    if kind in ("", "constant"):
        return f"r={rest}" if rest else ""
    if kind == "flops":
        return f"{100 * float(rest):.10g} % FLOPs"
    if kind == "speedup":
        return f"{float(rest):.10g}× speed"
    if kind == "list":
        counts = [(value, len(list(same))) for value, same in groupby(rest.split(","))]
        return "list " + " ".join(f"{n}×{value}" if n > 1 else value for value, n in counts)
    return f"{kind} {rest}"


def cell_name(cell: Cell, several_runs: bool = False) -> str:
    """A cell's name: "ToMe at r=13", with its run if there are several."""
    name = variant_name(cell.method, cell.variant)
    if cell.schedule and not cell.is_baseline:
        name += f" at {short_schedule(cell.schedule)}"
    return f"{name} in {cell.run}" if several_runs else name


def told_caveats(cells: Sequence[Cell]) -> list[str]:
    """The warnings given while these cells were measured, such as "accuracy: labels were guessed", each with the number
    of cells if it is not all that have the figures."""
    told = []
    for kind in dict.fromkeys(kind for cell in cells for kind in cell.caveats):
        measured = sum(kind in cell.kinds for cell in cells)
        for text, touched in Counter(text for cell in cells for text in {*cell.caveats.get(kind, ())}).items():
            part = "" if touched == measured else f" ({touched} of {measured} cells)"
            told.append(f"{kind} is in doubt: {text}{part}")
    return told


def passed_over(
    best: Cell, cells: Iterable[Cell], enough: float | None = None, name: Callable[[Cell], str] = cell_name
) -> str:
    """Which cells may be faster than `enough` (None: than the best), and why they are passed over; "" if none may."""

    def unknown(cell: Cell) -> tuple[int, bool]:
        speedup = cell["speedup"]
        return len(cell.doubts), not (speedup and (speedup.low or 0) > 1)

    enough = (best.value("speedup") or 0) if enough is None else enough
    passed = [
        f"{name(cell)} ({figure_text(cell, 'speedup', bounds=True, unit='×')})"
        for cell in cells
        if (speedup := cell["speedup"])
        and max(speedup.value, speedup.high or 0) > enough
        and unknown(cell) > unknown(best)
    ]
    return f"passed over, as their speed is known less well: {listed(passed, 4)}" if passed else ""


def shared(cells: Iterable[Cell], name: str, form: str = "{}") -> str:
    """The attribute `name` of all cells that have it, in this form; "" if they differ."""
    values = {getattr(cell, name) for cell in cells} - {None}
    return form.format(*values) if len(values) == 1 else ""


def group_title(group: Sequence[Cell]) -> str:
    """Model and conditions of comparable cells in one line."""
    first = group[0]
    images = max(cell.images or 0 for cell in group)
    batch = max(cell.batch_size or 0 for cell in group)
    seen = f"{images:,} {plural(images, 'image')} of {first.data}" if images else ""
    parts = [first.model, seen, hardware(first), first.dtype, first.ran, f"batch {batch}" if batch else ""]
    return ", ".join(filter(None, parts))


def hardware(cell: Cell) -> str:
    """The hardware a cell was measured on, "" if not known."""
    return cell.machine or cell.device or ""


def for_markdown(text: str) -> str:
    """Escaped for Markdown tables, markup and HTML; an underscore between letters needs no escape."""
    return re.sub(r"[\\`*|<>&\[\]~#$!]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text))


def for_sheet(value: Any) -> Any:
    """Text escaped so that no spreadsheet takes it for a formula; other values unchanged."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


# Where a line may end, best first: words, parameters, their values, parts of names.
_BREAKS = (r"(?<=\s)", r"(?<=[:,;])", r"(?<=[=/@])", r"(?<=[_-])", r"(?<=\.)")


def broken(text: str, width: int) -> str:
    """A text in lines of at most `width` characters; longer words stay whole."""
    lines = [""]
    for piece in _pieces(text, width):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines)


def _pieces(text: str, width: int, level: int = 0) -> list[str]:
    if len(text.rstrip()) <= width or level == len(_BREAKS):
        return [text]
    return [piece for part in re.split(_BREAKS[level], text) for piece in _pieces(part, width, level + 1)]


def plural(count: int, word: str, several: str = "") -> str:
    return word if count == 1 else several or f"{word}s"


def listed(words: Iterable[str], most: int = 24) -> str:
    """`a, b and c`; the first `most`, and how many more there are."""
    words = list(words)
    *rest, last = words if len(words) <= most else [*words[:most], f"{len(words) - most:,} more"]
    return f"{', '.join(rest)} and {last}" if rest else last


def capital(text: str) -> str:
    """With a capital first letter, the rest as it is."""
    return text[:1].upper() + text[1:]
