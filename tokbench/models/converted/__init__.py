"""Models of other libraries as timm's classes, so that every method works in them.

Nothing of those libraries is imported: their configuration files and weights are read, and their names mapped.
"""

from __future__ import annotations

from pathlib import Path

from tokbench.models.converted import hugging_face, open_clip, torchvision
from tokbench.models.converted.common import MISUNDERSTOOD, Conversion, cannot_understand

_LIBRARIES = {"hf:": hugging_face.convert, "openclip:": open_clip.convert, "tv:": torchvision.convert}
PREFIXES = tuple(_LIBRARIES)

# What can be converted, for the table in the docs: (library, how it is named, its classes or models).
CONVERTED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Hugging Face transformers", "hf:OWNER/NAME, hf:FOLDER", tuple(hugging_face.ARCHITECTURES)),
    ("OpenCLIP", "openclip:OWNER/NAME, openclip:FOLDER", open_clip.TOWERS),
    ("torchvision", "tv:NAME with --checkpoint", tuple(torchvision.ARCHITECTURES)),
)


def convert(name: str, checkpoint: Path | None, *, with_weights: bool) -> Conversion:
    """What `name`, which begins with one of PREFIXES, means in timm's terms.

    Without a checkpoint, the weights beside the configuration are read, unless `with_weights` is False. Raises
    UserError for what cannot be had, or cannot be converted.
    """
    prefix = name[: name.index(":") + 1]
    try:
        return _LIBRARIES[prefix](name, name.removeprefix(prefix), checkpoint, with_weights)
    except MISUNDERSTOOD as error:
        raise cannot_understand(name, error) from error
