"""One image file: decoded as a person would see it, or refused with the reason. Never a crash, never a guess."""

from __future__ import annotations

import stat
import textwrap
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

from tokbench.errors import UserError

# Models scale the shorter side to their input size: what is a line to the eye would fill the memory.
LONGEST_TO_SHORTEST = 200
# Raster formats that Pillow decodes itself: no Ghostscript (EPS), no PDF, nothing that fetches or starts anything else.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "MPO", "JPEG2000", "AVIF", "DIB", "TGA", "ICO", "PCX")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """An image that cannot be decoded, named in one line, also when a DataLoader worker met it.

    name: of the image; reason: why not. Both are "" when the exception comes from a worker.
    """

    def __init__(self, message: str, name: str = "", reason: str = ""):
        # A worker's exception is made anew from the text of its traceback, which ends with the message.
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])
        self.name, self.reason = name, reason


@dataclass(frozen=True)
class Skipped:
    """An image that no model saw: its place in the source, its name, and why."""

    index: int
    name: str
    reason: str


def decode(file: Path | BinaryIO, name: str) -> Image.Image:
    """The image in a file, in mode L or RGB: turned as its EXIF says, 16 bits brought to 8, transparency on white, an
    animation's first frame.

    Raises ImageError, naming the image, for what is no image or no regular file, is damaged, has pixels without an
    agreed range, would fill the memory (Pillow's bound, 179 million pixels), or is over `LONGEST_TO_SHORTEST` times as
    long as it is wide.
    """
    try:
        # Pillow warns of what is decided here: large images, transparent palettes, damaged EXIF.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):  # a pipe would wait for ever
                raise ValueError("it is no regular file")
            with Image.open(file, formats=_formats()) as image:
                if max(image.size) > LONGEST_TO_SHORTEST * min(image.size):
                    raise ValueError(f"{image.width} × {image.height} pixels are too long and narrow to scale")
                image.load()
                turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
                flat = _flatten(image)
                return flat if turn is None else flat.transpose(turn)
    except Exception as error:  # of damaged files, Pillow's decoders raise whatever they stumble over
        reason = textwrap.shorten(str(error), 200, placeholder=" …") or type(error).__name__
        raise ImageError(f"image {name!r} cannot be decoded: {reason}", name, reason) from error


@cache
def _formats() -> list[str]:
    """Of our formats, those this Pillow knows: it raises KeyError for others."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its pixels are 32-bit integers, of which nobody tells the range")
        return Image.fromarray((pixels / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody tells the range")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image.copy() if image.mode in ("L", "RGB") else image.convert("RGB")
