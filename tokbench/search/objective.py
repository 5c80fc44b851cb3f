"""How far a reduced model's answers are from the unreduced model's, on images without labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.fusion.core import Method
from tokbench.fusion.patch import fork, insert, remove
from tokbench.measure._model import evaluation_mode
from tokbench.schedules import Schedule
from tokbench.search.space import Removals

BATCH = 64


@dataclass
class Objective:
    """The mean distance between the answers of `model` to `images` (B, C, H, W) with and without `method`.

    It is the KL divergence of the classes; 1 − cosine of the features where there are none; the squared difference over
    the variance where there is one output.
    """

    model: VisionTransformer
    method: Method
    images: Tensor
    seen: dict[Any, list[float]] = field(default_factory=dict)
    shown: int = 0  # images, to reduced models

    def __post_init__(self) -> None:
        base = remove(fork(self.model))
        self.reduced: Any = insert(fork(self.model), self.method, Schedule("list", (0,)))
        self.batches = self.images.split(BATCH)
        with torch.inference_mode(), evaluation_mode([base]):
            self.answers = [base(batch).float() for batch in self.batches]

    @property
    def passes(self) -> float:
        """Forward passes over all the images that reduced models have made."""
        return self.shown / len(self.images)

    def of_batches(self, removals: Removals, count: int, method: Method | None = None) -> list[float]:
        """The mean distance in each of the first `count` batches."""
        parts = self.seen.setdefault((removals, method), [])
        self.reduced.fusion.schedule = Schedule("list", removals)
        self.reduced.fusion.method = method or self.method
        with torch.inference_mode(), evaluation_mode([self.reduced]):
            for images, answers in zip(self.batches[len(parts) : count], self.answers[len(parts) : count], strict=True):
                parts.append(float(self._distance(self.reduced(images).float(), answers).mean()))
                self.shown += len(images)
        return parts[:count]

    def _distance(self, output: Tensor, answers: Tensor) -> Tensor:
        if self.model.num_classes == 0:
            return 1 - F.cosine_similarity(output, answers, dim=1)
        if output.shape[1] == 1:
            return (output - answers).square()[:, 0] / torch.cat(self.answers).var()
        return F.kl_div(output.log_softmax(1), answers.log_softmax(1), log_target=True, reduction="none").sum(1)
