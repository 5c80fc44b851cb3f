"""What models answer, image by image, in one pass over the images for all of them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import nan
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from tokbench.errors import one_line
from tokbench.measure._model import evaluation_mode, is_out_of_memory, release_memory
from tokbench.measure.stats import correlation_interval, mean_interval

LARGEST_ARCHIVE = 2**31  # sixty million answers


@dataclass(frozen=True, eq=False)
class Predictions:
    """A model's answers to n images, in the order they came.

    `label` (n,) int64 is the true class, −1 where there is none; such an image is never correct.
    `predicted` (n,) int64 is the class with the largest logit, −1 where the logits were not finite.
    `label_probability` (n,) float32 is the true class's softmax probability, NaN where either is missing.
    `top5` (n,) bool tells whether the true class is among the five most probable.
    `divergence` (n,) float32 is the Kullback-Leibler divergence, in nats, of the answer from the unreduced model's:
    Σ p log(p / q) over the classes, p the unreduced model's probabilities; NaN where either is not finite.
    `similarity` (n,) float32 is the cosine of the pooled features to the unreduced model's, for models without a
    classifier, of which nothing else is known; NaN for all others, and where either is not finite.
    `output` (n,) float32 is the one output of a model that has no more (a score, a logit), which chooses no class;
    NaN for all others, and where it is not finite.
    `classifies` tells whether there are classes at all: not for a model without a classifier or of one output.
    """

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    label_probability: NDArray[np.float32]
    top5: NDArray[np.bool_]
    divergence: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    similarity: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    output: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    classifies: bool = True

    def __post_init__(self) -> None:
        for name in _LATER:
            if len(getattr(self, name)) != len(self.label):
                object.__setattr__(self, name, np.full(len(self.label), np.nan, np.float32))

    @property
    def labeled(self) -> bool:
        """Whether any image has a true class."""
        return bool((self.label >= 0).any())

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(n,) bool: whether the predicted class is the true one."""
        correct: NDArray[np.bool_] = (self.predicted == self.label) & (self.label >= 0)
        return correct

    def top1(self) -> float:
        """Share of the images with a label whose predicted class is the true one, in [0, 1]; NaN without any."""
        return float(self.correct[self.label >= 0].mean()) if self.labeled else nan

    def top5_accuracy(self) -> float:
        """Share of the images with a label whose true class is among the five most probable, in [0, 1]; likewise."""
        return float(self.top5[self.label >= 0].mean()) if self.labeled else nan

    def nonfinite(self) -> int:
        """How many images got logits, features or an output that are not all finite."""
        if self.classifies:
            return int((self.predicted < 0).sum())
        return int((np.isnan(self.similarity) & np.isnan(self.output)).sum())

    def with_label(self) -> Predictions:
        """The answers to the images that have a label: accuracy is of these only."""
        return self.take(np.flatnonzero(self.label >= 0))

    def take(self, places: NDArray[np.int64]) -> Predictions:
        """The answers to the images at these places, in this order."""
        return Predictions(**{name: getattr(self, name)[places] for name in ARRAYS}, classifies=self.classifies)

    def save(self, file: str | Path | BinaryIO) -> None:
        """Write as a compressed NumPy archive, to an open file or under exactly that name."""
        if isinstance(file, str | Path):
            with open(file, "wb") as opened:
                return self.save(opened)
        np.savez_compressed(file, **{own.name: getattr(self, own.name) for own in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read what `save` wrote. Raises OSError or ValueError for anything else."""
        return cls.from_arrays(load_arrays(Path(path)))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Predictions:
        """Answers from their arrays by name. Raises ValueError where one is missing, or of another kind or length."""
        found = {name: arrays[name] for name in ARRAYS if name in arrays}
        if absent := [name for name in ARRAYS if name not in found and name not in _LATER]:
            raise ValueError(f"it has no array {absent[0]!r}")
        for name, array in found.items():
            if array.dtype.kind != _KINDS[name] or array.shape != (found["label"].size,):
                raise ValueError(f"its array {name!r} is {array.dtype} of shape {array.shape}")
        if "classifies" in arrays:
            return cls(**found, classifies=bool(np.all(arrays["classifies"])))
        # Features of a model without a classifier, in archives of older versions: they were all that was told.
        return cls(**found, classifies=not np.isfinite(found.get("similarity", np.nan)).any())


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a NumPy archive by name. Nothing is unpickled, and no more than `LARGEST_ARCHIVE` bytes unpacked.

    Raises OSError, and ValueError for all that is no such archive.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    try:
        with zipfile.ZipFile(path) as members:
            if sum(member.file_size for member in members.infolist()) > LARGEST_ARCHIVE:
                raise ValueError(f"unpacked it would be larger than {LARGEST_ARCHIVE / 2**30:g} GiB")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile, zlib and NumPy have a dozen ways to stumble over a damaged archive
        raise ValueError(f"it is no archive of arrays, or damaged ({one_line(error)})") from error


ARRAYS = tuple(own.name for own in fields(Predictions) if own.name != "classifies")
"""The fields of Predictions with one entry per image."""
_KINDS = {
    "label": "i", "predicted": "i", "label_probability": "f", "top5": "b", "divergence": "f", "similarity": "f",
    "output": "f",
}  # fmt: skip
_LATER = ("divergence", "similarity", "output")  # which archives of earlier versions lack


def output_shift(outputs: Predictions, unreduced: Predictions) -> dict[str, tuple[float, float, float]]:
    """How far a model of one output moved from the unreduced one on the same images: {name: (value, low, high)}.

    "output_shift": mean absolute difference over the standard deviation of the unreduced model's outputs.
    "output_correlation": Pearson's. 95 % intervals. Empty where fewer than two images have both outputs, or the
    unreduced model answers all alike; no correlation where only the other does.
    """
    both = np.isfinite(outputs.output) & np.isfinite(unreduced.output)
    now, before = outputs.output[both].astype(float), unreduced.output[both].astype(float)
    if now.size < 2 or not (spread := float(before.std(ddof=1))):
        return {}
    mean, low, high = mean_interval(np.abs(now - before) / spread)
    found = {"output_shift": (mean, max(low, 0.0), high)}
    return found | {"output_correlation": correlation_interval(now, before)} if np.ptp(now) else found


def join(parts: Iterable[Predictions]) -> Predictions:
    """Answers to images and to those that came after, as one."""
    parts = list(parts)
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    return Predictions(**arrays, classifies=parts[0].classifies)


def evaluate(
    models: Mapping[str, nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    classifier: bool = True,
    among: Sequence[int] | None = None,
    batch_sizes: dict[str, int] | None = None,
    on_batch: Callable[[dict[str, Predictions]], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Predictions]:
    """Show every batch to every model while it is there; what each answered comes back under its name.

    `batches` yields images (B, C, H, W), preprocessed, and class indices (B,), −1 for none. The models must
    be on `device` and take `dtype` already: images are moved there, models never. They run in eval mode, and
    have their own modes back afterwards. The first model is the one that all are compared with; `classifier` False
    says that what comes out are features and not logits. `among` are the classes to choose from (ascending, all labels
    among them): the other logits are left out, as in what is published for ImageNet-A and -R. `on_batch` is given what
    the models answered to each batch.
    A model that runs out of memory gets half as many images at a time from there on; `batch_sizes` says, by name,
    how many each may get at most, and is kept up to date.
    A model that raises is reported to `on_failure`, left out from there on, and missing from the result;
    without `on_failure` the exception goes through. Raises ValueError when there are no images.
    """
    running, reference = dict(models), next(iter(models), "")
    chosen = None if among is None else torch.tensor(among)
    batch_sizes = {} if batch_sizes is None else batch_sizes
    parts: list[dict[str, Predictions]] = []

    def show(images: Tensor, labels: Tensor) -> dict[str, Predictions]:
        try:
            moved = images.to(device, dtype, non_blocking=True)
        except Exception as error:
            if not is_out_of_memory(error) or len(images) == 1:
                raise
        else:
            return _answers(running, reference, moved, labels, classifier, chosen, batch_sizes, on_failure)
        release_memory(torch.device(device))
        half = (len(images) + 1) // 2
        batch_sizes.update({name: min(batch_sizes.get(name, half), half) for name in running})
        first, second = show(images[:half], labels[:half]), show(images[half:], labels[half:])
        return {name: join([first[name], own]) for name, own in second.items()}

    with torch.inference_mode(), evaluation_mode(models.values()):
        for images, labels in batches:
            parts.append(show(images, labels.long().cpu()))
            if on_batch is not None:
                on_batch(parts[-1])
    if not parts:
        raise ValueError("there are no images to evaluate on")
    return {name: join(part[name] for part in parts) for name in running}


def _answers(
    running: dict[str, nn.Module],
    reference: str,
    images: Tensor,
    labels: Tensor,
    classifier: bool,
    among: Tensor | None,
    batch_sizes: dict[str, int],
    on_failure: Callable[[str, Exception], None] | None,
) -> dict[str, Predictions]:
    """Every running model's answers to one batch; models that fail are taken out of `running`."""
    answers: dict[str, dict[str, Tensor]] = {}
    given = labels
    if among is not None:
        labels = torch.searchsorted(among, labels).where(labels >= 0, -1)
    compared: Tensor | None = None
    for name, model in list(running.items()):
        try:
            output = _output(name, model, images, batch_sizes)
            if among is not None:
                output = output[:, among.to(output.device)]
            if name == reference:
                compared = output
            if not classifier:
                answers[name] = _without_classes(output, labels) | _distance(output, compared, classifier)
            elif output.shape[1] == 1:
                answers[name] = _without_classes(output, labels) | _one_output(output)
            else:
                answers[name] = _read_off(output, labels) | _distance(output, compared, classifier)
        except Exception as error:
            if on_failure is None:
                raise
            del running[name]
            on_failure(name, error)
        else:
            if among is not None:
                predicted = answers[name]["predicted"]
                answers[name]["predicted"] = among.to(predicted.device)[predicted].where(predicted >= 0, -1)
    # Fetched only now, so that an accelerator is waited for once a batch and not once a model.
    return {
        name: Predictions(
            given.numpy(),
            **{field: values.cpu().numpy() for field, values in answer.items()},
            classifies="output" not in answer and classifier,
        )
        for name, answer in answers.items()
    }


def _output(name: str, model: nn.Module, images: Tensor, batch_sizes: dict[str, int]) -> Tensor:
    """What a model makes of a batch, in as many pieces as its memory asks for: (B, D), float32 at least."""
    while True:
        size = min(batch_sizes.get(name, len(images)), len(images))
        try:
            pieces = [model(some) for some in images.split(size)]
        except Exception as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            batch_sizes[name] = (size + 1) // 2
        else:
            output = torch.cat(pieces)
            return output.to(torch.promote_types(output.dtype, torch.float32))
        # Only here: while the exception is being handled, its frames still hold what filled the memory.
        release_memory(images.device)


def _read_off(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What Predictions says of one model's logits (B, classes) by themselves: (B,) each, on the logits' device."""
    batch, classes = logits.shape
    if batch != len(labels):
        raise ValueError(f"the model gave {batch} answers to {len(labels)} images")
    # On the CPU, because an index out of range would take the whole CUDA context down.
    if labels.max() >= classes:
        raise ValueError(f"label {int(labels.max())} is out of range: the model has {classes} classes")
    labels = labels.to(logits.device, non_blocking=True)
    finite = logits.isfinite().all(dim=1)
    predicted = logits.argmax(dim=1).where(finite, -1)
    probability = logits.softmax(dim=1).gather(1, labels.clamp_min(0)[:, None])[:, 0].float()
    five = logits.topk(min(5, classes), dim=1).indices
    # With many equal logits topk may leave out the one that argmax takes.
    top5 = (five == labels[:, None]).any(dim=1) | (predicted == labels)
    known = finite & (labels >= 0)
    return {
        "predicted": predicted,
        "label_probability": probability.where(known, float("nan")),
        "top5": top5 & known,
    }


def _without_classes(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """`_read_off` for features (B, D): nothing is predicted."""
    nothing = torch.full((len(labels),), -1, device=features.device)
    return {"predicted": nothing, "label_probability": nothing * float("nan"), "top5": nothing > 0}


def _one_output(output: Tensor) -> dict[str, Tensor]:
    """The output (B, 1) itself: softmax and argmax of one number are 1 and 0 whatever it is."""
    value = output[:, 0].float()
    return {"output": value.where(value.isfinite(), float("nan"))}


def _distance(output: Tensor, compared: Tensor | None, classifier: bool) -> dict[str, Tensor]:
    """How far logits or features (B, D) are from the unreduced model's, (B,) each."""
    unknown = output.new_full((len(output),), float("nan"), dtype=torch.float32)
    if compared is None:
        return {"divergence": unknown, "similarity": unknown}
    if not classifier:
        return {"divergence": unknown, "similarity": F.cosine_similarity(output, compared, dim=1).float()}
    log_p, log_q = compared.log_softmax(dim=1), output.log_softmax(dim=1)
    return {"divergence": (log_p.exp() * (log_p - log_q)).sum(dim=1).float(), "similarity": unknown}
