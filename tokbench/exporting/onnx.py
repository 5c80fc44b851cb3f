"""What torch's ONNX exporter lacks, written with ONNX operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, INT32, ir, opset20

op: Any = opset20  # as typed, its operators would take no value whose type is only known when it is traced


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """By torch operator."""
    aten = torch.ops.aten
    return {
        aten.sort.stable: _stable_sort,
        aten.kthvalue.default: _kth_value,
        aten.scatter_add.default: _scatter_add,
    }


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
    values, indices = op.TopK(_wide(x), op.Constant(value_ints=[count]), axis=dim, largest=int(descending), sorted=1)
    return _as(x, values), indices


def _scatter_add(x: Any, dim: int, index: Any, source: Any) -> Any:
    return _as(x, op.ScatterElements(_wide(x), index, _wide(source), axis=dim, reduction="add"))


def _is_short(x: Any) -> bool:
    """Whether its numbers have fewer than four bytes: runtimes have neither TopK nor sums by index of these."""
    return x.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.INT32, ir.DataType.INT64)


def _wide(x: Any) -> Any:
    return op.Cast(x, to=(FLOAT if x.dtype.is_floating_point() else INT32).dtype) if _is_short(x) else x


def _as(x: Any, found: Any) -> Any:
    """In the type of `x`."""
    return op.Cast(found, to=x.dtype) if _is_short(x) else found
