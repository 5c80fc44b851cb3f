"""Which fused attention kernels a model really uses, in its dtype and on this machine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokbench.measure._model import evaluation_mode

_PREFIX = "aten::_scaled_dot_product_"


class _Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def attention_kernels(model: nn.Module, images: Tensor) -> list[str]:
    """The fused attention kernels that a forward pass on `images` (B, C, H, W) runs, sorted; [] if it runs none.

    The names are PyTorch's: `flash_attention`, `efficient_attention`, `cudnn_attention`, `flash_attention_for_cpu`. On
    CUDA a mask, as in proportional attention, rules out flash attention. The model must not be compiled.
    """
    # In inference mode, dispatch modes do not see which kernel is chosen.
    with torch.inference_mode(False), torch.no_grad(), evaluation_mode([model]), _Called() as called:
        model(images)
    return sorted(name.removeprefix(_PREFIX) for name in called.names if name.startswith(_PREFIX))
