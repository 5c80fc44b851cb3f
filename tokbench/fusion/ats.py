"""ATS: Adaptive Token Sampling, Fayyaz et al., ECCV 2022 (arXiv 2111.15667)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokbench.fusion.core import Assignment, Method, View, chosen_first, keep_only, one_of, register_method


@register_method
@dataclass(frozen=True)
class ATS(Method):
    """Sample tokens by their scores, so that an image keeps as few as its scores are uneven, and drop the others.

    A token's score is the class token's attention to it times the length of its values. An image keeps the tokens in
    which points, spread evenly over the sum of scores, fall: T − r at most, T as if each block had removed its r.
    form: "midpoints", sampled in the order of the sequence, is Haurum et al.'s (arXiv 2308.04657); "released", in the
    order of scores with a point for each of the first tokens whatever r is, is the authors' code.
    """

    name = "ats"
    paper = "Fayyaz et al., Adaptive Token Sampling for Efficient Vision Transformers, ECCV 2022, arXiv 2111.15667"
    tracks_size = False
    counts_by_image = True
    needs_values = True
    flops_shape = "keep"

    form: str = "midpoints"

    check_form = staticmethod(one_of("midpoints", "released"))

    def plan(self, view: View, r: int) -> Assignment:
        attention, values = view.class_rows().mean(2), view.values()
        values = values.to(attention.dtype)
        if self.form == "midpoints":
            score = (attention * values.norm(dim=-1)).sum(1)
        else:
            score = attention.sum(1) * values.square().sum((1, 3)).sqrt()
        real = torch.ones_like(score, dtype=torch.bool) if view.size is None else view.size > 0
        score, real = score[:, view.prefix :], real[:, view.prefix :]
        score = score / score.sum(1, keepdim=True)
        if self.form == "midpoints":
            order = torch.arange(view.patches, device=score.device).expand_as(score)
            taken = _midpoints(score, real, view.nominal - r)
        else:
            order = score.masked_fill(~real, torch.inf).argsort(dim=1, stable=True)
            taken = _released(score.gather(1, order), real.gather(1, order), view.grid[0] * view.grid[1])
        count = taken.sum(1)
        most = view.nominal - r if self.form == "midpoints" else view.patches
        most = min(most, view.patches) if view.fixed else int(count.max())
        return keep_only(order.gather(1, chosen_first(taken)[:, :most]), view.prefix, count)


def _midpoints(score: Tensor, real: Tensor, points: int) -> Tensor:
    """Which tokens, of scores (B, T) in this order, are sampled by so many points: (B, T)."""
    place = torch.arange(points, device=score.device, dtype=score.dtype)
    return _nearest(score.cumsum(1), real, ((2 * place + 1) / (2 * (points + 1))).expand(score.shape[0], -1))


def _released(score: Tensor, real: Tensor, points: int) -> Tensor:
    """`_midpoints`, for points from the least sum above 0 to 1; sums run from 0, for the first token, to 1."""
    total = score.cumsum(1) - score[:, :1]
    total = total / total.masked_fill(~real, 0).amax(1, keepdim=True).clamp_min(torch.finfo(score.dtype).tiny)
    first = total.masked_fill(~real | (total <= 0), 1).amin(1, keepdim=True)
    share = torch.linspace(0, 1, points, device=score.device, dtype=score.dtype)
    return _nearest(total, real, first + (1 - first) * share)


def _nearest(total: Tensor, real: Tensor, points: Tensor) -> Tensor:
    """Which of the real tokens are nearest to some of the points (B, K), by their cumulated scores (B, T): (B, T)."""
    apart = (total.masked_fill(~real, torch.inf).unsqueeze(1) - points.unsqueeze(2)).abs()
    return torch.zeros_like(real).scatter(1, apart.argmin(-1), 1)
