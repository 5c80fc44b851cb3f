"""Controls: what any method should beat: `topk`, `random`, and the speed limit `free`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tokbench.fusion.core import Assignment, Method, View, constant, keep_only, register_method


@register_method
@dataclass(frozen=True)
class TopK(Method):
    """Keep the patch tokens that the class token attends to most, by falling attention, and drop the rest.

    EViT (arXiv 2202.07800, section 3) without its fused token.
    """

    name = "topk"
    paper = "control: EViT's selection (Liang et al., ICLR 2022, arXiv 2202.07800) without the fused token"
    tracks_size = False
    flops_shape = "keep"

    def plan(self, view: View, r: int) -> Assignment:
        attention = view.class_attention()[:, view.prefix :]
        ranked = attention.argsort(dim=-1, descending=True, stable=True)
        return keep_only(ranked[:, : ranked.shape[1] - r], view.prefix)


@register_method
@dataclass(frozen=True)
class Random(Method):
    """Drop r random patch positions: one draw for each (seed, block), the same for every image."""

    name = "random"
    paper = "control: drops patches at random"
    tracks_size = False

    seed: int = 0

    def plan(self, view: View, r: int) -> Assignment:
        kept = draw_kept(self.seed, view.block, view.patches, r, view.x.device)
        return keep_only(kept.expand(view.x.shape[0], -1), view.prefix)


@register_method
@dataclass(frozen=True)
class Free(Method):
    """Let the first tokens stay, by one slice: what a reduction costs that chooses nothing and merges nothing.

    A speed limit, never an accuracy row. With `list:` of what another method removes, at that method's place in the
    block, it does the same work on the same shapes without the method itself.
    place: "start", "middle" or "end" of the block.
    """

    name = "free"
    paper = "control, for speed only: drops as many patches without choosing"
    tracks_size = False
    speed_only = True

    place: Literal["start", "middle", "end"] = "middle"

    @staticmethod
    def check_place(value: object, default: object) -> str:
        """What a value must be, "" if it is that."""
        return "" if value in ("start", "middle", "end") else "start, middle or end"

    def plan(self, view: View, r: int) -> Assignment:
        stay = torch.arange(view.prefix + view.patches - r, device=view.x.device)
        return Assignment(stay.expand(view.x.shape[0], -1), sliced=True)


@constant(4096)
def draw_kept(seed: int, block: int, patches: int, r: int, device: torch.device) -> Tensor:
    """The positions that stay when r of `patches` are dropped at random: (patches − r,) ascending."""
    kept = np.random.RandomState([seed % 2**32, block]).permutation(patches)[r:]
    return torch.from_numpy(np.sort(kept)).to(device)
