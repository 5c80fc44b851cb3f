"""What every measurement needs from a model: input size, device, dtype and evaluation mode."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the model's first floating-point parameter; CPU and float32 if it has none."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def resolve_input_size(model: nn.Module, input_size: int | Sequence[int] | None) -> tuple[int, int, int]:
    """(C, H, W) of one image.

    `input_size` is the side of a square image, or (C, H, W), or None: what the model was built for, as a timm model
    says where the image enters, or else its pretrained configuration. Raises ValueError when it cannot be told.
    """
    if isinstance(input_size, int):
        size: tuple[int, ...] = (_built_for(model)[0], input_size, input_size)
    else:
        size = _built_for(model) if input_size is None else tuple(input_size)
    if len(size) != 3 or any(side < 1 for side in size):
        raise ValueError(f"input_size must be the side of a square image or (C, H, W), not {input_size!r}")
    return size[0], size[1], size[2]


def _built_for(model: nn.Module) -> tuple[int, ...]:
    # Where the image enters says more than the published configuration, which a model built for another size keeps,
    # and more than inner layers: the projection of a hybrid takes the channels of its CNN's features.
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    published = tuple(config.get("input_size", ()))
    sides = getattr(getattr(model, "patch_embed", None), "img_size", None)
    sides = sides or getattr(model, "_traits", {}).get("img_size") or published[1:]
    channels = getattr(model, "in_chans", None) or (published[0] if published else None)
    if not sides or channels is None:
        raise ValueError(f"cannot tell the input size of a {type(model).__name__}: pass input_size=(C, H, W)")
    return channels, *sides


@contextmanager
def evaluation_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put all models in eval mode inside the block, then restore every submodule's own flag."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


# Libraries without memory for a handle or workspace report that they are not initialized or find no algorithm.
_OUT_OF_MEMORY = re.compile(
    "can't allocate memory|out of memory|CU(BLAS|DNN|SOLVER|FFT)_(STATUS_)?ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|"
    "unable to find an engine|Unable to find a valid cuDNN algorithm"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help. CPU, MPS and some libraries raise a RuntimeError, known only by its message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def release_memory(device: torch.device) -> None:
    """Return PyTorch's cached accelerator memory, which may be too fragmented to reuse."""
    # An exception and a frame that holds it form a cycle, which keeps alive the tensors that did not fit.
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()
