"""What torch's ONNX exporter lacks, written with ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, INT32, ir, opset20

op: Any = opset20  # as typed, its operators would take no value whose type is only known when it is traced


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """By torch operator."""
    return {torch.ops.aten.sort.stable: _stable_sort, torch.ops.aten.kthvalue.default: _kth_value}


def _stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """Of equal values TopK promises the lower index first, whichever way it sorts."""
    return _first(x, x.shape[dim], dim, descending)


def _kth_value(x: Any, k: int, dim: int = -1, keepdim: bool = False) -> tuple[Any, Any]:
    axis = op.Constant(value_ints=[dim])
    last = op.Constant(value_ints=[k - 1])
    values, indices = (op.Gather(one, last, axis=dim) for one in _first(x, k, dim, descending=False))
    return (values, indices) if keepdim else (op.Squeeze(values, axis), op.Squeeze(indices, axis))


def _first(x: Any, count: int, dim: int, descending: bool) -> tuple[Any, Any]:
    """Values and indices of the `count` largest along a dimension, or smallest, in order."""
    # Runtimes have TopK of numbers of four and eight bytes only.
    short = x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64)
    wide = (FLOAT if x.dtype.is_floating_point() else INT32).dtype
    sorted_ = op.Cast(x, to=wide) if short else x
    values, indices = op.TopK(sorted_, op.Constant(value_ints=[count]), axis=dim, largest=int(descending), sorted=1)
    return (op.Cast(values, to=x.dtype) if short else values), indices
