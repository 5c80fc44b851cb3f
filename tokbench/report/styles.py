"""Names, colors and markers of methods, and the colors of everything else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from tokbench.errors import require_known


@dataclass(frozen=True)
class Style:
    """A method's name in papers, a color of Okabe and Ito's or Tol's, a matplotlib marker and its relative size."""

    name: str
    color: str
    marker: str | tuple[int, int, int]
    size: float = 1.0


STYLES: dict[str, Style] = {
    "none": Style("unreduced", "#000000", "*", 1.9),
    "tome": Style("ToMe", "#0072B2", "o"),
    "tofu": Style("ToFu", "#56B4E9", "s", 0.92),
    "mctf": Style("MCTF", "#D55E00", "^", 1.1),
    "mstm": Style("MSTM", "#F0E442", "D", 0.88),
    "evit": Style("EViT", "#009E73", "v", 1.1),
    "pitome": Style("PiToMe", "#CC79A7", "h", 1.15),
    "diffrate": Style("DiffRate", "#332288", "p", 1.1),
    "ppt": Style("PPT", "#882255", "<", 1.1),
    "vidtldr": Style("vid-TLDR", "#117733", ">", 1.1),
    "atc": Style("ATC", "#661100", "8", 1.05),
    "cgsm": Style("CGSM", "#CC6677", (4, 1, 0), 1.35),
    "gtp": Style("GTP", "#44AA99", (5, 1, 0), 1.35),
    "dpcknn": Style("DPC-KNN", "#999933", (3, 1, 0), 1.35),
    "kmedoids": Style("K-Medoids", "#AA4499", (6, 1, 0), 1.3),
    "ats": Style("ATS", "#805A3B", (8, 1, 0), 1.3),
    "dct": Style("DCT", "#4A6FA5", "H", 1.15),
    "topk": Style("top-k", "#E69F00", "P", 1.15),
    "random": Style("random", "#999999", "X", 1.1),
    "free": Style("free (speed limit)", "#7A5195", "d", 1.1),
}
# For plugins' methods: chosen by the method's name, so they are the same in every figure.
_SPARE_COLORS = ("#6A3D9A", "#8C510A", "#01665E", "#B2182B", "#4D4D4D", "#1B7837")
_SPARE_MARKERS = ("p", "<", ">", "8")


def method_style(method: str) -> Style:
    """The method's style, the same in every figure; a plugin's is chosen by its name."""
    if method in STYLES:
        return STYLES[method]
    number = int.from_bytes(hashlib.sha256(method.encode()).digest()[:4], "big")
    marker, color = divmod(number % (len(_SPARE_COLORS) * len(_SPARE_MARKERS)), len(_SPARE_COLORS))
    return Style(method, _SPARE_COLORS[color], _SPARE_MARKERS[marker])


def method_order(methods: Iterable[str]) -> list[str]:
    """Ours as they are listed here, then others by name."""
    return [*STYLES, *sorted(set(methods))]


@dataclass(frozen=True)
class Theme:
    """Colors of everything but methods, and the ink that methods' colors are shaded towards for lines and text."""

    ink: str
    muted: str
    axis: str
    grid: str
    background: str

    @property
    def is_dark(self) -> bool:
        return sum(_parts(self.background)) < 1.5 * 255

    def shade(self, color: str, share: float) -> str:
        """A color moved towards the ink, so that thin lines and small text stand out from the background."""
        return blend(color, "#FFFFFF" if self.is_dark else "#000000", share)

    def method(self, style: Style) -> str:
        """The color of a method's markers: its own, or the ink where that would not be seen."""
        return self.ink if style.color == "#000000" else style.color


THEMES = {
    "light": Theme("#222222", "#666666", "#888888", "#E8E8E8", "#FFFFFF"),
    "dark": Theme("#EDEDED", "#A8A8A8", "#777777", "#33373D", "#16191D"),
}


def find_theme(name: str) -> Theme:
    """The theme of that name. Raises UserError with the names there are."""
    require_known(name, THEMES, "theme")
    return THEMES[name]


def blend(color: str, other: str, share: float) -> str:
    """`color` with `share` of `other` mixed in; `#RRGGBB` all."""
    mixed = (a + share * (b - a) for a, b in zip(_parts(color), _parts(other), strict=True))
    return "#" + "".join(f"{round(part):02X}" for part in mixed)


def _parts(color: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(color[1:]))
