"""Kernels for what merging methods do most. The definitions are in core.py; tests compare the two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tokbench.fusion.kernels import cpu


def kernel_for(name: str, *tensors: Tensor) -> Callable[..., Any] | None:
    """The kernel of that name for these tensors, None where the definition has to do: where there is no kernel, for
    gradients, to compile, export or trace a model, and to see its operations."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return None
    if is_in_torch_dispatch_mode() or any(type(one) is not Tensor for one in tensors):
        return None
    if all(one.device.type == "cpu" and one.dtype == torch.float32 for one in tensors) and cpu.library() is not None:
        return getattr(cpu, name, None)
    return None
