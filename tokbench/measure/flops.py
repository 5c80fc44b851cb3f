"""Multiply-adds of a model, counted operator by operator on a trace of one forward pass.

The convention is fvcore's, which the token-fusion papers use: one multiply-add is one FLOP, matrix products
and convolutions count in full, a layer norm counts 5 per element; biases, activations, softmax, sorting,
gathering and other elementwise work are free. Fused attention counts as its two matrix products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from tokbench.fusion.patch import fork
from tokbench.measure._model import placement, resolve_input_size

Handler = Callable[[list[Any], list[Any]], int]

# Elementwise work counts as free, as in the papers: a ViT's matrix products cost a hundred times as much. Any other
# operator that is neither counted nor ignored by fvcore (which ignores shape and copy operators) is reported in
# FlopCount.unsupported.
_ARITHMETIC = """
    add add_ sub sub_ rsub mul mul_ div div_ neg abs reciprocal sqrt rsqrt square pow exp log log1p log2 expm1
    sign floor ceil round clamp clamp_min clamp_min_ clamp_max maximum minimum where lerp addcmul addcdiv
    sin cos erf fill_ zero_ masked_fill_ nan_to_num isnan isfinite
"""
_ACTIVATIONS = """
    gelu gelu_ silu silu_ relu6 elu elu_ leaky_relu mish hardswish hardsigmoid softplus sigmoid sigmoid_ tanh
    tanh_ softmax _softmax log_softmax
"""
_REDUCTIONS = """
    sum mean var std norm linalg_norm linalg_vector_norm frobenius_norm amax amin max min argmax argmin
    logsumexp cumsum median any all
"""
_COMPARISONS = """
    lt le gt ge eq ne __or__ __xor__ logical_and logical_or logical_not logical_xor bitwise_and bitwise_or
    is_nonzero isin
"""
_MOVEMENT = """
    sort argsort topk kthvalue searchsorted bucketize index_select take_along_dim gather scatter scatter_
    scatter_add scatter_add_ scatter_reduce scatter_reduce_ index_add index_add_ index_copy index_copy_
    index_fill index_fill_ index_put index_reduce index_reduce_ masked_select masked_scatter repeat
    repeat_interleave tile flip expand_as view_as reshape_as swapaxes swapdims movedim mT numpy_T
    eye unflatten ravel concat concatenate hstack vstack broadcast_to clone alias tril triu tril_ triu_
    diagonal tensor_split unfold im2col pad one_hot embedding meshgrid linspace new_ones new_tensor ones_like
    empty_like rand rand_like randn randn_like randperm scalar_tensor lift_fresh avg_pool2d max_pool2d
"""
FREE_OPERATORS = frozenset(
    f"aten::{name}" for name in (_ARITHMETIC + _ACTIVATIONS + _REDUCTIONS + _COMPARISONS + _MOVEMENT).split()
)


@dataclass(frozen=True)
class FlopCount:
    """Multiply-adds of one forward pass on one image; where several were counted, their means.

    `total` is the whole model's, and `spread` its standard deviation over the images. `by_module` maps the dotted name
    of every submodule ("" is the model) to its count, children included; `by_operator` does so for operators.
    `unsupported` maps operators that may cost multiply-adds but cannot be counted to their number of calls: unless it
    is empty, `total` is too low.
    """

    total: int
    by_module: dict[str, int]
    by_operator: dict[str, int]
    unsupported: dict[str, int]
    spread: float = 0.0


def count_flops(
    model: nn.Module, input_size: int | Sequence[int] | None = None, *, images: Tensor | None = None
) -> FlopCount:
    """Count the multiply-adds of `model` on one image, in eval mode, on the model's own device and dtype.

    images: (B, C, H, W), each counted alone, for models whose work depends on the image; None: a random one.

    `input_size` is the side of a square image, or (C, H, W), or None for the size the model was built for; raises
    ValueError if that is unknown. The model is neither run nor changed: a copy that shares its parameters and buffers
    is traced. A compiled model counts as its eager original.
    """
    # On a copy: a module may store traced sizes, and fvcore leaves its hooks in place if the forward pass raises.
    twin: Any = fork(_eager(model)).eval()
    if hasattr(twin, "fusion"):
        twin.fusion.counted = True
    device, dtype = placement(twin)
    if images is None:
        # Random, because identical tokens could make a method divide by zero.
        size = resolve_input_size(_eager(model), input_size)
        images = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer that fvcore uses is deprecated; torch warns at import and at every trace.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return _mean([_analyze(twin, image) for image in images.to(device, dtype).split(1)])


def _mean(counts: list[FlopCount]) -> FlopCount:
    def each(parts: list[dict[str, int]]) -> dict[str, int]:
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: round(fmean(part.get(name, 0) for part in parts)) for name in names}

    totals = [count.total for count in counts]
    return FlopCount(
        total=round(fmean(totals)),
        by_module=each([count.by_module for count in counts]),
        by_operator=each([count.by_operator for count in counts]),
        unsupported=each([count.unsupported for count in counts]),
        spread=stdev(totals) if len(totals) > 1 else 0.0,
    )


def _analyze(model: nn.Module, image: torch.Tensor) -> FlopCount:
    from fvcore.nn import FlopCountAnalysis  # slow to import

    analysis = FlopCountAnalysis(model, image)
    analysis.set_op_handle(**dict.fromkeys(FREE_OPERATORS), **_handlers())
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    return FlopCount(
        total=int(analysis.total()),
        by_module={name: int(count) for name, count in analysis.by_module().items()},
        by_operator={name: int(count) for name, count in analysis.by_operator().items()},
        unsupported=dict(analysis.unsupported_ops()),
    )


def _eager(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _handlers() -> dict[str, Handler]:
    from fvcore.nn.jit_handles import norm_flop_counter

    return {
        # fvcore's own matmul uses only the first operand's batch dimensions, and needs two matrices.
        **_each("matmul mm bmm mv dot vdot", _matmul),
        **_each("addmm addmm_ baddbmm baddbmm_ addbmm addmv", _added_matmul),
        **_each("inner", _inner),
        **_each("outer ger", _outer),
        # fvcore's own einsum rounds to four digits.
        **_each("einsum", _einsum),
        **_each("rms_norm", norm_flop_counter(2)),
        **_each("scaled_dot_product_attention _scaled_dot_product_attention_math", _attention),
        **_each("_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention", _attention),
        **_each("_scaled_dot_product_cudnn_attention", _attention),
        **_each("_scaled_dot_product_flash_attention_for_cpu", _attention),
    }


def _each(names: str, handler: Handler) -> dict[str, Handler]:
    return {f"aten::{name}": handler for name in names.split()}


def _shape(value: Any) -> list[int]:
    if not value.isCompleteTensor():
        raise ValueError(f"the trace does not know the shape of {value.debugName()}")
    return list(value.type().sizes())


def _broadcast(*shapes: Sequence[int]) -> list[int]:
    """The common shape. Taking the larger size also gives grouped-query attention the number of query heads."""
    length = max(len(shape) for shape in shapes)
    padded = [[1] * (length - len(shape)) + list(shape) for shape in shapes]
    return [max(sizes) for sizes in zip(*padded, strict=True)]


def _product(left: list[int], right: list[int]) -> int:
    left = left if len(left) > 1 else [1, *left]
    right = right if len(right) > 1 else [*right, 1]
    return prod(_broadcast(left[:-2], right[:-2])) * left[-2] * left[-1] * right[-1]


def _matmul(inputs: list[Any], outputs: list[Any]) -> int:
    return _product(_shape(inputs[0]), _shape(inputs[1]))


def _added_matmul(inputs: list[Any], outputs: list[Any]) -> int:
    return _product(_shape(inputs[1]), _shape(inputs[2]))


def _inner(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_shape(outputs[0])) * (_shape(inputs[0]) or [1])[-1]


def _outer(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_shape(outputs[0]))


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    query, key, value = (_shape(item) for item in inputs[:3])
    batch = prod(_broadcast(query[:-2], key[:-2], value[:-2]))
    return batch * query[-2] * key[-2] * (query[-1] + value[-1])


def _einsum(inputs: list[Any], outputs: list[Any]) -> int:
    shapes = [_shape(item) for item in inputs[1].node().inputs()]
    return einsum_flops(inputs[0].toIValue(), shapes)


def einsum_flops(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """Multiply-adds of an einsum that contracts its operands in pairs from the left (0 for one operand).

    A pair costs the product of the sizes of all its indices. An ellipsis stands for leading batch dimensions.
    """
    terms, result = _einsum_terms(equation, [len(shape) for shape in shapes])
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        for index, size in zip(term, shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    total, kept = 0, set(terms[0])
    for position, term in enumerate(terms[1:], start=2):
        union = kept | set(term)
        total += prod(sizes[index] for index in union)
        kept = union & set(result).union(*terms[position:])
    return total


def _einsum_terms(equation: str, dims: list[int]) -> tuple[list[list[str]], list[str]]:
    """Index names per operand and of the result; an ellipsis becomes …, "-2", "-1", aligned at its right."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = []
    widest = 0
    for text, dim in zip(left.split(","), dims, strict=True):
        width = dim - len(text.replace("...", ""))
        widest = max(widest, width)
        terms.append(_expand_ellipsis(text, width))
    if arrow:
        return terms, _expand_ellipsis(right, widest)
    letters = [index for term in terms for index in term]
    return terms, [index for index in letters if index.startswith("-") or letters.count(index) == 1]


def _expand_ellipsis(text: str, width: int) -> list[str]:
    before, dots, after = text.partition("...")
    batch = [str(-place) for place in range(width, 0, -1)] if dots else []
    return [*before, *batch, *after]
