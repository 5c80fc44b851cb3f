"""Kernels for what merging methods do most. The definitions are in core.py; tests compare the two."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from tokbench.fusion.kernels import cpu


def kernels_for(x: Tensor) -> ModuleType | None:
    """The kernels on the device of tokens x. None where definitions have to do: for gradients, to compile, export or
    trace a model, to see its operations, and where there are no kernels."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
        return None
    if is_in_torch_dispatch_mode() or type(x) is not Tensor:
        return None
    return _kernels_of(x.device)


def kernels_on(device: torch.device) -> str | None:
    """What the kernels for a device are written in, "C" or "Triton"; None where it has none."""
    kernels = _kernels_of(device)
    return None if kernels is None else kernels.LANGUAGE


@cache
def _kernels_of(device: torch.device) -> ModuleType | None:
    if device.type == "cpu":
        return cpu if cpu.library() is not None else None
    if device.type != "cuda" or torch.version.hip or not find_spec("triton"):
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):  # they were never compiled for older ones
        return None
    from tokbench.fusion.kernels import cuda

    return cuda
