"""Which of the model's classes each class of the data is: by name, by number, in order, or refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.utils.misc import natural_key
from torch import nn

from tokbench.errors import UserError, printable

_WNID = re.compile(r"n\d{8}")
_PLACEHOLDER = re.compile(r"(label|class)[\W_]*\d+", re.IGNORECASE)  # what transformers writes for want of a name


@dataclass(frozen=True)
class DataWarning:
    """Why a figure that was read off these images may not mean what it seems to. For records and for people.

    code: "labels_guessed": only order, or numbers, told which class is which. "unmapped_classes": classes the model
    does not have. "unlabelled": images that the list of labels does not name. "no_labels", "no_classes": no image has
    a label, because the data have none or the model has no classes. "subset_of_logits": answers are chosen among the
    data's classes only.
    text: one sentence, with the counts.
    """

    code: str
    text: str


@dataclass(frozen=True)
class ModelNames:
    """What a model's classes are called, in plain spelling.

    index: class by name, and by wnid where the classes are ImageNet's. words: class by ImageNet's English words, which
    are common words, so they count only where all classes of the data have one. told: the model's configuration names
    its classes; else they are taken for ImageNet's because of their number. shown: for messages.
    """

    index: dict[str, int]
    words: dict[str, int]
    told: bool
    shown: Sequence[str]

    def __contains__(self, name: str) -> bool:
        return plain(name) in self.index

    def number(self, name: str) -> int:
        """The class of that name. Raises ValueError for no class of the model's."""
        if name not in self:
            raise ValueError(f"its class {name!r} is none of the model's ({some(self.shown)})")
        return self.index[plain(name)]


def model_names(model: nn.Module) -> ModelNames:
    """The names of a model's classes, as far as it knows them; without any, an empty index."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    names = [str(name) for name in cfg.get("label_names") or ()]
    if len(names) == class_count(model) > 0 and not all(_PLACEHOLDER.fullmatch(name) for name in names):
        wnids = _as_wnids(names) or []
        return ModelNames(_index(names) | _index(wnids), {}, True, names)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return ModelNames({}, {}, False, ())
    wnids, words = _imagenet(subset)
    return ModelNames(_index(wnids), _index(words), False, wnids)


@dataclass(frozen=True)
class Labelling:
    """From the labels of the data to the model's classes.

    classes: the data's, in its own order; None where its labels are the model's numbers already. numbers: the model's
    class of each, −1 for none. outputs: of the model. warnings: what is to be said of all this, and recorded.
    among: the model's classes, ascending, that answers are chosen from; None for all.
    """

    classes: list[str] | None
    numbers: list[int]
    names: ModelNames
    outputs: int
    warnings: tuple[DataWarning, ...] = ()
    among: list[int] | None = None

    @property
    def num_classes(self) -> int:
        """How many classes the data has: the model's, where the data does not tell."""
        return self.outputs if self.classes is None else len(self.classes)

    def __call__(self, label: int | str | None) -> int:
        """The model's class, −1 for none; the data's own for a model without a classifier.

        Raises ValueError for a label that is no class of the model's.
        """
        if label is None or self.outputs == 1:
            return -1
        if isinstance(label, str) and not label.lstrip("-").isdecimal():
            return self.names.number(label) if self.outputs else -1
        number = int(label)
        if not self.outputs:
            return max(number, -1)
        if number >= self.num_classes:
            raise ValueError(f"its label is {number}, and there are {self.num_classes} classes")
        return -1 if number < 0 else number if self.classes is None else self.numbers[number]

    def name(self, label: int) -> str:
        """What the data calls a class of its own; "" for none."""
        return self.classes[label] if self.classes is not None and label >= 0 else ""

    def warned(self, *warnings: DataWarning) -> Labelling:
        return replace(self, warnings=(*self.warnings, *warnings))


def without_labels(model: nn.Module, *warnings: DataWarning) -> Labelling:
    """Of images that have no labels, or the model's own numbers."""
    return Labelling(None, [], model_names(model), class_count(model), warnings)


def label_numbers(model: nn.Module, what: str) -> Labelling:
    """Of images labelled by the model's class numbers, as far as anyone can tell, or by its classes' names."""
    labelling = without_labels(model)
    return labelling if labelling.outputs > 1 else labelling.warned(_no_classes(labelling.outputs, what))


def label_classes(classes: list[str], model: nn.Module, what: str) -> Labelling:
    """Of images labelled by these classes.

    By name where the model knows its classes' names; else by number where the names are numbers; else in order.
    `what` names the data. Raises UserError where that cannot be right.
    """
    names, count = model_names(model), class_count(model)
    if count < 2:
        return Labelling(classes, [-1] * len(classes), names, count, (_no_classes(count, what),))
    numbers, warnings = _match(classes, names, count, what)
    labelling = Labelling(classes, numbers, names, count, tuple(warnings))
    subset = _published_subset(_as_wnids(classes) or ())
    if subset and count > len(classes) and -1 not in numbers:
        text = f"{what} has {subset}'s classes: answers are chosen among these {len(classes)} only, as its authors do"
        labelling = replace(labelling.warned(DataWarning("subset_of_logits", text)), among=sorted(numbers))
    return labelling


def _match(classes: list[str], names: ModelNames, count: int, what: str) -> tuple[list[int], list[DataWarning]]:
    best = max(_matches(classes, names), key=lambda labels: sum(label >= 0 for label in labels), default=[])
    if any(label >= 0 for label in best):
        return best, _unmapped(classes, best, what)
    if (labels := _by_number(classes, count)) is not None:
        if names.index and not names.told or labels == list(range(count)):
            return labels, []
        first, number = min(zip(labels, classes, strict=True))
        text = f"the classes of {what} are numbers, taken for the model's class numbers: {number} is class {first}"
        return labels, [DataWarning("labels_guessed", text)]
    if names.told or (names.index and len(classes) != count):
        raise UserError(
            f"{what}: none of its {len(classes)} classes ({some(classes, 10)}) is one of the model's {count} "
            f"({some(names.shown, 10)}): name them as the model does."
        )
    if len(classes) > count:
        raise UserError(f"{what} has {len(classes)} classes ({some(classes)}), the model only {count}.")
    return list(range(len(classes))), _in_order(classes, count, names, what)


def _no_classes(count: int, what: str) -> DataWarning:
    """What is said of a model of no or one output."""
    text = f"the model has one output, which is no choice between classes, so the images of {what} go without labels"
    return DataWarning("no_classes", text if count else f"the model has no classifier, so there is no top-1 on {what}")


def class_count(model: nn.Module) -> int:
    """How many outputs the model has; 0 without a classifier."""
    count: Any = model.num_classes
    return int(count)


def plain(name: str) -> str:
    """A class name as it survives as a folder name: "T-shirt/top" and "t_shirt_top" are the same."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def some(names: Sequence[str], shown: int = 3) -> str:
    """The first of these names, for a message."""
    return ", ".join(map(printable, names[:shown])) + (", …" if len(names) > shown else "")


def _matches(classes: Sequence[str], names: ModelNames) -> Iterable[list[int]]:
    """The model's classes by each way to write the data's names, −1 for those it does not know."""
    # CUB and others number their folders: 001.Black_footed_Albatross.
    unnumbered = [re.sub(r"^\d+\W", "", name) for name in classes]
    for written in (classes, unnumbered, _as_wnids(classes) or ()):
        spelled = [plain(name) for name in written]
        if len(set(spelled)) == len(spelled):
            yield [names.index.get(name, -1) for name in spelled]
            words = [names.words.get(name, -1) for name in spelled]
            if -1 not in words and len(set(words)) == len(words):
                yield words


def _unmapped(classes: Sequence[str], labels: list[int], what: str) -> list[DataWarning]:
    """What is said of classes that the model does not have. Raises UserError where a name may just be misspelt."""
    unknown = [name for name, label in zip(classes, labels, strict=True) if label < 0]
    misfits = [name for name in unknown if not _WNID.fullmatch(name)]
    if misfits and not _as_wnids(classes):
        raise UserError(f"{what} has classes the model does not know ({some(misfits)}), among some it does.")
    if not unknown:
        return []
    text = f"{len(unknown)} of the {len(classes)} classes of {what} are none of the model's ({some(unknown)})"
    return [DataWarning("unmapped_classes", f"{text}: their images have no label and count in no accuracy")]


def _by_number(classes: Sequence[str], count: int) -> list[int] | None:
    """Labels where the classes are numbers: their own from 0 or from 1, or their order; None where that is no help."""
    if not all(re.fullmatch(r"[0-9]+", name) for name in classes):
        return None
    numbers = [int(name) for name in classes]
    if len(set(numbers)) < len(numbers):
        return None
    if max(numbers) < count:
        return numbers
    if min(numbers) >= 1 and max(numbers) == count:
        return [number - 1 for number in numbers]
    return [sorted(numbers).index(number) for number in numbers] if len(numbers) == count else None


def _in_order(classes: Sequence[str], count: int, names: ModelNames, what: str) -> list[DataWarning]:
    if len(classes) < count:
        text = f"{what} has {len(classes)} classes, the model {count}: they are taken for the model's first, in order"
    elif names.index:
        text = f"none of the {count} classes of {what} is one of ImageNet's: they are taken for the model's in order"
    elif list(classes) == sorted(classes) != sorted(classes, key=natural_key):
        text = f"the classes of {what} are counted in alphabetical order, 10 before 2 and B before a"
    else:
        return []  # as every trainer counts folders
    return [DataWarning("labels_guessed", text)]


def _index(names: Sequence[str]) -> dict[str, int]:
    """Class by name, and by the first of several names ("tench, Tinca tinca"); without what two classes are called."""
    index: dict[str, int] = {}
    for spelled in ([plain(name.partition(",")[0]) for name in names], [plain(name) for name in names]):
        times = Counter(spelled)
        index |= {name: place for place, name in enumerate(spelled) if times[name] == 1}
    return index


@cache
def _imagenet(subset: str) -> tuple[list[str], list[str]]:
    """The wnids of an ImageNet head and their words, in its order."""
    info = ImageNetInfo(subset)
    return info.label_names(), [str(words) for words in info.label_descriptions()]


def _published_subset(wnids: Sequence[str]) -> str:
    """ImageNet-A or -R, where these are its classes: results on these are published for their logits alone. Else ""."""
    for name in ("a", "r") if len(wnids) == 200 else ():
        text = resources.files("timm.data").joinpath("_info", f"imagenet_{name}_synsets.txt").read_text()
        if set(text.split()) == set(wnids):
            return f"ImageNet-{name.upper()}"
    return ""


def _as_wnids(names: Sequence[str]) -> list[str] | None:
    """The wnids of names that are wnids, or are the words for ImageNet-1k's classes in their order; else None."""
    if all(_WNID.fullmatch(name) for name in names):
        return list(names)
    wnids, words = _imagenet("imagenet-1k")
    if len(names) != len(wnids):
        return None
    same = [plain(a.partition(",")[0]) == plain(b.partition(",")[0]) for a, b in zip(names, words, strict=True)]
    return wnids if sum(same) > len(same) / 2 else None  # lists differ in how they write some of them
