"""vid-TLDR: Choi et al., CVPR 2024 (arXiv 2403.13347), on single images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokbench.fusion.core import Assignment, Method, View, bipartite_match, register_method, score_dtype


@register_method
@dataclass(frozen=True)
class VidTLDR(Method):
    """ToMe's pairs, by the tokens themselves; what goes weighs as much as it is salient, and background is dropped.

    A token is salient if its attention is sharp, of low entropy (section 3.2); below the mean it is background.
    """

    name = "vidtldr"
    paper = "Choi et al., vid-TLDR: Training Free Token Merging for Video Transformer, CVPR 2024, arXiv 2403.13347"
    proportional = True

    def limit(self, patches: int, prefix: int) -> int:
        return patches // 2

    def plan(self, view: View, r: int) -> Assignment:
        salient = self.saliency(view)
        kept, source, slot = bipartite_match(view.x.to(score_dtype(view.x)), view.prefix, r)
        size = torch.ones_like(salient) if view.size is None else view.size
        mass = size.scatter(1, source, size.gather(1, source) * salient.gather(1, source))
        return Assignment(kept, source, slot, mass=mass)

    def saliency(self, view: View) -> Tensor:
        """g: (B, N), from 0 to 1; 0 for prefix tokens, and for all if their attention is equally sharp."""
        rows, tiny = view.plain_attention().mean(1)[:, view.prefix :], 1e-30
        sharp = (rows * rows.clamp_min(tiny).log()).sum(-1)
        sharp = sharp - sharp.amin(1, keepdim=True)
        sharp = sharp / sharp.amax(1, keepdim=True).clamp_min(tiny)
        above = (sharp - sharp.mean(1, keepdim=True)).clamp_min(0)
        return F.pad(above / above.amax(1, keepdim=True).clamp_min(tiny), (view.prefix, 0))
