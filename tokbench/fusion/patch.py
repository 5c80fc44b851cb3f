"""Put a method into a timm model, and take it out again.

Classes are swapped, nothing else: no parameter moves and no name changes, so `state_dict`, deepcopy and pickle work
as before, and `remove` gives back timm's own model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.diff_attention import DiffAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from tokbench.errors import UserError
from tokbench.fusion.blocks import REDUCED_BLOCKS, Fusion, Tap, tapped_modules
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

    def _pos_embed(self, x: Tensor) -> Any:
        if self.grad_checkpointing:
            raise UserError(
                "gradient checkpointing runs blocks a second time, which token fusion cannot follow; "
                "call model.set_grad_checkpointing(False)"
            )
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
        size = self.fusion.state.size if self.fusion.method.pools_by_size else None
        pool_type = self.global_pool if pool_type is None else pool_type
        if size is None or (self.attn_pool is None and pool_type not in ("avg", "avgmax")):
            return super().pool(x, pool_type)  # type: ignore[misc]
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


REDUCED_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: ReducedVisionTransformer,
    VisionTransformerDistilled: ReducedDistilled,
    Eva: ReducedEva,
}
ORIGINAL = {reduced: timms for timms, reduced in (REDUCED_MODELS | REDUCED_BLOCKS).items()}
ATTENTIONS = (Attention, AttentionRope, EvaAttention)


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
        if ORIGINAL.get(type(block), type(block)) not in REDUCED_BLOCKS:
            raise UnsupportedModelError(
                f"block {number} is a {type(block).__name__}{_why(block)}; {works} built of {_either(REDUCED_BLOCKS)}"
            )
        if type(block.attn) not in ATTENTIONS:
            raise UnsupportedModelError(
                f"block {number} attends with {type(block.attn).__name__}{_why(block.attn)}; {works} that attend with "
                f"{_either(ATTENTIONS)}"
            )
    if model.attn_pool is not None and not isinstance(model.attn_pool, AttentionPoolLatent):
        raise UnsupportedModelError(
            f"the model pools with {type(model.attn_pool).__name__}, which cannot weight merged tokens by their size"
        )
    if model.attn_pool is not None and model.attn_pool.pos_embed is not None:
        raise UnsupportedModelError("the model's attention pooling has a position embedding for every patch")
    if model.patch_drop is not None and not isinstance(model.patch_drop, nn.Identity):
        raise UnsupportedModelError("the model drops patches itself (patch_drop_rate > 0); create it with 0")


def _why(part: nn.Module) -> str:
    if isinstance(part, NaFlexVit):
        return ", it is built to pack images of several sizes behind an attention mask, which fusion does not follow"
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
        grid=tuple(vit.patch_embed.grid_size),
        has_class_token=vit.cls_token is not None,
        rotary=getattr(vit, "rope", None) is not None,
        trace=trace,
    )
    vit.fusion = fusion
    vit.__class__ = REDUCED_MODELS[type(vit)]
    for index, block in enumerate(vit.blocks):
        block.fusion, block.index = fusion, index
        block.__class__ = REDUCED_BLOCKS[type(block)]
        for module in tapped_modules(block.attn, method.needs_values):
            module.register_forward_hook(Tap())
    return model


def remove(model: Model) -> Model:
    """Give back timm's own model, bit for bit; a model that holds no method is left as it is."""
    if type(model) not in ORIGINAL:
        return model
    vit: Any = model
    for block in vit.blocks:
        block.__class__ = ORIGINAL[type(block)]
        del block.fusion, block.index
        for module in tapped_modules(block.attn, needs_values=True):
            for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Tap)]:
                del module._forward_hooks[key]
    del vit.fusion
    vit.__class__ = ORIGINAL[type(vit)]
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

    Raises UserError if there was no forward pass.
    """
    return [sum(counts) / len(counts) if len(set(counts)) > 1 else counts[0] for counts in tokens_per_image(model)]


def tokens_per_image(model: Any) -> list[list[int]]:
    """Tokens after each block in the last forward pass, prefix included: for each block one number, or one an image.

    Raises UserError if there was no forward pass.
    """
    fusion = getattr(model, "fusion", None)
    if fusion is None:
        require_supported(model)
        return [[model.patch_embed.num_patches + model.num_prefix_tokens]] * len(model.blocks)
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
