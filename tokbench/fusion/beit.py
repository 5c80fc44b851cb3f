"""BEiT's block with a method inside: its attention adds a bias for the way from one token's place to the other's."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from timm.models.beit import Attention, Block
from torch import Tensor, nn

from tokbench.fusion.blocks import Attend, Fusion, ReducedBlockBase, ReducedEvaBlock, _heads, _project, attend_with
from tokbench.fusion.core import View

# The parts of other attentions that BEiT's lacks: identities, for the time that a method is in it.
BORROWED = ("q_norm", "k_norm", "norm", "joint")


class ReducedBeitAttention(Attention):
    """timm's BEiT attention, step by step: its queries, keys and values pass through nothing that could be tapped."""

    fusion: Fusion
    q_norm: nn.Module
    k_norm: nn.Module
    joint: nn.Module
    gate = None

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return round(self.scale**-2)

    def position_bias(self, shared: Tensor | None) -> list[Tensor]:
        """What is added to the logits for where the tokens are, the block's own, and the model's."""
        own = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        return [self.fusion.rows_and_columns(bias) for bias in (own, shared) if bias is not None]

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None, attend: Attend | None = None) -> Tensor:
        """timm's; attend: as in ReducedAttentionBase."""
        if attend is not None:
            return attend_with(self, x, attend)
        q, k, v = (_heads(self, part) for part in self.joint(_project(self, x, slice(0, 3))).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        log_size = self.fusion.log_size()
        biases = self.position_bias(shared_rel_pos_bias)
        if log_size is not None:
            biases.append(log_size[:, None, None, :].to(x.dtype))
        if self.fused_attn:
            dropout = self.attn_drop.p if self.training else 0.0
            mask = sum(biases[1:], biases[0]) if biases else None
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            logits = (q * self.scale) @ k.mT
            for bias in biases:
                logits = logits + bias
            x = self.attn_drop(logits.softmax(dim=-1)) @ v
        out: Tensor = self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))
        return out


class ReducedBeitBlock(ReducedBlockBase, Block):
    """timm's BEiT block. What its base passes on as `rope` is here the bias that all blocks of a model share."""

    before_attention = ReducedEvaBlock.before_attention
    add_attention = ReducedEvaBlock.add_attention
    add_mlp = ReducedEvaBlock.add_mlp

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, C) after this block."""
        return super().forward(x, rope=shared_rel_pos_bias)

    def bias(self, x: Tensor, rope: Tensor | None) -> dict[str, Tensor | None]:
        """The attention looks up the rest itself."""
        return {"shared_rel_pos_bias": rope}

    def view_of(
        self, x: Tensor, heads: Callable[[], tuple[Tensor, Tensor]], values: Callable[[], Tensor], rope: Tensor | None
    ) -> View:
        def bias() -> Tensor:
            return sum(self.attn.position_bias(rope))  # type: ignore[return-value]

        has_bias = rope is not None or self.attn.relative_position_bias_table is not None
        return self.fusion.view(x, self.index, self.attn, heads, values, bias=bias if has_bias else None)
