"""Kernels in C for float32 tensors on the CPU. They are compiled when they are first asked for, and kept for later."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor

from tokbench.fusion.core import two_sets

LANGUAGE = "C"
DTYPES = {torch.float32}
SOURCE = Path(__file__).with_name("cpu.c")
FLAGS = [
    "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-strict-aliasing",
    # Sums may be taken in any order, so that they go in vectors; NaN and infinities are kept.
    "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno",
]  # fmt: skip
# Arguments. p: a pointer, n: a whole number of 64 bits, i: an int, f: a float.
_SIGNATURES = {
    "mean_heads": "pnnnnnnnp",
    "unit": "pnnnnnp",
    "best_proposals": "pnnnnnpppp",
    "by_energy": "pnnnnnfpppp",
    "softmax": "pnnnfpp",
    "criteria": "ppnnffpp",
    "join": "pnnnnnpnppnppipp",
}
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}


@lru_cache(maxsize=1)
def library() -> Any:
    """The compiled kernels, a ctypes.CDLL; None without a C compiler that knows torch's OpenMP, or a cache to write."""
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError):
        return None
    for name, letters in _SIGNATURES.items():
        getattr(loaded, name).argtypes = [_TYPES[letter] for letter in letters]
    return loaded


def _compiled() -> Path:
    """The library for this code on this kind of CPU, of which a shared home directory may see several."""
    # With torch's own OpenMP: the threads of a second one would fight with it for the cores.
    runtime = [str(one) for one in sorted(Path(torch.__file__).with_name("lib").glob("lib*omp*.so*"))]
    about = Path("/proc/cpuinfo")
    cpu = re.findall(r"^(?:model name|flags|Features)\s*:.*", about.read_text(), re.M) if about.exists() else []
    what = [SOURCE.read_text(), *FLAGS, *runtime, platform.machine(), *sorted(set(cpu))]
    path = user_cache_path("tokbench") / "kernels" / (hashlib.sha256("\n".join(what).encode()).hexdigest()[:20] + ".so")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            libraries = ["-Wl,--as-needed", *runtime, "-lm"]
            command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, str(SOURCE), "-o", str(made), *libraries]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
            made.replace(path)  # whole or not at all: other processes may be at it
    return path


def mean_heads(keys: Tensor) -> Tensor:
    """Mean over the heads of keys (B, H, N, d): (B, N, d)."""
    keys = dense(keys)
    out = keys.new_empty(keys.shape[0], *keys.shape[2:])
    library().mean_heads(keys.data_ptr(), *keys.shape, *keys.stride()[:3], out.data_ptr())
    return out


def unit(x: Tensor) -> Tensor:
    """Tokens (B, N, C) as vectors of length 1."""
    x, out = dense(x), x.new_empty(x.shape)
    library().unit(x.data_ptr(), *x.shape, *x.stride()[:2], out.data_ptr())
    return out


def match(metric: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `core.bipartite_match`."""
    a, b = two_sets(unit(metric), prefix)
    return best_proposals(torch.bmm(a, b.mT), prefix, r)


def best_proposals(
    scores: Tensor, prefix: int, r: int, back: int = 0, alone: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `core.best_proposals`; the scores (B, |A|, |B|) are overwritten.

    back: how many of the r tokens go the other way, from B to A, as in MCTF. alone: (B, N), factors of the scores,
    which are then (1 + cosine)/2.
    """
    batch, tokens = scores.shape[0], prefix + scores.shape[1] + scores.shape[2]
    scores, alone = scores.contiguous(), None if alone is None else alone.contiguous()
    plan = _empty_plan(scores, tokens, r)
    factors = None if alone is None else alone.data_ptr()
    library().best_proposals(scores.data_ptr(), batch, tokens, prefix, r - back, back, factors, *_pointers(plan))
    return plan


def by_energy(cosine: Tensor, prefix: int, r: int, matched: int, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `pitome.by_energy`."""
    cosine = cosine.contiguous()
    (batch, patches, _), plan = cosine.shape, _empty_plan(cosine, prefix + cosine.shape[1], r)
    room = cosine.new_empty(batch, (matched + 1) // 2, matched // 2)
    library().by_energy(cosine.data_ptr(), batch, patches, prefix, r, matched, margin, *_pointers([room, *plan]))
    return plan


def _empty_plan(like: Tensor, tokens: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    kept, source, slot = (like.new_empty(like.shape[0], one, dtype=torch.long) for one in (tokens - r, r, r))
    return kept, source, slot


def _pointers(tensors: Iterable[Tensor]) -> Iterable[int]:
    return (one.data_ptr() for one in tensors)


def softmax(logits: Tensor, scale: float, log_size: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(scale · logits + log s) of logits (B, H, N, N), which are overwritten, and its mean over heads and
    queries, (B, N)."""
    logits, log_size = logits.contiguous(), None if log_size is None else log_size.contiguous()
    received = logits.new_empty(logits.shape[:3])  # by each head
    bias = None if log_size is None else log_size.data_ptr()
    library().softmax(logits.data_ptr(), *received.shape, scale, bias, received.data_ptr())
    return logits, received.sum(1)


def criteria(received: Tensor, size: Tensor | None, tau_info: float, tau_size: float) -> tuple[Tensor, Tensor]:
    """As `mctf.criteria`."""
    received, size = received.contiguous(), None if size is None else size.contiguous()
    alone, weight = torch.empty_like(received), torch.empty_like(received)
    sizes = None if size is None else size.data_ptr()
    library().criteria(received.data_ptr(), sizes, *received.shape, tau_info, tau_size, *_pointers([alone, weight]))
    return alone, weight


def join(
    x: Tensor, kept: Tensor, source: Tensor, slot: Tensor, weight: Tensor, counted: Tensor, longest: bool
) -> tuple[Tensor, Tensor]:
    """Tokens x (B, N, C) merged by their weights (B, N), (B, M, C), and the sum of the numbers `counted` (B, N) in
    each, (B, M).

    longest: merged tokens get the length of their longest member ("mlerp"). Raises IndexError for a token that is not
    there.
    """
    x, *others = dense(x), *(one.contiguous() for one in (kept, source, slot, weight, counted))
    out, total = x.new_empty(*kept.shape, x.shape[2]), x.new_empty(kept.shape)
    at_kept, at_source, at_slot, *numbers = _pointers(others)
    if library().join(
        x.data_ptr(), *x.shape, *x.stride()[:2], at_kept, kept.shape[1], at_source, at_slot, source.shape[1], *numbers,
        longest, out.data_ptr(), total.data_ptr(),
    ):  # fmt: skip
        raise IndexError("the plan names a token that is not there")
    return out, total


def dense(x: Tensor) -> Tensor:
    """Channels side by side; the other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()
