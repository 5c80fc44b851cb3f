"""k-nearest-neighbor classes of images by a backbone's pooled features, as DINO reports them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBORS, TEMPERATURE = 20, 0.07
# Of features that are kept at a time, of all models together.
LARGEST_BYTES = 2**31
_QUERIES = 256
NOT_ASKED, NO_CLASS = -2, -1


class Neighbors:
    """Keeps the features of the images of one pass, of every model, and then classifies each image by the others'.

    Features are kept as unit vectors in float16, where the models are. Where those of all images would take more than
    `LARGEST_BYTES`, it is every second image, or every third, and so on.

    images: how many will come. models: how many models see them.
    """

    def __init__(self, images: int, models: int) -> None:
        self._images, self._models = images, models
        self._kept: dict[str, list[Tensor]] = {}
        self._seen: dict[str, int] = {}
        self.step = 1

    def add(self, name: str, features: Tensor) -> None:
        """The features (B, D) of a model for the next images."""
        if not self._kept:
            whole = self._images * self._models * features.shape[1] * 2
            self.step = max(1, -(-whole // LARGEST_BYTES))
        start = self._seen.get(name, 0)
        self._seen[name] = start + len(features)
        chosen = features[-start % self.step :: self.step]
        self._kept.setdefault(name, []).append(F.normalize(chosen.float(), dim=1).half())

    def classes(self, name: str, labels: Tensor) -> Tensor:
        """(N,) long, on the CPU: the class that the other images with a label give each image, labels (N,).

        `NO_CLASS` where its features are not finite, `NOT_ASKED` where it has no label or its features were not kept.
        """
        found = torch.full_like(labels, NOT_ASKED)
        features, kept = torch.cat(self._kept.pop(name)), labels[:: self.step]
        labelled = kept >= 0
        if labelled.sum() > 1:
            asked = labelled.to(features.device)
            found[:: self.step][labelled] = weighted_knn(features[asked], kept[labelled].to(features.device)).cpu()
        return found


def weighted_knn(features: Tensor, labels: Tensor) -> Tensor:
    """The class (N,) that the 20 nearest others vote for, weighted by exp(cosine / 0.07) (Caron et al., ICCV 2021).

    features: unit vectors (N, D), N of at least 2. labels: (N,), none negative. −1 for features that are not finite;
    they have no vote.
    """
    known = features.isfinite().all(dim=1)
    everything = features.float().where(known[:, None], 0)
    found = []
    for start in range(0, len(features), _QUERIES):
        queries = everything[start : start + _QUERIES]
        cosines = queries @ everything.T
        cosines[:, ~known] = -torch.inf
        own = torch.arange(len(queries), device=features.device)
        cosines[own, start + own] = -torch.inf  # nobody votes for itself
        nearest, who = cosines.topk(min(NEIGHBORS, len(features) - 1), dim=1)
        votes = queries.new_zeros(len(queries), int(labels.max()) + 1)
        votes.scatter_add_(1, labels[who], ((nearest - 1) / TEMPERATURE).exp())
        found.append(votes.argmax(dim=1))
    return torch.cat(found).where(known, NO_CLASS)
