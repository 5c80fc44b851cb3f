"""The distance of a reduced model's answers from the unreduced model's, on images without labels."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    method: Method
    images: Tensor
    memory: Memory = field(default_factory=Memory)
    shown: dict[str, int] = field(default_factory=dict)  # batches, by candidate; remembered ones included

    def __post_init__(self) -> None:
        base = remove(fork(self.model))
        self.reduced: Any = insert(fork(self.model), self.method, Schedule("list", (0,)))
        self.batches = self.images.split(BATCH)
        with torch.inference_mode(), evaluation_mode([base]):
            self.answers = [base(batch).float() for batch in self.batches]

    @property
    def passes(self) -> float:
        """Forward passes over all the images."""
        return sum(self.shown.values()) / len(self.batches)

    def of_batches(self, removals: Removals, method: Method, count: int) -> list[float]:
        """The mean distance in each of the first `count` batches."""
        key = f"{','.join(map(str, removals))} {json.dumps(method.parameters(), default=str)}"
        self.shown[key] = max(min(count, len(self.batches)), self.shown.get(key, 0))
        unknown = range(len(self.memory.known.get(key, [])), min(count, len(self.batches)))
        if unknown:
            self.reduced.fusion.schedule, self.reduced.fusion.method = Schedule("list", removals), method
            with torch.inference_mode(), evaluation_mode([self.reduced]):
                for number in unknown:
                    output = self.reduced(self.batches[number]).float()
                    self.memory.add(key, float(self._distance(output, self.answers[number]).mean()))
        return self.memory.known[key][:count]

    def _distance(self, output: Tensor, answers: Tensor) -> Tensor:
        if self.model.num_classes == 0:
            return 1 - F.cosine_similarity(output, answers, dim=1)
        if output.shape[1] == 1:
            return (output - answers).square()[:, 0] / torch.cat(self.answers).var()
        return F.kl_div(output.log_softmax(1), answers.log_softmax(1), log_target=True, reduction="none").sum(1)
