"""timm's blocks with a method inside. Each one calls timm's own sub-modules, attention included, in timm's order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from tokbench.fusion.core import Method, State, View, merge, score_dtype
from tokbench.schedules import Schedule


@dataclass
class Fusion:
    """A method at work in one model: what was asked for, and the state of the current (then last) forward pass."""

    method: Method
    schedule: Schedule
    depth: int
    prefix: int
    grid: tuple[int, int]
    has_class_token: bool
    trace: bool = False
    state: State = field(default_factory=State)

    def begin(self, x: Tensor) -> None:
        self.state = State()
        if self.trace or self.method.needs_map:
            batch, tokens, _ = x.shape
            self.state.token_map = torch.arange(tokens, device=x.device).expand(batch, -1)

    def to_remove(self, block: int, tokens: int) -> int:
        """How many tokens this block removes: what the schedule asks for, as far as the method can."""
        patches = tokens - self.prefix
        if not self.method.acts_in(block, self.depth):
            return 0
        asked = self.schedule.removals(block, self.depth, patches)
        return max(0, min(asked, self.method.limit(patches, self.prefix), patches - 1))

    def log_size(self) -> Tensor | None:
        """log s for the attention logits, (B, N), where the method uses it and something has merged."""
        return self.state.size.log() if self.method.proportional and self.state.size is not None else None

    def reduce(self, x: Tensor, block: int, r: int, attention: Any) -> Tensor:
        """Plan on x (B, N, C) and carry it out: (B, M, C)."""
        state = self.state
        with torch.autocast(x.device.type, enabled=False):
            view = View(
                x=x,
                prefix=self.prefix,
                patches=int(x.shape[1]) - self.prefix,
                block=block,
                depth=self.depth,
                queries=tapped(attention.q_norm),
                keys=tapped(attention.k_norm),
                scale=attention.scale,
                has_class_token=self.has_class_token,
                grid=self.grid,
                size=state.size,
                log_size=self.log_size(),
                token_map=state.token_map,
            )
            plan = self.method.plan(view, r)
            reduced = merge(x, plan, state.size)
        state.advance(plan, int(x.shape[1]), self.method.tracks_size, score_dtype(x))
        return reduced


class Tap:
    """A forward hook that keeps a module's last output: queries and keys pass through q_norm and k_norm."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.value = output

    def __getstate__(self) -> dict:
        return {"value": None}


def tapped(module: nn.Module) -> Tensor:
    """What last passed through a tapped module; it is let go, so that no block holds on to its activations."""
    tap = next(hook for hook in module._forward_hooks.values() if isinstance(hook, Tap))
    value, tap.value = tap.value, None
    return value  # type: ignore[return-value]


class _Reduced:
    """The part that reduced blocks share. `fusion` and `index` are set by patch.py."""

    fusion: Fusion
    index: int

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError(
                "token fusion cannot be combined with an attention mask; call tokbench.remove(model) first"
            )
        fusion = self.fusion
        if self.index == 0:
            fusion.begin(x)
        log_size = fusion.log_size()
        mask = None if log_size is None else log_size[:, None, None, :].to(x.dtype)
        r = fusion.to_remove(self.index, int(x.shape[1]))  # under tracing, shapes are tensors
        x = self.reduced(x, mask, r) if r else super().forward(x, attn_mask=mask)  # type: ignore[misc]
        fusion.state.tokens.append(int(x.shape[1]))
        return x

    def reduced(self, x: Tensor, mask: Tensor | None, r: int) -> Tensor:
        raise NotImplementedError


class ReducedBlock(_Reduced, Block):
    """timm's pre-norm block."""

    def reduced(self, x: Tensor, mask: Tensor | None, r: int) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=mask)))
        x = self.fusion.reduce(x, self.index, r, self.attn)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ReducedResPostBlock(_Reduced, ResPostBlock):
    """timm's post-norm block."""

    def reduced(self, x: Tensor, mask: Tensor | None, r: int) -> Tensor:
        x = x + self.drop_path1(self.norm1(self.attn(x, attn_mask=mask)))
        x = self.fusion.reduce(x, self.index, r, self.attn)
        return x + self.drop_path2(self.norm2(self.mlp(x)))


REDUCED_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {Block: ReducedBlock, ResPostBlock: ReducedResPostBlock}
