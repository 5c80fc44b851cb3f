"""Put a method into a timm model, and take it out again.

Classes are swapped, nothing else: no parameter moves and no name changes, so `state_dict`, deepcopy and pickle work
as before, and `remove` gives back timm's own model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from math import prod
from typing import Any, TypeVar, cast

import torch
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.diff_attention import DiffAttention
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.beit import Block as BeitBlock
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, calculate_naflex_grid_sizes
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from tokbench.errors import UserError
from tokbench.fusion.anatomy import grid_for, has_class_token, is_fused, takes_any_size
from tokbench.fusion.beit import BORROWED, ReducedBeitAttention, ReducedBeitBlock
from tokbench.fusion.blocks import REDUCED_ATTENTIONS, REDUCED_BLOCKS, Fusion, Tap, is_plain, tapped_modules
from tokbench.fusion.core import Method
from tokbench.schedules import Schedule

Model = TypeVar("Model", bound=nn.Module)


class UnsupportedModelError(UserError):
    """A model that token fusion cannot go into; the message says what was found and what works."""


class _Reduced:
    """The part that reduced models share."""

    fusion: Fusion
    patch_embed: Any
    attn_pool: Any
    global_pool: Any
    num_prefix_tokens: int
    grad_checkpointing: bool
    pool_include_prefix: bool

    def require_no_checkpointing(self) -> None:
        """Raise UserError where blocks are run a second time."""
        if self.grad_checkpointing:
            raise UserError(
                "gradient checkpointing runs blocks a second time, which token fusion cannot follow; "
                "call model.set_grad_checkpointing(False)"
            )

    def _pos_embed(self, x: Tensor) -> Any:
        self.require_no_checkpointing()
        # Models with dynamic_img_size have their patches on the grid still: (B, rows, columns, C).
        rows, columns = x.shape[1:3] if x.ndim == 4 else self.patch_embed.grid_size
        self.fusion.grid = int(rows), int(columns)
        return super()._pos_embed(x)  # type: ignore[misc]

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """timm's, with (B, N, C) features of as many tokens as each block left; maps need `token_map`."""
        output_fmt = options.get("output_fmt", args[4] if len(args) > 4 else "NCHW")
        if output_fmt == "NCHW":
            raise UserError(
                "forward_intermediates: the tokens that fusion leaves fill no grid; ask for output_fmt='NLC' and place "
                "them with tokbench.token_map"
            )
        return super().forward_intermediates(x, *args, **options)  # type: ignore[misc]

    def get_intermediate_layers(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """Refused: its callers count on every patch's token."""
        raise UserError(
            "get_intermediate_layers: each block leaves fewer tokens; ask for "
            "forward_intermediates(…, output_fmt='NLC', intermediates_only=True) and place them with tokbench.token_map"
        )

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """timm's pooling that knows that a token may stand for several patches."""
        pooled = self.pool_by_size(x, self.global_pool if pool_type is None else pool_type)
        return super().pool(x, pool_type) if pooled is None else pooled  # type: ignore[misc]

    def pool_by_size(self, x: Tensor, pool_type: str) -> Tensor | None:
        """Tokens (B, N, C) as one, (B, C), by their sizes; None where these make no difference to timm's pooling."""
        size = self.fusion.state.size if self.fusion.method.pools_by_size else None
        if size is None or (self.attn_pool is None and pool_type not in ("avg", "avgmax")):
            return None
        if not self.pool_include_prefix:
            x, size = x[:, self.num_prefix_tokens :], size[:, self.num_prefix_tokens :]
        if self.attn_pool is not None:
            return self.attn_pool(x, attn_mask=size.log()[:, None, None, :].to(x.dtype))
        share = size / size.sum(1, keepdim=True)
        mean = (x * share.unsqueeze(-1).to(x.dtype)).sum(1)
        return mean if pool_type == "avg" else 0.5 * (x.amax(1) + mean)


class ReducedVisionTransformer(_Reduced, VisionTransformer):
    """A timm VisionTransformer with a method inside."""


class ReducedDistilled(_Reduced, VisionTransformerDistilled):
    """A timm VisionTransformerDistilled with a method inside; its heads read prefix tokens only."""


class ReducedEva(_Reduced, Eva):
    """A timm Eva with a method inside: EVA-02, DINOv3, Perception Encoder and others, most with rotary embeddings."""

    @property
    def pool_include_prefix(self) -> bool:  # type: ignore[override]
        return self.attn_pool is not None


class ReducedBeit(_Reduced, Beit):
    """A timm Beit with a method inside: attention with a bias for where tokens are."""

    attn_pool = None
    pool_include_prefix = False

    def forward_features(self, x: Tensor) -> Tensor:
        self.require_no_checkpointing()
        return super().forward_features(x)

    def forward_intermediates(self, x: Tensor, *args: Any, **options: Any) -> Any:
        """As `_Reduced` does it."""
        self.require_no_checkpointing()
        return super().forward_intermediates(x, *args, **options)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's, which takes the mean of the patch tokens: of one, where sizes already made one of all."""
        pooled = self.pool_by_size(x, self.global_pool)
        if pooled is not None:
            x = torch.cat([x[:, : self.num_prefix_tokens], pooled.unsqueeze(1)], dim=1)
        return super().forward_head(x, pre_logits)


class ReducedNaFlexVit(_Reduced, NaFlexVit):  # type: ignore[misc]
    """A timm NaFlexVit with a method inside, for batches of images of one size: their mask would say nothing."""

    def _forward_embeds(
        self, x: Tensor, patch_coord: Tensor | None, patch_valid: Tensor | None, attn_mask: Tensor | None
    ) -> Any:
        self.require_no_checkpointing()
        if patch_coord is None:
            self.fusion.grid = grid_for(self, (self.in_chans, *x.shape[-2:]))
        else:
            one_size = torch.equal(patch_coord, patch_coord[:1].expand_as(patch_coord))
            if not one_size or (patch_valid is not None and not patch_valid.all()):
                raise UserError(
                    "token fusion does not follow the mask of images of several sizes, or of padding; give each batch "
                    "images of one size, or call tokbench.remove(model) first"
                )
            self.fusion.grid = calculate_naflex_grid_sizes(patch_coord[:1])[0]
        return super()._forward_embeds(x, patch_coord, None, attn_mask)

    def _pool(self, x: Tensor, pool_type: str | None = None, patch_valid: Tensor | None = None) -> Tensor:
        pooled = self.pool_by_size(x, self.global_pool if pool_type is None else pool_type)
        return super()._pool(x, pool_type, patch_valid) if pooled is None else pooled


REDUCED_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: ReducedVisionTransformer,
    VisionTransformerDistilled: ReducedDistilled,
    Eva: ReducedEva,
    Beit: ReducedBeit,
    NaFlexVit: ReducedNaFlexVit,
}
BLOCKS = REDUCED_BLOCKS | {BeitBlock: ReducedBeitBlock}
ATTENTIONS = REDUCED_ATTENTIONS | {BeitAttention: ReducedBeitAttention}
ORIGINAL = {reduced: timms for timms, reduced in (REDUCED_MODELS | BLOCKS | ATTENTIONS).items()}


def require_supported(model: Any) -> None:
    """Raise UnsupportedModelError unless token fusion can go into this model."""
    kind = type(model)
    works = f"tokbench works with timm's {_either(REDUCED_MODELS)}"
    if ORIGINAL.get(kind, kind) not in REDUCED_MODELS:
        raise UnsupportedModelError(
            f"{kind.__name__} is not a plain ViT{_why(model)}; {works} "
            "(try 'deit_small_patch16_224' or 'vit_small_patch16_dinov3')"
        )
    for number, block in enumerate(model.blocks):
        if ORIGINAL.get(type(block), type(block)) not in BLOCKS:
            raise UnsupportedModelError(
                f"block {number} is a {type(block).__name__}{_why(block)}; {works} built of {_either(BLOCKS)}"
            )
        if ORIGINAL.get(type(block.attn), type(block.attn)) not in ATTENTIONS:
            raise UnsupportedModelError(
                f"block {number} attends with {type(block.attn).__name__}{_why(block.attn)}; {works} that attend with "
                f"{_either(ATTENTIONS)}"
            )
        _require_called(block.attn, number)
    pooling = getattr(model, "attn_pool", None)
    if pooling is not None and not isinstance(pooling, AttentionPoolLatent):
        raise UnsupportedModelError(
            f"the model pools with {type(pooling).__name__}, which cannot weight merged tokens by their size"
        )
    if pooling is not None and pooling.pos_embed is not None:
        raise UnsupportedModelError("the model's attention pooling has a position embedding for every patch")
    if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
        raise UnsupportedModelError("the model drops patches itself (patch_drop_rate > 0); create it with 0")


def _require_called(attention: Any, number: int) -> None:
    """Raise UnsupportedModelError where timm takes the weight of a qkv that is more than that, instead of calling it.

    EVA and BEiT do, with biases of their own. The unreduced model goes without a LoRA layer or a hook there, too.
    """
    if getattr(attention, "q_bias", None) is None or attention.qkv_bias_separate or is_plain(attention.qkv):
        return
    kind = type(attention.qkv)
    what = f"a {kind.__name__}" if kind is not nn.Linear else "a Linear with hooks"
    raise UnsupportedModelError(
        f"qkv in block {number} is {what}, which timm's {ORIGINAL.get(type(attention), type(attention)).__name__} does "
        "not call: it takes the weight alone; merge what was added into the weights"
    )


def _why(part: nn.Module) -> str:
    if isinstance(part, (ParallelScalingBlock, DiffParallelScalingBlock)):
        return ", which has no place between attention and MLP: they run side by side"
    if isinstance(part, ParallelThingsBlock):
        return ", which has no attention of its own to judge tokens by, but several side by side"
    if isinstance(part, DiffAttention):
        return ", the difference of two attentions, of which neither alone judges tokens"
    return ""


def _either(kinds: Iterable[type]) -> str:
    *others, last = (kind.__name__ for kind in kinds)
    return f"{', '.join(others)} or {last}"


def insert(model: Model, method: Method, schedule: Schedule, trace: bool = False) -> Model:
    """Put `method` into `model`, in place, replacing the one that is there. `schedule` must be resolved."""
    require_supported(model)
    vit: Any = remove(model)
    fusion = Fusion(
        method=method,
        schedule=schedule,
        depth=len(vit.blocks),
        prefix=vit.num_prefix_tokens,
        grid=(0, 0) if takes_any_size(vit) else grid_for(vit),  # until a forward pass tells
        has_class_token=has_class_token(vit),
        positional=getattr(vit, "rope", None) is not None or isinstance(vit, Beit),
        trace=trace,
        fused=is_fused(vit),
    )
    vit.fusion = fusion
    vit.__class__ = REDUCED_MODELS[type(vit)]
    for index, block in enumerate(vit.blocks):
        block.fusion, block.index = fusion, index
        block.__class__ = BLOCKS[type(block)]
        block.attn.__class__ = ATTENTIONS[type(block.attn)]
        if isinstance(block.attn, ReducedBeitAttention):
            block.attn.fusion = fusion
            for name in BORROWED:
                setattr(block.attn, name, nn.Identity())
        for module in tapped_modules(block.attn, method.needs_values):
            module.register_forward_hook(Tap())
    return model


def remove(model: Model) -> Model:
    """Give back timm's own model, bit for bit; a model that holds no method is left as it is."""
    vit: Any = model
    if type(model) in REDUCED_MODELS:
        _unhook(vit.blocks[0], Watch)
    if type(model) not in ORIGINAL:
        return model
    for block in vit.blocks:
        block.__class__ = ORIGINAL[type(block)]
        del block.fusion, block.index
        if isinstance(block.attn, ReducedBeitAttention):
            for name in ("fusion", *BORROWED):
                delattr(block.attn, name)
        else:
            for module in tapped_modules(block.attn, needs_values=True):
                _unhook(module, Tap)
        block.attn.__class__ = ORIGINAL[type(block.attn)]
    del vit.fusion
    vit.__class__ = ORIGINAL[type(vit)]
    return model


def _unhook(module: nn.Module, kind: type) -> None:
    for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, kind)]:
        del module._forward_hooks[key]


class Watch:
    """A forward hook on the first block of an unreduced model: how many tokens there were in the last forward pass."""

    tokens: int | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.tokens = int(output.shape[1])


def watch(model: Model) -> Model:
    """Let `tokens_per_block` see the forward passes of an unreduced model, where images may be of any size."""
    if takes_any_size(model):
        cast(Any, model).blocks[0].register_forward_hook(Watch())
    return model


def fork(model: Model) -> Model:
    """A second model on the same parameters and buffers: many cells, one copy of the weights in memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def rehearse(model: nn.Module, images: Tensor) -> None:
    """A forward pass in which every plan is checked before it is carried out. Raises UserError for one that cannot be.

    Wrong plans need not fail: a gather takes tokens twice, and on CUDA one index out of range ends the whole process.
    """
    fusion: Any = getattr(model, "fusion", None)
    if fusion is None:
        model(images)
        return
    fusion.checks = True
    try:
        model(images)
    finally:
        fusion.checks = False


def tokens_per_block(model: Any) -> list[int | float]:
    """Tokens after each block in the last forward pass, prefix included; their mean over the images, where they differ.

    Raises UserError as `tokens_per_image` does.
    """
    return [sum(counts) / len(counts) if len(set(counts)) > 1 else counts[0] for counts in tokens_per_image(model)]


def tokens_per_image(model: Any) -> list[list[int]]:
    """Tokens after each block in the last forward pass, prefix included: for each block one number, or one an image.

    Raises UserError if there was no forward pass. An unreduced model that takes images of one size only needs none; one
    that takes any size has to be applied to, with method "none".
    """
    fusion = getattr(model, "fusion", None)
    if fusion is None:
        require_supported(model)
        tokens = None
        if not takes_any_size(model):
            tokens = prod(grid_for(model)) + model.num_prefix_tokens
        for hook in model.blocks[0]._forward_hooks.values():
            tokens = hook.tokens if isinstance(hook, Watch) else tokens
        if tokens is None:
            raise UserError(
                "tokens_per_block: the model takes images of any size, and no forward pass has been seen since "
                "tokbench.apply(model, 'none')"
            )
        return [[tokens]] * len(model.blocks)
    if len(fusion.state.tokens) != fusion.depth:
        raise UserError("tokens_per_block: no forward pass has been run since the method was applied")
    return [one.tolist() if isinstance(one, Tensor) else [one] for one in fusion.state.tokens]


def token_map(model: nn.Module) -> Tensor:
    """Where each of the N first tokens (prefix included) ended in the last forward pass: (B, N) long, −1 dropped.

    Raises UserError unless the method was applied with trace=True and a forward pass has been run.
    """
    fusion: Any = getattr(model, "fusion", None)
    if fusion is None or not fusion.trace:
        raise UserError("token_map needs a model with a method in it: tokbench.apply(model, ..., trace=True)")
    if fusion.state.token_map is None:
        raise UserError("token_map: no forward pass has been run since the method was applied")
    return fusion.state.token_map.to(torch.long)
