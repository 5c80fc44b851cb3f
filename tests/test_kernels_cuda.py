"""The kernels in Triton beside the definitions of core.py: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import os
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
from forked import forked
from tiny_vits import vit
from torch import Tensor

import tokbench
from tokbench.fusion.core import Assignment, bipartite_match, merge

pytest.importorskip("triton", reason="needs Triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU, GPU = torch.device("cpu"), torch.device("cuda")

# Tokens, width, prefix, r: one token of A left and none, odd and even counts of it and of B, more than one program has.
MATCHES = [
    (4, 3, 1, 1), (5, 8, 0, 2), (5, 8, 0, 3), (7, 5, 5, 1), (8, 20, 3, 1), (9, 16, 4, 2), (13, 8, 1, 6), (14, 33, 2, 5),
    (133, 40, 1, 60),
]  # fmt: skip
# Tokens, outputs, sources, channels: the last has more sources than are looked through at once, for few tokens.
MERGES = [(3, 2, 1, 4), (9, 5, 4, 24), (13, 10, 0, 7), (40, 30, 9, 72), (170, 7, 150, 40)]


def random_plan(tokens: int, outputs: int, sources: int, generator: torch.Generator) -> Assignment:
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(2)])
    slot = torch.randint(outputs, (2, sources), generator=generator)
    return Assignment(order[:, :outputs], order[:, outputs : outputs + sources], slot)


def compare_means(kernels, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for heads, tokens, width in ((1, 3, 16), (3, 140, 20)):
        for dtype in DTYPES:
            qkv = torch.randn(2, tokens, 3, heads, width, generator=generator).to(device, dtype)
            keys = qkv.permute(2, 0, 3, 1, 4)[1]
            torch.testing.assert_close(kernels.mean_heads(keys), keys.mean(1, dtype=torch.float32))


def matched(kernels, metric: Tensor, prefix: int, r: int, device: torch.device) -> list[Tensor]:
    return [one.cpu() for one in kernels.match(metric.to(device), prefix, r)]


def compare_matches(kernels, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    for (tokens, width, prefix, r), dtype in zip(MATCHES, cycle(DTYPES), strict=False):
        metric = torch.randn(1 if tokens > 100 else 2, tokens, width, generator=generator).to(dtype)
        expected = bipartite_match(metric.double(), prefix, r)
        ours = matched(kernels, metric, prefix, r, device)
        assert all(map(torch.equal, ours, expected)), (tokens, width, prefix, r, dtype)


def compare_ties(kernels, device: torch.device) -> None:
    """Tokens along the axes, or none: their scores are just 1, 0 and −1."""
    generator = torch.Generator().manual_seed(2)
    axes = torch.cat([torch.eye(6), -2 * torch.eye(6), torch.zeros(1, 6)])
    for tokens, prefix, r in ((5, 0, 2), (24, 1, 5), (75, 2, 30)):
        metric = axes[torch.randint(len(axes), (2, tokens), generator=generator)]
        ours = matched(kernels, metric, prefix, r, device)
        assert all(map(torch.equal, ours, bipartite_match(metric, prefix, r))), (tokens, prefix, r)


def match_what_is_no_number(kernels, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    nan, infinity, large = -float("nan"), float("inf"), 1e30  # the sign is what 0 / 0 has on many machines
    for share, value in (
        (0.02, nan),
        (0.3, nan),
        (1, nan),
        (0.02, infinity),
        (0.3, -infinity),
        (0.3, large),
        (1, large),
    ):
        metric = torch.randn(2, 31, 7, generator=generator)
        metric[torch.rand(metric.shape, generator=generator) < share] = value
        kept, source, slot = ours = matched(kernels, metric, 1, 9, device)
        if value is nan:
            assert all(map(torch.equal, ours, bipartite_match(metric, 1, 9)))
        assert torch.equal(torch.cat([kept, source], 1).sort(1).values, torch.arange(31).expand(2, -1))
        assert (slot >= 22 - 15).all() and (slot < 22).all()  # B comes last, and has 15 tokens


def on(device: torch.device, plan: Assignment, combine: str) -> Assignment:
    kept, source, slot = (one.to(device) for one in (plan.kept, plan.source, plan.slot))
    return Assignment(kept, source, slot, combine=combine)


def compare_merges(kernels, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(4)
    choices = [(dtype, way) for dtype in DTYPES for way in ("mean", "mlerp")] * 2
    for number, shape in enumerate(MERGES):
        tokens, _, sources, channels = shape
        for dtype, way in choices[number :: len(MERGES)]:
            x = torch.randn(2, tokens, 2, channels, generator=generator).to(device, dtype)[:, :, 1]
            x[:, ::7] = float("nan") if sources == 0 else 0
            weight, counted = (torch.rand(2, 2, tokens, generator=generator) + 0.5).to(device)
            plan = on(device, random_plan(*shape[:3], generator), way)
            merged, total = kernels.join(x, plan.kept, plan.source, plan.slot, weight, counted, way == "mlerp")
            torch.testing.assert_close(total, plan.total(counted))
            expected = merge(x.double(), plan, weight.double()).to(dtype)
            rounding = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
            torch.testing.assert_close(merged, expected, rtol=rounding, atol=1e-5, equal_nan=True)
            alone = torch.ones_like(total).scatter(1, plan.slot, 0).bool()
            bits = torch.int32 if dtype == torch.float32 else torch.int16  # torch.gather has NaNs of its own
            kept = x.view(bits).gather(1, plan.kept.unsqueeze(-1).expand(-1, -1, channels))
            assert torch.equal(merged.view(bits)[alone], kept[alone])


def merge_opposites(kernels, device: torch.device) -> None:
    """Large ones in half precision: no step may leave its range."""
    x = torch.tensor([[[3e4, -6e4], [-3e4, 6e4], [6e4, 6e4], [6e4, -6e4]]], dtype=torch.float16, device=device)
    kept, source, slot = (torch.tensor([one], device=device) for one in ([0, 2], [1, 3], [0, 1]))
    ones = torch.ones(1, 4, device=device)
    merged, total = kernels.join(x, kept, source, slot, ones, ones, True)
    assert torch.equal(merged[0, 0], torch.zeros_like(merged[0, 0])) and total.tolist() == [[2, 2]]
    assert torch.equal(kernels.join(x, kept, source, slot, ones, ones, False)[0][0, 1], x.new_tensor([6e4, 0]))
    assert merged[0, 1, 1] == 0 and (merged[0, 1, 0] == float("inf"))  # 8.5e4 is beyond float16


def compare_models(kernels, device: torch.device) -> None:
    from tokbench.fusion import blocks

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)).to(device)
    for method in ("tome", "tofu", "ppt"):
        model = tokbench.apply(vit(depth=2).to(device), method, 5)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            answers = []
            for chosen in (None, kernels):
                patch.setattr(blocks, "kernels_for", lambda x, chosen=chosen: chosen)
                answers.append(model(images))
        torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)


def compare_all(device: torch.device) -> None:
    from tokbench.fusion.kernels import cuda

    for compare in (
        compare_means, compare_matches, compare_ties, match_what_is_no_number, compare_merges, merge_opposites,
    ):  # fmt: skip
        compare(cuda, device)


def _interpreted() -> None:
    """Triton has to be imported anew: what is decorated when it's imported is interpreted, or not, for good."""
    os.environ["TRITON_INTERPRET"] = "1"
    for name in list(sys.modules):
        if (
            name.split(".")[0] == "triton" and not name.startswith("triton._C")
        ) or name == "tokbench.fusion.kernels.cuda":
            del sys.modules[name]
    compare_all(CPU)


def test_kernels_give_what_the_definitions_do(tmp_path: Path) -> None:
    process = forked(_interpreted, tmp_path)
    process.join()
    assert process.exitcode == 0, (tmp_path / "err").read_text()


@pytest.mark.gpu
def test_kernels_give_what_the_definitions_do_on_a_gpu() -> None:
    compare_all(GPU)


@pytest.mark.gpu
def test_kernels_are_part_of_what_is_compiled() -> None:
    from tokbench.fusion.kernels import cuda

    def merged(keys: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return cuda.join(x, *cuda.match(cuda.mean_heads(keys), 1, 8), ones, ones, False)

    ones = torch.ones(2, 65, device=GPU)
    keys, x = torch.randn(2, 3, 65, 32, device=GPU), torch.randn(2, 65, 96, device=GPU)
    for one, other in zip(torch.compile(merged, fullgraph=True)(keys, x), merged(keys, x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_kernels_go_through_thousands_of_tokens() -> None:
    """Beside float64, for which scores are no ties that are none."""
    from tokbench.fusion.kernels import cuda

    metric = torch.randn(3, 5001, 80, generator=torch.Generator().manual_seed(0)).to(GPU)
    kept, source, slot = cuda.match(metric, 1, 700)
    unit = torch.nn.functional.normalize(metric.double(), dim=-1)
    best = (unit[:, 2::2] @ unit[:, 1::2].mT).max(-1)
    chosen = (unit.gather(1, wide(source, unit)) * unit.gather(1, wide(kept.gather(1, slot), unit))).sum(-1)
    torch.testing.assert_close(chosen, best.values.topk(700).values, rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([kept, source], 1).sort(1).values.cpu(), torch.arange(5001).expand(3, -1))


def wide(index: Tensor, x: Tensor) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, x.shape[-1])


class _Driver:
    """That of a GPU which isn't here."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


# Of a GPU, tokens and the metric: mean keys are float32 whatever they are the mean of.
COMPILED = [(90, torch.bfloat16, torch.float32)]
COMPILED += [pytest.param(gpu, dtype, dtype, marks=pytest.mark.slow) for gpu in (80, 90) for dtype in DTYPES]


@pytest.mark.parametrize(("capability", "dtype", "metric"), COMPILED)
def test_kernels_compile_for_gpus(
    capability: int, dtype: torch.dtype, metric: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from tokbench.fusion.kernels import cuda

    made = []

    def compile_only(kernel, grid):
        return lambda *args, **options: made.append(kernel.run(*args, grid=grid, warmup=True, **options))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", _Driver(capability))
    monkeypatch.setattr(JITFunction, "__getitem__", compile_only)
    x = torch.empty(2, 197, 384, dtype=dtype)
    cuda.mean_heads(x.unflatten(2, (6, 64)).transpose(1, 2))
    kept, source, slot = cuda.match(torch.empty(2, 197, 64, dtype=metric), 1, 13)
    weight = torch.empty(2, 197)
    for longest in (False, True):
        cuda.join(x, kept, source, slot, weight, weight, longest)
    assert len(made) == 5 and all(kernel.asm["cubin"] for kernel in made)
