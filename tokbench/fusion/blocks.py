"""timm's blocks with a method inside. Each one calls timm's own sub-modules, attention included, in timm's order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from tokbench.fusion.core import Method, State, View, merge, reduce_attention, score_dtype
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

    def view(self, x: Tensor, block: int, attention: Any, queries: Tensor, keys: Tensor) -> View:
        """What the method may look at: x (B, N, C), and this block's queries and keys (B, H, N, d)."""
        return View(
            x=x,
            prefix=self.prefix,
            patches=int(x.shape[1]) - self.prefix,
            block=block,
            depth=self.depth,
            queries=queries,
            keys=keys,
            scale=attention.scale,
            has_class_token=self.has_class_token,
            grid=self.grid,
            size=self.state.size,
            log_size=self.log_size(),
            token_map=self.state.token_map,
        )

    def reduce(self, view: View, r: int) -> tuple[Tensor, Tensor | None]:
        """Plan and carry it out: tokens (B, M, C), and the reduced attention (B, H, M, M) for methods that reuse it."""
        with torch.autocast(view.x.device.type, enabled=False):
            plan = self.method.plan(view, r)
            reduced = merge(view.x, plan, view.size)
            attention = None
            if self.method.reuses_attention:
                attention = reduce_attention(view.attention(), plan, view.size)
        self.state.advance(plan, int(view.x.shape[1]), self.method.tracks_size, score_dtype(view.x))
        return reduced, attention


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


def queries_and_keys(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a timm attention scores by, each (B, H, N, d), for the tokens x (B, N, C); no values are computed."""
    queries, keys = _heads(attention, x, slice(0, 2 * attention.attn_dim), 2)
    return attention.q_norm(queries), attention.k_norm(keys)


def attend_with(attention: Any, x: Tensor, matrix: Tensor) -> Tensor:
    """What a timm attention gives for the tokens x (B, N, C) when A is `matrix` (B, H, N, N): values only are new."""
    (values,) = _heads(attention, x, slice(2 * attention.attn_dim, None), 1)
    out = attention.norm((matrix.to(values.dtype) @ values).transpose(1, 2).flatten(2))
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out))


def _heads(attention: Any, x: Tensor, rows: slice, parts: int) -> Tensor:
    """Some rows of the qkv projection, split into `parts` of H heads: (parts, B, H, N, d)."""
    bias = attention.qkv.bias
    out = F.linear(x, attention.qkv.weight[rows], None if bias is None else bias[rows])
    return out.unflatten(-1, (parts, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)


class _Reduced:
    """The part that reduced blocks share. `fusion` and `index` are set by patch.py."""

    fusion: Fusion
    index: int
    attn: Any

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("token fusion does not go with an attention mask; call tokbench.remove(model) first")
        fusion = self.fusion
        if self.index == 0:
            fusion.begin(x)
        r = fusion.to_remove(self.index, int(x.shape[1]))  # under tracing, shapes are tensors
        match fusion.method.place if r else "nowhere":
            case "start":
                x = self.reduce_first(x, r)
            case "middle":
                x = self.add_attention(x, self.attn(self.before_attention(x), attn_mask=self.mask(x)))
                x, _ = fusion.reduce(self.tapped_view(x), r)
                x = self.add_mlp(x)
            case "end":
                x = super().forward(x, attn_mask=self.mask(x))  # type: ignore[misc]
                x, _ = fusion.reduce(self.tapped_view(x), r)
            case _:
                x = super().forward(x, attn_mask=self.mask(x))  # type: ignore[misc]
        for norm in (self.attn.q_norm, self.attn.k_norm):
            tapped(norm)
        fusion.state.tokens.append(int(x.shape[1]))
        return x

    def mask(self, x: Tensor) -> Tensor | None:
        """log s as timm's additive attention mask, (B, 1, 1, N), or None."""
        log_size = self.fusion.log_size()
        return None if log_size is None else log_size[:, None, None, :].to(x.dtype)

    def tapped_view(self, x: Tensor) -> View:
        return self.fusion.view(x, self.index, self.attn, tapped(self.attn.q_norm), tapped(self.attn.k_norm))

    def reduce_first(self, x: Tensor, r: int) -> Tensor:
        """Reduce before the attention, by this block's own attention on the tokens as they come."""
        queries, keys = queries_and_keys(self.attn, self.before_attention(x))
        x, matrix = self.fusion.reduce(self.fusion.view(x, self.index, self.attn, queries, keys), r)
        if matrix is None:
            return super().forward(x, attn_mask=self.mask(x))  # type: ignore[misc]
        return self.add_mlp(self.add_attention(x, attend_with(self.attn, self.before_attention(x), matrix)))

    def before_attention(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        raise NotImplementedError

    def add_mlp(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ReducedBlock(_Reduced, Block):
    """timm's pre-norm block."""

    def before_attention(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + self.drop_path1(self.ls1(attended))

    def add_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ReducedResPostBlock(_Reduced, ResPostBlock):
    """timm's post-norm block."""

    def before_attention(self, x: Tensor) -> Tensor:
        return x

    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + self.drop_path1(self.norm1(attended))

    def add_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


REDUCED_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {Block: ReducedBlock, ResPostBlock: ReducedResPostBlock}
