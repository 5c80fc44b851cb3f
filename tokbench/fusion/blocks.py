"""timm's blocks with a method inside. Each one calls timm's own sub-modules, attention included, in timm's order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention, AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from tokbench.errors import UserError, one_line
from tokbench.fusion.core import Assignment, Method, State, View, attend, attend_merged, attend_reduced, for_every_head
from tokbench.fusion.kernels import kernels_for
from tokbench.schedules import Schedule

# From values (B, H, M, d) of a block's tokens to what its attention makes of them, (B, M, H·d).
Attend = Callable[[Tensor], Tensor]


@dataclass
class Fusion:
    """A method at work in one model: what was asked for, and the states of the current (then last) forward pass.

    An export has one of its own (key True), for its tensors are no real ones, and nothing may find them afterwards.
    """

    method: Method
    schedule: Schedule
    depth: int
    prefix: int
    grid: tuple[int, int]
    has_class_token: bool
    positional: bool = False
    trace: bool = False
    fused: bool = True  # whether shortcuts may stand in for definitions
    checks: bool = False  # each plan before it is carried out: not while anything is timed
    counted: bool = False  # traced to count the FLOPs of just these images
    states: dict[bool, State] = field(default_factory=lambda: {False: State(), True: State()})

    @property
    def state(self) -> State:
        return self.states[torch.compiler.is_exporting()]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "states": {False: self.states[False], True: State()}}

    def begin(self, x: Tensor) -> None:
        self.states[torch.compiler.is_exporting()] = State(positional=self.positional)
        with in_own_precision(x.device.type):
            self.state.begun = self.method.begin(x, self.prefix, self.grid)
        if self.method.counts_by_image:
            self.state.nominal = int(x.shape[1])
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

    def plan(self, view: View, r: int) -> Assignment:
        """What the method plans. One that exits, or raises what is no Exception, fails as any other does."""
        before = view.x.clone() if self.checks else view.x
        try:
            plan = self.method.plan(view, r)
        except (Exception, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise RuntimeError(f"{self.method.name}.plan raised {one_line(error)}") from error
        if self.checks:
            self._check(plan, view, before)
        return plan

    def _check(self, plan: Assignment, view: View, before: Tensor) -> None:
        try:
            if not isinstance(plan, Assignment):
                raise UserError(f"it must be an Assignment, not {type(plan).__name__}")
            plan.require_valid(view)
            if (plan.count is not None) != self.method.counts_by_image:
                raise UserError("it has a count if, and only if, the method says that it counts_by_image")
            if self.method.reuses_attention and any(one is not None for one in (plan.mass, plan.mix, plan.count)):
                raise UserError("attention can be reduced by plain merges only, without mass, mix or count")
            if not torch.allclose(view.x, before, rtol=0, atol=0, equal_nan=True):
                raise UserError("the tokens in view.x are there to be looked at, and were changed")
        except UserError as error:
            raise UserError(f"the plan of '{self.method.name}' in block {view.block}: {error}") from error

    def log_size(self) -> Tensor | None:
        """log s for the attention logits, (B, N), where the method uses it and something has merged.

        −∞ shuts out what fills up images of fewer tokens, whatever the method.
        """
        state = self.state
        if state.size is None or not (self.method.proportional or state.count is not None):
            return None
        if state.log_size is None:
            state.log_size = (state.size if self.method.proportional else state.size.clamp_max(1)).log()
        return state.log_size

    def rope(self, table: Tensor | None) -> Tensor | None:
        """The rotary embedding of the patch tokens as they now are: each token's row of the model's own table.

        table: (T₀, D), or (H, T₀, D) where heads differ, or one of these for each image, all alike. As it is while
        nothing was reduced, after that one for each image: (B, 1, T, D) or (B, H, T, D).
        """
        if table is None or self.state.origin is None:
            return table
        table = table[0] if table.ndim == 4 else table
        rows = self.state.origin[:, self.prefix :] - self.prefix
        return table[rows].unsqueeze(1) if table.ndim == 2 else table[:, rows].transpose(0, 1)

    def rows_and_columns(self, bias: Tensor) -> Tensor:
        """The position bias of the tokens as they now are: each token's row and column of the model's own.

        bias: (H, N₀, N₀) or (1, H, N₀, N₀). As it is while nothing was reduced, after that one for each image:
        (B, H, N, N).
        """
        origin = self.state.origin
        if origin is None:
            return bias
        return bias.flatten(0, -3)[:, origin.unsqueeze(2), origin.unsqueeze(1)].transpose(0, 1)

    def view(
        self,
        x: Tensor,
        block: int,
        attention: Any,
        heads: Callable[[], tuple[Tensor, Tensor]],
        values: Callable[[], Tensor],
        rope: Tensor | None = None,
        bias: Callable[[], Tensor] | None = None,
    ) -> View:
        """What the method may look at: x (B, N, C), this block's queries, keys and values, the model's rope, and what
        gives the tokens' position bias."""
        rope = self.rope(rope)
        return View(
            x=x,
            prefix=self.prefix,
            patches=int(x.shape[1]) - self.prefix,
            block=block,
            depth=self.depth,
            heads=heads,
            values=values,
            rotate=None if rope is None else partial(rotate, attention, rope),
            bias=bias,
            scale=attention.scale,
            has_class_token=self.has_class_token,
            grid=self.grid,
            size=self.state.size,
            log_size=self.log_size(),
            token_map=self.state.token_map,
            begun=self.state.begun,
            nominal=(self.state.nominal or int(x.shape[1])) - self.prefix,
            padded=self.state.count is not None,
            kernels=kernels_for(x) if self.fused else None,
            fixed=torch.compiler.is_compiling() or (torch.jit.is_tracing() and not self.counted),
        )

    def reduce(self, view: View, r: int) -> tuple[Tensor, Attend | None]:
        """Plan and carry it out: tokens (B, M, C), and for methods that reuse A how to attend with it, reduced."""
        with in_own_precision(view.x.device.type):
            plan = self.plan(view, r)
            before = self.state.size
            reduced = self.state.carry_out(plan, view.x, self.method.tracks_size, view.kernels)
            if not self.method.reuses_attention:
                return reduced, None
            if not self.fused or torch.jit.is_tracing():  # FLOPs are those of the definition
                return reduced, partial(attend_reduced, view.attention(), plan, before)
            return reduced, partial(attend_merged, view.attention(), plan, before, kernels=view.kernels)

    def finish(self, r: int, tokens: int) -> None:
        """Note what a block left of the r tokens that were to go from it."""
        state = self.state
        state.tokens.append(tokens if state.count is None else state.count)
        if state.nominal is not None:
            state.nominal -= r
        if len(state.tokens) == self.depth:
            state.begun = None  # nothing is held on to until the next forward pass


def in_own_precision(device: str) -> AbstractContextManager[None]:
    """Where autocast does not meddle. Without autocast nothing, for an exported graph keeps what is entered."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()  # type: ignore[return-value]


class Tap:
    """A forward hook that keeps a module's last output."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.value = output

    def __getstate__(self) -> dict:
        return {"value": None}


def tapped(module: nn.Module) -> Tensor | None:
    """What last passed through a module, None where nothing did or no tap is; it is let go, so that no block holds on
    to its activations."""
    for hook in module._forward_hooks.values():
        if isinstance(hook, Tap):
            value, hook.value = hook.value, None
            return value
    return None


def tapped_modules(attention: Any, needs_values: bool) -> list[nn.Module]:
    """Where to listen in to a timm attention: queries, keys, and what values are part of."""
    joint = attention.v_proj if attention.qkv is None else getattr(attention, "joint", attention.qkv)
    return [attention.q_norm, attention.k_norm, *([joint] if needs_values else [])]


def rotate(attention: Any, rope: Tensor, x: Tensor) -> Tensor:
    """Queries or keys x (B, H, N, d) turned by their patches' rotary embedding, as timm does it; prefix tokens stay."""
    prefix = attention.num_prefix_tokens
    turned = apply_rot_embed_cat(x[:, :, prefix:], rope, half=attention.rotate_half)
    return torch.cat([x[:, :, :prefix], turned.to(x.dtype)], dim=2)


def queries_and_keys(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a timm attention scores by before any rotation, each (B, H, N, d), for the tokens x (B, N, C)."""
    if attention.qkv is None:
        queries, keys = _heads(attention, attention.q_proj(x)), _heads(attention, attention.k_proj(x))
    else:
        queries, keys = (_heads(attention, part) for part in _project(attention, x, slice(0, 2)).chunk(2, dim=-1))
    return attention.q_norm(queries), attention.k_norm(keys)


def attend_with(attention: Any, x: Tensor, attend: Attend) -> Tensor:
    """What a timm attention gives for the tokens x (B, N, C) when A is known: values only are new."""
    out = attention.norm(attend(project_values(attention, x)))
    if attention.gate is not None:
        out = out * attention.gate(x).sigmoid()
    return attention.proj_drop(attention.proj(out))


def project_values(attention: Any, x: Tensor) -> Tensor:
    """The values (B, H, N, d) of a timm attention for the tokens x (B, N, C)."""
    projected = attention.v_proj(x) if attention.qkv is None else _project(attention, x, slice(2, 3))
    return for_every_head(_heads(attention, projected), attention.num_heads)


def _project(attention: Any, x: Tensor, parts: slice) -> Tensor:
    """Some of the three parts of a joint qkv projection: (B, N, parts·H·d). Parts nobody asked for are not computed,
    unless the projection is more than a weight and a bias: then it is called, for only it knows what it does."""
    width = attention.num_heads * attention.head_dim
    rows = slice(parts.start * width, parts.stop * width)
    own = None
    if getattr(attention, "q_bias", None) is not None:  # EVA and BEiT keep a bias of their own, of zeros for the keys
        own = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])[rows]
    if is_plain(attention.qkv):
        bias = attention.qkv.bias[rows] if own is None and attention.qkv.bias is not None else own
        return F.linear(x, attention.qkv.weight[rows], bias)
    projected = attention.qkv(x)[..., rows]
    return projected if own is None else projected + own


def is_plain(projection: nn.Module) -> bool:
    """Whether a module does what its weight and its bias say, so that they may be used without calling it."""
    hooks = [
        hook
        for kind in ("forward_pre", "forward", "backward_pre", "backward")
        for hook in getattr(projection, f"_{kind}_hooks").values()
        # Those only write down where a trace is, or what passed.
        if not (type(hook).__module__.startswith("fvcore.") or isinstance(hook, Tap))
    ]
    own_weight = isinstance(projection, nn.Linear) and type(projection.weight) is nn.Parameter
    return type(projection) is nn.Linear and own_weight and "forward" not in vars(projection) and not hooks


def _heads(attention: Any, projected: Tensor) -> Tensor:
    """(B, N, H·d) → (B, H, N, d). Keys and values may have fewer heads than queries."""
    return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


class ReducedAttentionBase:
    """timm's attention, which can also be told how to attend. It is called for either: what is hooked onto it runs."""

    def forward(self, x: Tensor, *args: Any, attend: Attend | None = None, **options: Any) -> Tensor:
        if attend is not None:
            return attend_with(self, x, attend)
        return super().forward(x, *args, **options)  # type: ignore[misc]


class ReducedAttention(ReducedAttentionBase, Attention):
    """timm's usual attention."""


class ReducedAttentionRope(ReducedAttentionBase, AttentionRope):
    """timm's attention with rotary embeddings."""


class ReducedEvaAttention(ReducedAttentionBase, EvaAttention):  # type: ignore[misc]
    """EVA's attention."""


class ReducedBlockBase:
    """The part that reduced blocks share. `fusion` and `index` are set by patch.py."""

    fusion: Fusion
    index: int
    attn: Any

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("token fusion does not go with an attention mask; call tokbench.remove(model) first")
        fusion = self.fusion
        if self.index == 0:
            fusion.begin(x)
        r = fusion.to_remove(self.index, fusion.state.nominal or int(x.shape[1]))  # under tracing, shapes are tensors
        match fusion.method.place if r else "nowhere":
            case "start":
                x = self.reduce_first(x, r, rope)
            case "middle":
                x, _ = fusion.reduce(self.attended(x, rope), r)
                x = self.add_mlp(x)
            case "end":
                after = super().forward(x, **self.bias(x, rope))  # type: ignore[misc]
                x, _ = fusion.reduce(self.view_behind(x, after, rope), r)
            case _:
                x = super().forward(x, **self.bias(x, rope))  # type: ignore[misc]
        fusion.finish(r, int(x.shape[1]))
        for module in tapped_modules(self.attn, fusion.method.needs_values):
            tapped(module)
        return x

    def bias(self, x: Tensor, rope: Tensor | None) -> dict[str, Tensor | None]:
        """What timm's attention has to know about the tokens as they now are, by the names of its arguments.

        attn_mask: log s, (B, 1, 1, N), or None. rope: see `Fusion.rope`; absent where the model has none.
        """
        log_size = self.fusion.log_size()
        mask = None if log_size is None else log_size[:, None, None, :].to(x.dtype)
        return {"attn_mask": mask} if rope is None else {"attn_mask": mask, "rope": self.fusion.rope(rope)}

    def attended(self, x: Tensor, rope: Tensor | None) -> View:
        """A view of the tokens after this block's attention."""
        normed = self.before_attention(x)
        if not self.fusion.method.reshapes_attention:
            return self.view_behind(x, self.add_attention(x, self.attn(normed, **self.bias(x, rope))), rope)
        view = self.view_ahead(x, rope)
        with in_own_precision(x.device.type):
            view.attend_with(self.fusion.method.reshape_attention(view.attention()))
        view.x = self.add_attention(x, self.attn(normed, attend=partial(attend, view.attention())))
        return view

    def view_behind(self, before: Tensor, x: Tensor, rope: Tensor | None) -> View:
        """A view of tokens x (B, N, C) that came to this block as `before` and have been through its attention."""

        def heads() -> tuple[Tensor, Tensor]:
            return tapped(self.attn.q_norm), tapped(self.attn.k_norm)  # type: ignore[return-value]

        def values() -> Tensor:
            *_, joint = tapped_modules(self.attn, needs_values=True)
            if (passed := tapped(joint)) is None:  # EVA's with biases of its own is not called, but multiplied by
                return project_values(self.attn, self.before_attention(before))
            own = passed if self.attn.qkv is None else passed.chunk(3, dim=-1)[2]
            return for_every_head(_heads(self.attn, own), self.attn.num_heads)

        return self.view_of(x, heads, values, rope)

    def view_ahead(self, x: Tensor, rope: Tensor | None) -> View:
        """A view of tokens x (B, N, C) that this block's attention has not seen: it has to be computed for them."""

        def heads() -> tuple[Tensor, Tensor]:
            return queries_and_keys(self.attn, self.before_attention(x))

        def values() -> Tensor:
            return project_values(self.attn, self.before_attention(x))

        return self.view_of(x, heads, values, rope)

    def view_of(
        self, x: Tensor, heads: Callable[[], tuple[Tensor, Tensor]], values: Callable[[], Tensor], rope: Tensor | None
    ) -> View:
        return self.fusion.view(x, self.index, self.attn, heads, values, rope)

    def reduce_first(self, x: Tensor, r: int, rope: Tensor | None) -> Tensor:
        """Reduce before the attention, by this block's own attention on the tokens as they come."""
        x, reduced = self.fusion.reduce(self.view_ahead(x, rope), r)
        if reduced is None:
            return super().forward(x, **self.bias(x, rope))  # type: ignore[misc]
        return self.add_mlp(self.add_attention(x, self.attn(self.before_attention(x), attend=reduced)))

    def before_attention(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        raise NotImplementedError

    def add_mlp(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ReducedBlock(ReducedBlockBase, Block):
    """timm's pre-norm block."""

    def before_attention(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + self.drop_path1(self.ls1(attended))

    def add_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ReducedResPostBlock(ReducedBlockBase, ResPostBlock):
    """timm's post-norm block."""

    def before_attention(self, x: Tensor) -> Tensor:
        return x

    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + self.drop_path1(self.norm1(attended))

    def add_mlp(self, x: Tensor) -> Tensor:
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class ReducedEvaBlock(ReducedBlockBase, EvaBlock):  # type: ignore[misc]
    """timm's pre-norm EVA block: rotary embedding, SwiGLU, scaled branches."""

    def before_attention(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def add_attention(self, x: Tensor, attended: Tensor) -> Tensor:
        return x + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)

    def add_mlp(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma_2 is None else self.gamma_2 * out)


class ReducedEvaBlockPostNorm(ReducedBlockBase, EvaBlockPostNorm):  # type: ignore[misc]
    """timm's post-norm EVA block."""

    before_attention = ReducedResPostBlock.before_attention
    add_attention = ReducedResPostBlock.add_attention
    add_mlp = ReducedResPostBlock.add_mlp


REDUCED_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    Block: ReducedBlock,
    ResPostBlock: ReducedResPostBlock,
    EvaBlock: ReducedEvaBlock,
    EvaBlockPostNorm: ReducedEvaBlockPostNorm,
}
REDUCED_ATTENTIONS: dict[type[nn.Module], type[nn.Module]] = {
    Attention: ReducedAttention,
    AttentionRope: ReducedAttentionRope,
    EvaAttention: ReducedEvaAttention,
}
