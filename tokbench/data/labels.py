"""Which of the model's classes each class of the data is."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from torch import nn

from tokbench.errors import UserError, printable

_logger = logging.getLogger(__name__)


def model_labels(classes: Sequence[str], model: nn.Module, what: str) -> list[int]:
    """For each class of the data, in its own order, the model's index of it (−1 for a model without classes).

    By wnid for ImageNet models, by name where the model knows its classes' names, else in order.
    """
    count = class_count(model)
    if count == 0:
        _logger.warning("the model has no classifier, so the images of %s go without labels", what)
        return [-1] * len(classes)
    for known, written in _known_classes(model):
        index = {name: i for i, name in enumerate(known)}
        names = [written(name) for name in classes]
        if len(index) == len(known) and len(set(names)) == len(names) and any(name in index for name in names):
            unknown = [name for name, key in zip(classes, names, strict=True) if key not in index]
            if unknown:
                raise UserError(f"{what} has classes the model does not know ({some(unknown)}), among some it does.")
            return [index[name] for name in names]
    if len(classes) > count:
        raise UserError(f"{what} has {len(classes)} classes ({some(classes)}), the model only {count}.")
    if len(classes) < count:
        _logger.warning(
            "%s has %d classes, the model %d: they are taken for the model's first, in order", what, len(classes), count
        )
    return list(range(len(classes)))


def _known_classes(model: nn.Module) -> Iterator[tuple[list[str], Callable[[str], str]]]:
    """What the model's classes are called, in its order, and how a name of the data is to be written to compare."""
    subset = infer_imagenet_subset(model)
    if subset is not None:
        yield ImageNetInfo(subset).label_names(), str
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("label_names"):
        yield [_plain(name) for name in cfg["label_names"]], _plain


def class_count(model: nn.Module) -> int:
    count: Any = model.num_classes
    return int(count)


def _plain(name: str) -> str:
    """A class name as it survives as a folder name: "T-shirt/top" and "t_shirt_top" are the same."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(map(printable, names[:shown])) + (", …" if len(names) > shown else "")
