"""The distance of a reduced model's answers from the unreduced model's, on images without labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.fusion.core import Method
from tokbench.fusion.patch import fork, insert, remove
from tokbench.measure._model import evaluation_mode
from tokbench.schedules import Schedule
from tokbench.searching.space import Removals

BATCH = 32

# Removals, a method and the number of a batch: of such, workers give the distances, in the same order.
Asked = tuple[Removals, Method, int]
Workers = Callable[[Sequence[Asked]], Iterable[float]]


@dataclass
class Memory:
    """Distances by removals and parameters, batch by batch; kept in a file if there is one."""

    path: Path | None = None
    known: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lines = self.path.read_text("utf-8").splitlines() if self.path and self.path.is_file() else []
        for line in lines:
            try:
                key, distance = json.loads(line)
            except ValueError:  # a killed process's last line
                continue
            self.known.setdefault(key, []).append(distance)

    def add(self, key: str, distance: float) -> None:
        """Add the next batch's distance."""
        self.known.setdefault(key, []).append(distance)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, distance]) + "\n")


@dataclass
class Objective:
    """The mean distance between the answers of `model` to `images` (B, C, H, W) with and without a method.

    It is the KL divergence of the classes; without classes, 1 − cosine of the features; with one output, the squared
    difference over the variance.
    """

    model: VisionTransformer
    images: Tensor
    memory: Memory = field(default_factory=Memory)
    workers: Workers | None = None
    shown: dict[str, int] = field(default_factory=dict)  # batches, by candidate; remembered ones included

    def __post_init__(self) -> None:
        base, self.reduced = remove(fork(self.model)), fork(self.model)
        self.batches = self.images.split(BATCH)
        with torch.inference_mode(), evaluation_mode([base]):
            self.answers = [base(batch).float() for batch in self.batches]

    @property
    def passes(self) -> float:
        """Forward passes over all the images."""
        return sum(self.shown.values()) / len(self.batches)

    def of_batches(self, removals: Removals, method: Method, count: int) -> list[float]:
        """The mean distance in each of the first `count` batches."""
        key = _key(removals, method)
        self.shown[key] = max(min(count, len(self.batches)), self.shown.get(key, 0))
        for number in self._unknown(key, count):
            self.memory.add(key, self.of_batch(removals, method, number))
        return self.memory.known[key][:count]

    def of_batch(self, removals: Removals, method: Method, number: int) -> float:
        """The mean distance in a batch, measured now."""
        model = insert(self.reduced, method, Schedule("list", removals))
        with torch.inference_mode(), evaluation_mode([model]):
            output = model(self.batches[number]).float()
        return float(self._distance(output, self.answers[number]).mean())

    def look_ahead(
        self, candidates: Sequence[tuple[Removals, Method]], count: int, tell: Callable[[], None]
    ) -> list[float]:
        """Each candidate's mean distance in the first `count` batches, which the workers find if it is not known.

        These do not count as shown before `of_batches` is asked for them. tell: called after each.
        """
        assert self.workers is not None
        different = {_key(*candidate): candidate for candidate in candidates}
        asked = [(key, number) for key in different for number in self._unknown(key, count)]
        distances = self.workers([(*different[key], number) for key, number in asked])
        for (key, _), distance in zip(asked, distances, strict=True):
            self.memory.add(key, distance)
            tell()
        return [fmean(self.memory.known[_key(*candidate)][:count]) for candidate in candidates]

    def _unknown(self, key: str, count: int) -> range:
        return range(len(self.memory.known.get(key, [])), min(count, len(self.batches)))

    def _distance(self, output: Tensor, answers: Tensor) -> Tensor:
        if self.model.num_classes == 0:
            return 1 - F.cosine_similarity(output, answers, dim=1)
        if output.shape[1] == 1:
            return (output - answers).square()[:, 0] / torch.cat(self.answers).var()
        return F.kl_div(output.log_softmax(1), answers.log_softmax(1), log_target=True, reduction="none").sum(1)


def _key(removals: Removals, method: Method) -> str:
    return f"{','.join(map(str, removals))} {json.dumps(method.parameters(), default=str)}"
