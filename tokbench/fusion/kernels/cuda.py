"""Matching and merging of tokens on NVIDIA GPUs, in Triton: the same as core.py defines, in two launches and in one.

For float32, bfloat16 and float16, without gradients. Triton is not everywhere: import this module only where there are
CUDA tensors. With TRITON_INTERPRET=1 set before, it runs on the CPU, which is slow and for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokbench.fusion.core import first_of_sets
from tokbench.fusion.kernels.cpu import dense

LANGUAGE = "Triton"
DTYPES = {torch.float32, torch.bfloat16, torch.float16}
# Of the scores that one program computes at a time, and channels: with more, its registers do not suffice.
ROWS, COLUMNS, CHUNK = 16, 64, 32
TILE = 2048  # channels, of one token or several, that one program merges
FUSED = {"enable_fp_fusion": True}  # multiply and add as one; Triton warns where it has to choose


def mean_heads(keys: Tensor) -> Tensor:
    """`View.mean_keys`: keys (B, H, N, d) averaged over heads in float32, (B, N, d)."""
    keys = dense(keys)
    batch, heads, tokens, width = keys.shape
    out = torch.empty(batch, tokens, width, dtype=torch.float32, device=keys.device)
    padded = _power_of_two(width)
    step = max(1, TILE // padded)
    with _device_of(keys):
        _mean_heads[batch, triton.cdiv(tokens, step)](
            keys, out, tokens, width, *keys.stride()[:3], heads, step, padded, **FUSED
        )
    return out


def match(metric: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """`bipartite_match`: kept (B, N−r), source (B, r) and slot (B, r) for the tokens' metric (B, N, D), 1 ≤ r ≤ |A|.

    Half precision is nowhere rounded to: scores are those of the same numbers in float32.
    """
    metric = metric.contiguous()
    batch, tokens, width = metric.shape
    a, b = first_of_sets(prefix)
    rows = (tokens - a + 1) // 2
    proposals, kept, source, slot = (
        metric.new_empty(batch, length, dtype=torch.long) for length in (rows, tokens - r, r, r)
    )
    padded = _power_of_two(max(prefix, rows + 1))  # B may have one token more than A
    with _device_of(metric):
        grid = batch, triton.cdiv(rows, ROWS)
        _propose[grid](metric, proposals, tokens, width, a, b, ROWS, COLUMNS, CHUNK, **FUSED)
        step = max(1, 2 * TILE // padded)
        _settle[(batch,)](proposals, kept, source, slot, tokens, prefix, a, b, r, padded, step, **FUSED)
    return kept, source, slot


def join(
    x: Tensor, kept: Tensor, source: Tensor, slot: Tensor, weight: Tensor, counted: Tensor, longest: bool
) -> tuple[Tensor, Tensor]:
    """`merge` by mean, or by "mlerp" if `longest`, of tokens x (B, N, C) by their weights (B, N): (B, M, C), and
    `Assignment.total` of the numbers `counted` (B, N): (B, M). Weights and numbers are float32, whatever x is.

    What kept (B, M), source and slot (B, R) name has to be there: nothing looks whether it is.
    """
    x, *others = dense(x), *(one.contiguous() for one in (kept, source, slot, weight, counted))
    (batch, tokens, channels), outputs = x.shape, kept.shape[1]
    merged, total = x.new_empty(batch, outputs, channels), weight.new_empty(batch, outputs)
    padded = _power_of_two(channels)
    step = max(1, TILE // padded)
    sizes = tokens, outputs, source.shape[1], channels, x.stride(0), x.stride(1)
    with _device_of(x):
        grid = batch, triton.cdiv(outputs, step)
        _join[grid](x, *others, merged, total, *sizes, longest, step, 128, padded, **FUSED)
    return merged, total


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device. What torch.compile makes of this sees to that itself."""
    return nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(x)


def _power_of_two(number: int) -> int:
    """The least one that is not below it."""
    return 1 << (number - 1).bit_length()


# Programs are numbered by image, and by a piece of it. Counts of tokens change from block to block: specialized on
# them, kernels would be compiled anew for each that 16 divides.


@triton.jit(do_not_specialize=["tokens"])
def _mean_heads(
    keys, out, tokens, width, of_image, of_head, of_token,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)[:, None]
    channel = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens) & (channel < width)
    at = keys + image * of_image + token * of_token + channel
    mean = tl.zeros((TOKENS, WIDTH), tl.float32)
    for head in range(HEADS):
        mean += tl.load(at + head * of_head, mask=inside, other=0).to(tl.float32)
    tl.store(out + (image * tokens + token) * width + channel, tl.div_rn(mean, HEADS * 1.0), mask=inside)


@triton.jit
def _in_order(score):
    # Integers in the order of float32 scores. As for torch.max, NaN is above all.
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(score == score, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@triton.jit(do_not_specialize=["tokens", "a", "b"])
def _propose(
    metric, proposals, tokens, width, a, b,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # Of each token of A: the order of its best score above 32 bits, of which the largest is its first token of B.
    image = tl.program_id(0).to(tl.int64)
    rows, columns = (tokens - a + 1) // 2, (tokens - b + 1) // 2
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    metric += image * tokens * width
    best = tl.full((ROWS,), -0x8000000000000000, tl.int64)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        row_square, column_square = tl.zeros((ROWS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
        for first in range(0, width, CHUNK):
            channel = first + tl.arange(0, CHUNK)
            inside = channel < width
            left = tl.load(
                metric + (a + 2 * row)[:, None] * width + channel[None, :],
                mask=(row < rows)[:, None] & inside[None, :],
                other=0,
            ).to(tl.float32)
            right = tl.load(
                metric + (b + 2 * column)[None, :] * width + channel[:, None],
                mask=(column < columns)[None, :] & inside[:, None],
                other=0,
            ).to(tl.float32)
            product = tl.dot(left, right, product, input_precision="ieee")
            row_square += tl.sum(left * left, 1)
            column_square += tl.sum(right * right, 0)
        row_norm = tl.maximum(tl.sqrt_rn(row_square), 1e-12)
        column_norm = tl.maximum(tl.sqrt_rn(column_square), 1e-12)
        order = _in_order(tl.div_rn(product, row_norm[:, None] * column_norm[None, :])).to(tl.int64)
        packed = (order << 32) | (0x7FFFFFFF - column)[None, :]
        packed = tl.where((column < columns)[None, :], packed, -0x8000000000000000)
        best = tl.maximum(best, tl.max(packed, 1))
    tl.store(proposals + image * rows + row, best, mask=row < rows)


@triton.jit(do_not_specialize=["tokens", "prefix", "a", "b", "r"])
def _settle(
    proposals, kept, source, slot, tokens, prefix, a, b, r,
    LENGTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # A proposal's rank is how many are ahead of it, which makes a permutation of whatever they are.
    image = tl.program_id(0).to(tl.int64)
    rows, columns = (tokens - a + 1) // 2, (tokens - b + 1) // 2
    row = tl.arange(0, LENGTH)
    proposals += image * rows
    own = tl.load(proposals + row, mask=row < rows, other=0)
    order = (own >> 32).to(tl.int32)[:, None]
    rank = tl.zeros((LENGTH,), tl.int32)
    for start in range(0, rows, CHUNK):
        other = start + tl.arange(0, CHUNK)
        theirs = tl.load(proposals + other, mask=other < rows, other=-0x8000000000000000)
        theirs, other = (theirs >> 32).to(tl.int32)[None, :], other[None, :]
        ahead = (theirs > order) | ((theirs == order) & (other < row[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    goes, stays = (row < rows) & (rank < r), (row < rows) & (rank >= r)
    staying = prefix + rows - r
    tl.store(source + image * r + rank, a + 2 * row, mask=goes)
    tl.store(slot + image * r + rank, 0x7FFFFFFF - (own & 0x7FFFFFFF) + staying, mask=goes)
    kept += image * (tokens - r)
    tl.store(kept + row, row, mask=row < prefix)
    tl.store(kept + prefix + tl.cumsum(stays.to(tl.int32), 0) - 1, a + 2 * row, mask=stays)
    tl.store(kept + staying + row, b + 2 * row, mask=row < columns)


@triton.jit(do_not_specialize=["tokens", "outputs", "sources"])
def _join(
    x, kept, source, slot, weight, counted, merged, total, tokens, outputs, sources, channels, of_image, of_token,
    LONGEST: tl.constexpr, OUTPUTS: tl.constexpr, SOURCES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < outputs
    channel = tl.arange(0, CHANNELS)[None, :]
    x += image * of_image
    source += image * sources
    slot += image * sources
    token = tl.load(kept + image * outputs + output, mask=inside, other=0)
    there = inside[:, None] & (channel < channels)
    own = tl.load(x + token[:, None] * of_token + channel, mask=there, other=0)
    before = own.to(tl.float32)
    moved = tl.zeros((OUTPUTS, CHANNELS), tl.float32)
    square = tl.sum(before * before, 1)
    weight += image * tokens
    counted += image * tokens
    mass = tl.load(weight + token, mask=inside, other=1)
    sum_of_counted = tl.load(counted + token, mask=inside, other=1)
    joined = tl.full((OUTPUTS,), 0, tl.int1)
    for start in range(0, sources, SOURCES):
        number = start + tl.arange(0, SOURCES)
        to = tl.load(slot + number, mask=number < sources, other=-1)
        waiting = to[None, :] == output[:, None]
        # Each round takes every output token's next source, so that it adds them in their order.
        for _ in range(tl.max(tl.sum(waiting.to(tl.int32), 1), 0)):
            following = tl.min(tl.where(waiting, number[None, :], sources), 1)
            waiting = waiting & (number[None, :] > following[:, None])
            comes = following < sources
            token = tl.load(source + following, mask=comes, other=0)
            there = comes[:, None] & (channel < channels)
            row = tl.load(x + token[:, None] * of_token + channel, mask=there, other=0).to(tl.float32)
            share = tl.load(weight + token, mask=comes, other=0)
            moved += (row - before) * share[:, None]
            mass += share
            sum_of_counted += tl.load(counted + token, mask=comes, other=0)
            joined = joined | comes
            if LONGEST:
                square = tl.maximum(square, tl.sum(row * row, 1))
    after = before + tl.div_rn(moved, mass[:, None])
    if LONGEST:
        # Two steps, of which neither leaves float32's range; tokens that cancel out stay 0, for they have no direction.
        length = tl.maximum(tl.sqrt_rn(tl.sum(after * after, 1)), 1.1754943508222875e-38)
        after = tl.div_rn(after, length[:, None]) * tl.sqrt_rn(square)[:, None]
    there = inside[:, None] & (channel < channels)
    at = merged + (image * outputs + output)[:, None] * channels + channel
    tl.store(at, tl.where(joined[:, None], after.to(own.dtype), own), mask=there)
    tl.store(total + image * outputs + output, sum_of_counted, mask=inside)
