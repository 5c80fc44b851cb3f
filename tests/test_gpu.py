"""What only a GPU can tell: `pytest -m gpu -n 0` on a machine with one is the verdict on what CUDA does differently.

Each test is skipped with its reason where there is none. Nothing here asserts how fast a GPU is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from stand_ins import Listener, plain_records, small_grid, tiny_model
from tiny_vits import eva, vit
from torch import Tensor, nn

import tokbench
from tokbench.config import MethodSpec, ModelSpec, RunOptions
from tokbench.data.labels import without_labels
from tokbench.data.preparing import preparation
from tokbench.exporting.runtimes import RUNTIMES
from tokbench.exporting.writing import in_runtime
from tokbench.measure import accuracy, environment, speed
from tokbench.measure.accuracy import evaluate
from tokbench.measure.compiled import compile_model
from tokbench.measure.environment import Watch, describe_machine, gpu_state
from tokbench.measure.kernels import attention_kernels
from tokbench.measure.speed import largest_batch, measure_memory, measure_speed
from tokbench.results.predictions import ARRAYS
from tokbench.running import runner, timing

pytestmark = pytest.mark.gpu

METHODS = [name for name in tokbench.list_methods() if name != "none"]
GPU = torch.device("cuda")
MIB = 2**20


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(GPU)


@contextmanager
def room_for(mebibytes: int):
    """PyTorch gets so much of the GPU's memory beyond what it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(GPU) + mebibytes * MIB) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


class Sleeping(nn.Module):
    """Keeps the GPU busy for a number of its clock cycles; the host goes on at once."""

    def __init__(self, cycles: int, device: torch.device = GPU) -> None:
        super().__init__()
        self.weight, self.cycles = nn.Parameter(torch.zeros(1, device=device)), cycles

    def forward(self, images: Tensor) -> Tensor:
        torch.cuda._sleep(self.cycles)
        return images


class Hungry(nn.Module):
    """Takes a mebibyte for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device=GPU))

    def forward(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images) * MIB // 4, device=images.device).view(len(images), -1)[:, :10].clone()


# Timing


@pytest.mark.parametrize("build", [vit, eva])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_makes_the_host_wait_for_the_gpu(method, build, images):
    model = tokbench.apply(build().to(GPU), method, 9)
    with torch.inference_mode():
        model(images)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(images)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_events_and_the_hosts_clock_agree_where_the_gpu_is_what_takes_time():
    model, image = Sleeping(20_000_000), torch.zeros(1, device=GPU)
    speed._seconds(model, image, 3)
    on_the_gpu, on_the_host = speed._cuda_seconds(model, image, 5), speed._host_seconds(model, image, 5)
    assert on_the_host == pytest.approx(on_the_gpu, rel=0.1)


def test_times_are_right_on_a_stream_of_ones_own():
    models = {"long": Sleeping(20_000_000), "short": Sleeping(10_000_000)}
    with torch.cuda.stream(torch.cuda.Stream()):
        result = measure_speed(models, batch_size=1, input_size=(1, 2, 2), rounds=5, seconds=0.5)[1]
    assert result.speedup == pytest.approx(2, rel=0.2)


def test_times_are_right_on_a_gpu_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA GPUs; there is one here")
    second = torch.device("cuda:1")
    models = {"long": Sleeping(20_000_000, second), "short": Sleeping(10_000_000, second)}
    results = measure_speed(models, batch_size=1, input_size=(1, 2, 2), rounds=5, seconds=0.5, latency_of=("long",))
    assert torch.cuda.current_device() == 0
    assert results[1].speedup == pytest.approx(2, rel=0.2) and min(results[0].latency) > 0
    memory = measure_memory(vit().to(second), batch_size=8, input_size=(3, 32, 32))
    assert memory is not None and memory[0] > 0
    assert state_of(second)["clock_max_mhz"] > 0


def test_latency_waits_for_the_answer():
    result = measure_speed(
        {"none": Sleeping(20_000_000)}, batch_size=1, input_size=(1, 2, 2), rounds=5, seconds=0.5, latency_of=("none",)
    )[0]
    # A pass that is not waited for takes microseconds.
    assert min(result.latency) == pytest.approx(min(result.rounds), rel=0.2)


# Memory


def test_peak_memory_is_of_the_pass_and_counts_the_batch():
    model = Hungry()
    small, large = (measure_memory(model, batch_size=n, input_size=(1, 2, 2)) for n in (1, 65))
    assert small is not None and large is not None
    assert large[0] - small[0] == pytest.approx(64 * MIB, rel=0.05)
    assert large[0] <= large[1]
    again = measure_memory(model, batch_size=1, input_size=(1, 2, 2))  # what was larger before does not count
    assert again is not None and again[0] == pytest.approx(small[0], abs=MIB)
    assert again[1] == pytest.approx(small[1], abs=20 * MIB)


def test_the_largest_batch_is_found_and_all_memory_is_given_back():
    model = Hungry()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with room_for(100):
        assert largest_batch([model], input_size=(1, 2, 2)) in (32, 64)
        assert torch.cuda.memory_allocated() == before
        assert largest_batch([model], input_size=(1, 2, 2), most=4) == 4


def test_too_large_a_batch_is_shown_in_pieces():
    model = Hungry()
    shown = [(torch.zeros(256, 1, 2, 2), torch.zeros(256).long())]
    sizes: dict[str, int] = {}
    with room_for(100):
        answers = evaluate({"none": model}, shown, device=GPU, batch_sizes=sizes)["none"]
    assert len(answers.label) == 256 and sizes["none"] in (32, 64)


def test_a_run_halves_batches_until_they_fit(source, tmp_path):
    options = RunOptions(device="cuda", batch_size=2**16, only=("flops", "speed"))
    with room_for(600):
        table = runner.run(small_grid(MethodSpec("tome", ("8",))), tmp_path / "run", options=options)
    assert table["error"].isna().all() and table["throughput"].notna().all()
    assert table["batch_size"].nunique() == 1 and 1 <= table["batch_size"].iloc[0] < 2**16


def test_the_batch_is_chosen_to_fit_every_cell(source, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "LARGEST_BATCH", 2**16)
    options = RunOptions(device="cuda", only=("flops", "speed"))
    with room_for(600):
        table = runner.run(small_grid(MethodSpec("tome", ("8",))), tmp_path / "run", options=options)
    size = table["batch_size"].unique().item()
    assert table["error"].isna().all() and 1 < size < 2**16 and size & (size - 1) == 0


def test_a_model_takes_as_much_memory_after_another_as_alone(source, tmp_path, monkeypatch):
    def heavy(*_: object, **__: object) -> nn.Module:
        model = tiny_model()
        model.ballast = nn.Parameter(torch.zeros(64 * MIB // 4))
        return model

    monkeypatch.setattr(runner, "load_model", heavy)
    options = RunOptions(device="cuda", batch_size=8, only=("flops", "speed"))
    models = (ModelSpec("tiny"), ModelSpec("tiny", label="again"))
    grid = small_grid(MethodSpec("tome", ("8",)), models=models)
    table = runner.run(grid, tmp_path / "run", options=options).set_index("cell")
    for cell in ("none", "tome/8"):
        first, second = (table.loc[f"{model}/{cell}", "memory_mib"] for model in ("tiny", "again"))
        assert first > 64 and second == pytest.approx(first, abs=4)


# Answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_unreduced_model_answers_alike_twice(dtype, images):
    model = vit().to(GPU, dtype)
    shown = [(images.cpu(), torch.zeros(8).long())]
    first, second = (evaluate({"none": model}, shown, device=GPU, dtype=dtype)["none"] for _ in range(2))
    assert all((getattr(first, name) == getattr(second, name)).all() for name in ARRAYS if name != "similarity")


@pytest.mark.parametrize("method", METHODS)
def test_a_reduced_model_answers_nearly_alike_twice(method, images):
    """Not bit for bit: where several tokens merge into one, CUDA adds them in the order in which threads arrive."""
    model = tokbench.apply(vit().to(GPU), method, 9)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), model(images), rtol=1e-4, atol=1e-4)


def test_bytes_become_the_same_floats_as_on_the_cpu():
    prepare = preparation(vit(), without_labels(vit()))
    pixels = torch.arange(256, dtype=torch.uint8).repeat(12).reshape(1, 32, 32, 3)
    assert torch.equal(prepare.floats(pixels.to(GPU)).cpu(), prepare.floats(pixels))


def test_no_batch_of_a_pass_over_images_makes_the_host_wait_for_what_it_gave(images, monkeypatch):
    monkeypatch.setattr(accuracy, "FETCH_SECONDS", 1e9)
    models = {"none": vit().to(GPU), "topk": tokbench.apply(vit().to(GPU), "topk", 9)}
    batch = images.cpu().pin_memory(), torch.zeros(8).long().pin_memory()
    evaluate(models, [batch], device=GPU, among=[0, 1])

    def batches():
        torch.cuda.set_sync_debug_mode("error")
        yield from [batch] * 3
        torch.cuda.set_sync_debug_mode("default")

    try:
        for among in (None, [0, 1]):
            evaluate(models, batches(), device=GPU, among=among)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# What it ran on


def state_of(device: torch.device) -> dict:
    state = gpu_state(device)
    assert state is not None, "NVML does not know this GPU by its UUID"
    return state


def test_the_gpu_tells_its_state():
    watch = Watch(GPU)
    for _ in range(3):
        torch.cuda._sleep(50_000_000)
        torch.cuda.synchronize()
        watch.look()
    seen = watch.stop().gpu
    assert seen is not None and seen["looks"] == 3
    assert 0 < seen["clock_mhz"] <= seen["clock_max_mhz"]
    assert 0 < seen["temperature_c"] < 120
    assert seen["power_w"] is None or seen["power_w"] > 0
    assert seen["other_processes"] is None or seen["other_processes"] >= 0
    assert json.loads(json.dumps(seen)) == seen


def test_the_machine_names_driver_and_precision():
    machine = describe_machine(GPU)
    assert torch.version.hip or machine["driver"] == environment._driver() is not None
    assert {"matmul_fp32", "conv_fp32", "cudnn_benchmark"} <= machine.keys()


def test_the_gpu_asked_is_the_one_that_is_used_however_they_are_numbered():
    """CUDA_VISIBLE_DEVICES makes the last GPU the first; NVML goes on counting as before."""
    if torch.cuda.device_count() < 2 or "CUDA_VISIBLE_DEVICES" in os.environ:
        pytest.skip("needs two CUDA GPUs, and CUDA_VISIBLE_DEVICES unset")
    code = (
        "import pynvml, torch\nfrom tokbench.measure import environment\n"
        "asked = []\nreal = pynvml.nvmlDeviceGetHandleByUUID\n"
        "pynvml.nvmlDeviceGetHandleByUUID = lambda uuid: asked.append(uuid) or real(uuid)\n"
        "assert environment.gpu_state(torch.device('cuda'))\npynvml.nvmlInit()\n"
        "last = pynvml.nvmlDeviceGetHandleByIndex(pynvml.nvmlDeviceGetCount() - 1)\n"
        "assert asked == [pynvml.nvmlDeviceGetUUID(last)], asked"
    )
    last = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(torch.cuda.device_count() - 1)}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **last}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_is_fused_with_a_mask_and_without(dtype, images):
    model = vit(embed_dim=96).to(GPU, dtype)
    assert attention_kernels(model, images.to(dtype))
    masked = tokbench.apply(tokbench.fork(model), "tome", 9)
    assert attention_kernels(masked, images.to(dtype))


# Compiled, and all of it together


@pytest.mark.parametrize(("method", "build"), [*((method, vit) for method in METHODS), ("mctf", eva)])
def test_a_compiled_method_gives_what_it_gives_uncompiled(method, build, images):
    model = tokbench.apply(build(depth=2).to(GPU), method, 5)
    with torch.inference_mode():
        expected = model(images)
        torch.testing.assert_close(compile_model(model)(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt"])
def test_a_runtime_on_the_gpu_answers_as_the_model_does(name, images, tmp_path):
    provider = RUNTIMES[name].providers["cuda"]
    if provider not in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {provider}")
    model = tokbench.apply(vit().to(GPU), "tome", 8)
    with torch.inference_mode():
        expected, found = model(images), in_runtime(model, name, tmp_path)(images)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_a_run_with_everything(source, tmp_path):
    options = RunOptions(device="cuda", dtype="fp16", compile=True)
    grid = small_grid(MethodSpec("tome", ("8",)), MethodSpec("mctf", ("8",)))
    table = runner.run(grid, tmp_path / "run", options=options, progress=Listener())
    assert table["error"].isna().all()
    assert table[["throughput", "speedup", "latency_ms", "memory_mib", "gflops"]].notna().all(axis=None)
    assert set(table["machine"]) == {torch.cuda.get_device_name()}
    speeds = [record for record in plain_records(tmp_path / "run") if record["kind"] == "speed"]
    assert all(record["runtime"] == "compile" and record["reserved_memory_bytes"] > 0 for record in speeds)
    more = small_grid(MethodSpec("tome", ("8", "12")))
    table = runner.run(more, tmp_path / "run", options=options).set_index("cell")
    assert table.loc["tiny/tome/12", ["top1", "speedup"]].notna().all() and table["batch_size"].nunique() == 1
