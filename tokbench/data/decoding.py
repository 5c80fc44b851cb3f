"""One image file: decoded as a person would see it, or refused with the reason. Never a crash, never a guess."""

from __future__ import annotations

import stat
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin

from tokbench.errors import UserError, shortened

# Models scale the shorter side to their input size: what is a line to the eye would fill the memory.
LONGEST_TO_SHORTEST = 200
# What decoding one image may take of a reader's memory at most: 89 million pixels in colour, or a larger JPEG reduced.
LARGEST_BYTES = 2**30
# Bytes a pixel at the worst moment: the decoded image, the same in RGB, and that turned; with an alpha channel or 16
# bits there are more steps between. Decoders that hold a copy of their own add to it.
_GREY, _COLOUR, _IN_STEPS = 3, 12, 20
_OWN_COPY = {"JPEG2000": 16, "WEBP": 8, "AVIF": 8}
_PROGRESSIVE = 6  # a JPEG's coefficients, which its decoder holds at full size
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


def unreadable(name: str, reason: str) -> ImageError:
    """What to raise where there is no image to decode, or no label to it."""
    return ImageError(f"image {name!r} cannot be read: {reason}", name, reason)


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
    agreed range, would take more than `LARGEST_BYTES` (a JPEG is decoded at 1/2, 1/4 or 1/8 of its size first) or has
    over 179 million pixels (Pillow's bound), or is over `LONGEST_TO_SHORTEST` times as long as it is wide.
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
                _fit(image)
                image.load()
                turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
                flat = _flatten(image)
                return flat if turn is None else flat.transpose(turn)
    except Exception as error:  # of damaged files, Pillow's decoders raise whatever they stumble over
        reason = shortened(error)
        raise ImageError(f"image {name!r} cannot be decoded: {reason}", name, reason) from error


@cache
def _formats() -> list[str]:
    """Of our formats, those this Pillow knows: it raises KeyError for others."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _fit(image: ImageFile.ImageFile) -> None:
    """Have a JPEG that is too large decoded at a smaller size. Raises ValueError for what stays too large."""
    in_steps = image.has_transparency_data or image.mode.startswith("I")
    each = _IN_STEPS if in_steps else _GREY if image.mode in ("1", "L") else _COLOUR
    pixels, held = image.width * image.height, _OWN_COPY.get(image.format or "", 0)
    if image.info.get("progressive"):
        held = _PROGRESSIVE
    scales = (1, 2, 4, 8) if isinstance(image, JpegImagePlugin.JpegImageFile) else (1,)
    scale = next((scale for scale in scales if pixels * (held + each / scale**2) <= LARGEST_BYTES), None)
    if scale is None:
        raise ValueError(
            f"{image.width} × {image.height} pixels would take {pixels * (held + each) / 2**30:.1f} GiB to decode, "
            f"more than {LARGEST_BYTES / 2**30:g}"
        )
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))


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
