"""How timings are taken and summarized, on a clock of our own, and the description of the machine.

Nothing here asserts how fast anything is.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tokbench.measure import environment, speed
from tokbench.measure._model import release_memory
from tokbench.measure.environment import describe_machine, package_versions
from tokbench.measure.speed import measure_speed, plan

SIZE = (3, 4, 4)


pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """Stands for the time module: time passes only when a model says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


class Ticking(nn.Module):
    """Takes the seconds that `cost` says, and notes the images it was given."""

    def __init__(self, clock: Clock, cost: Callable[[], float], log: list[str], name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.clock, self.cost, self.log, self.name = clock, cost, log, name
        self.images: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.clock.now += self.cost()
        self.log.append(self.name)
        self.images.append(images)
        return images


def ticking(clock: Clock, **costs: float) -> tuple[dict[str, nn.Module], list[str]]:
    log: list[str] = []
    return {name: Ticking(clock, lambda cost=cost: cost, log, name) for name, cost in costs.items()}, log


def test_figures_from_known_times(clock: Clock) -> None:
    models, _ = ticking(clock, none=0.2, tome=0.1, mctf=0.4)
    results = measure_speed(models, batch_size=8, input_size=SIZE, rounds=8, seconds=48)
    assert [result.name for result in results] == ["none", "tome", "mctf"]
    assert [result.batch_size for result in results] == [8, 8, 8]
    assert [result.throughput for result in results] == pytest.approx([40, 80, 20])
    assert [result.speedup for result in results] == pytest.approx([1, 2, 0.5])
    assert [result.speedup_low for result in results] == pytest.approx([1, 2, 0.5])
    assert [result.speedup_high for result in results] == pytest.approx([1, 2, 0.5])
    assert results[1].rounds == pytest.approx([0.1] * 8)
    assert [result.iterations for result in results] == pytest.approx([10, 20, 5], abs=1)


def test_a_disturbance_common_to_a_round_cancels(clock: Clock) -> None:
    # The machine gets slower all the time, but by little within a round.
    log: list[str] = []
    models: dict[str, nn.Module] = {
        "none": Ticking(clock, lambda: 0.2 * (1 + clock.now / 100), log, "none"),
        "tome": Ticking(clock, lambda: 0.1 * (1 + clock.now / 100), log, "tome"),
    }
    result = measure_speed(models, batch_size=1, input_size=SIZE, rounds=40, seconds=20)[1]
    assert max(result.rounds) > 1.1 * min(result.rounds)
    assert result.speedup == pytest.approx(2, rel=0.01)
    assert result.speedup_low <= result.speedup <= result.speedup_high < result.speedup_low + 0.05


def test_the_median_shrugs_off_an_outlier(clock: Clock) -> None:
    costs = iter([0.1] * 10 + [5.0] + [0.1] * 1000)
    model = Ticking(clock, lambda: next(costs), [], "none")
    result = measure_speed({"none": model}, batch_size=1, input_size=SIZE, rounds=9, seconds=1)[0]
    assert max(result.rounds) > 1
    assert median(result.rounds) == pytest.approx(0.1)
    assert result.throughput == pytest.approx(10)


def test_rounds_are_interleaved_and_shuffled_by_the_seed(clock: Clock) -> None:
    def turns(seed: int) -> list[str]:
        models, log = ticking(clock, a=1.0, b=1.0, c=1.0)
        measure_speed(models, batch_size=1, input_size=SIZE, rounds=12, seconds=36, warmup=0, seed=seed)
        return log[-36:]

    first = turns(0)
    rounds = [tuple(first[start : start + 3]) for start in range(0, 36, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 2
    assert first == turns(0)
    assert first != turns(1)


def test_everyone_sees_the_same_images(clock: Clock) -> None:
    models, _ = ticking(clock, a=1.0, b=1.0)
    measure_speed(models, batch_size=2, input_size=SIZE, rounds=1, seconds=2)
    images = [image for model in models.values() for image in model.images]  # type: ignore[union-attr]
    assert images[0].shape == (2, *SIZE)
    assert images[0].dtype == torch.float32
    assert all(image is images[0] for image in images)


def test_warm_up_is_not_counted(clock: Clock) -> None:
    costs = iter([100.0, 50.0, 25.0] + [1.0] * 100)
    model = Ticking(clock, lambda: next(costs), [], "none")
    result = measure_speed({"none": model}, batch_size=1, input_size=SIZE, rounds=5, seconds=5, warmup=3)[0]
    assert result.rounds == pytest.approx([1.0] * 5)


@pytest.mark.parametrize(
    ("estimates", "rounds", "seconds", "expected"),
    [
        ({"a": 0.1, "b": 0.2}, 10, 12.0, (10, {"a": 6, "b": 3})),
        ({"a": 1.0, "b": 2.0}, 20, 30.0, (20, {"a": 1, "b": 1})),
        ({"a": 1.0, "b": 2.0}, None, 30.0, (10, {"a": 1, "b": 1})),
        ({"a": 60.0}, None, 30.0, (speed.FEWEST_ROUNDS, {"a": 1})),
        ({"a": 1e-3}, None, 30.0, (speed.MOST_ROUNDS, {"a": 300})),
    ],
)
def test_plan(
    estimates: dict[str, float], rounds: int | None, seconds: float, expected: tuple[int, dict[str, int]]
) -> None:
    planned, iterations = plan(estimates, rounds, seconds)
    assert planned == expected[0]
    assert iterations == pytest.approx(expected[1], abs=1)


@pytest.mark.parametrize(("rounds", "planned"), [(9, 9), (None, speed.FEWEST_ROUNDS)])
def test_progress_tells_rounds_done_and_planned(clock: Clock, rounds: int | None, planned: int) -> None:
    models, _ = ticking(clock, a=100.0)
    seen: list[tuple[int, int]] = []
    measure_speed(
        models,
        batch_size=1,
        input_size=SIZE,
        rounds=rounds,
        seconds=1,
        on_round=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, planned) for done in range(1, planned + 1)]


class Broken(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


def test_failures() -> None:
    good, broken = nn.Flatten(), Broken()
    failures: list[tuple[str, str]] = []

    def fail(name: str, error: Exception) -> None:
        failures.append((name, str(error)))

    results = measure_speed(
        {"none": good, "bad": broken}, batch_size=1, input_size=SIZE, rounds=1, seconds=0.01, on_failure=fail
    )
    assert [result.name for result in results] == ["none"]
    assert failures == [("bad", "out of memory")]
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_speed({"none": good, "bad": broken}, batch_size=1, input_size=SIZE)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure_speed({"bad": broken, "none": good}, batch_size=1, input_size=SIZE, on_failure=fail)


def test_bad_arguments() -> None:
    model = nn.Flatten()
    for models, batch_size, rounds in (({}, 1, 1), ({"a": model}, 0, 1), ({"a": model}, 1, 0)):
        with pytest.raises(ValueError, match="at least one model, one image"):
            measure_speed(models, batch_size=batch_size, input_size=SIZE, rounds=rounds)
    with pytest.raises(ValueError, match="cannot tell the input size"):
        measure_speed({"a": model}, batch_size=1)
    mixed = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4).double()}
    with pytest.raises(ValueError, match="not on one device in one dtype: a .*float32.* b .*float64"):
        measure_speed(mixed, batch_size=1, input_size=SIZE)


def test_real_models_on_the_real_clock() -> None:
    models = {"one": nn.Linear(4, 4).train(), "two": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))}
    results = measure_speed(models, batch_size=2, input_size=SIZE, rounds=8, seconds=0.05)
    for result in results:
        assert len(result.rounds) == 8
        assert min(result.rounds) > 0
        assert result.iterations >= 1
        assert result.throughput == 2 / median(result.rounds)
        assert result.speedup_low <= result.speedup <= result.speedup_high
    assert results[0].speedup == results[0].speedup_low == results[0].speedup_high == 1
    assert models["one"].training


@pytest.mark.gpu
def test_on_a_gpu_the_time_is_that_of_the_kernels() -> None:
    class Sleeping(nn.Module):
        """Keeps the GPU busy for a fixed number of its clock cycles; the host returns at once."""

        def __init__(self, cycles: int) -> None:
            super().__init__()
            self.weight, self.cycles = nn.Parameter(torch.zeros(1, device="cuda")), cycles

        def forward(self, images: Tensor) -> Tensor:
            assert images.is_cuda
            torch.cuda._sleep(self.cycles)
            return images

    models = {"long": Sleeping(20_000_000), "short": Sleeping(10_000_000)}
    results = measure_speed(models, batch_size=1, input_size=SIZE, rounds=5, seconds=0.5)
    # The same number of cycles over two: not a matter of how fast the GPU is.
    assert results[1].speedup == pytest.approx(2, rel=0.2)


class Stream:
    """Stands for CUDA: kernels are launched at once and run one after the other on the device's own clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = self.busy_until = 0.0
        self.log: list[str] = []
        stream = self

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                stream.log.append("record")
                self.at = stream.busy_until = max(stream.host, stream.busy_until)

            def elapsed_time(self, end: Event) -> float:
                assert stream.host >= end.at, "asked before the event came to pass"
                return 1000 * (end.at - self.at)

        def synchronize(device: object = None) -> None:
            stream.log.append("synchronize")
            stream.host = max(stream.host, stream.busy_until)

        @contextmanager
        def on(device: torch.device) -> Iterator[None]:
            stream.log.append("on")
            yield
            stream.log.append("off")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "device", on)

    def launch(self, seconds: float) -> None:
        self.host += 1e-5
        self.busy_until = max(self.host, self.busy_until) + seconds


def test_cuda_events_time_the_kernels_of_the_passes_and_nothing_before(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(monkeypatch)

    class Kernel(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            stream.log.append("launch")
            stream.launch(0.02)
            return images

    stream.launch(5.0)  # what is in the queue still, of another cell
    assert speed._cuda_seconds(Kernel(), torch.zeros(1), 10) == pytest.approx([0.02] * 10, rel=1e-3)
    assert stream.log == ["on", "synchronize", "record", *["launch", "record"] * 10, "synchronize", "off"]


def test_peak_memory_is_of_one_pass_and_not_of_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: log.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: log.append("read") or 7)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 9)
    model = nn.Conv2d(3, 1, 1)
    model.register_forward_hook(lambda *_: log.append("pass"))
    real = speed.placement
    # On the GPU as far as it is asked, and on the CPU where it computes.
    monkeypatch.setattr(speed, "placement", lambda model: (SimpleNamespace(type="cuda"), real(model)[1]))
    move = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda self, device, dtype: move(self, dtype))
    assert speed.measure_memory(model, batch_size=2, input_size=SIZE) == (7, 9)
    assert log == ["empty_cache", "reset_peak_memory_stats", "pass", "synchronize", "read"]


def test_garbage_collection_is_short_while_passes_are_timed(clock: Clock) -> None:
    frozen: list[int] = []

    class Spy(Ticking):
        def forward(self, images: Tensor) -> Tensor:
            frozen.append(gc.get_freeze_count())
            return super().forward(images)

    measure_speed({"none": Spy(clock, lambda: 1.0, [], "none")}, batch_size=1, input_size=SIZE, rounds=1)
    assert min(frozen) > 1000 and gc.get_freeze_count() == 0


def test_what_failed_for_want_of_memory_lets_go_of_it() -> None:
    class Large:
        pass

    def fail(error: Exception) -> None:
        raise error  # from here on the error holds this frame, and the frame the error

    def work() -> weakref.ref:
        large = Large()
        try:
            try:
                raise torch.OutOfMemoryError
            except Exception as error:
                fail(error)
        except torch.OutOfMemoryError:
            return weakref.ref(large)
        raise AssertionError

    gc.disable()
    try:
        left = work()
        assert left() is not None
        release_memory(torch.device("cpu"))
        assert left() is None
    finally:
        gc.enable()


def test_the_machine_is_described_for_json() -> None:
    machine = describe_machine()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["device"] == "cpu"
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cores"] >= 1
    assert machine["cpu"] and machine["platform"]
    assert machine["torch"] == package_versions()["torch"]
    assert machine["torch_build"].startswith(torch.__version__) and machine["cpu_capability"]
    assert machine["kernels"] in ("C", None)
    assert "gpu" not in machine


def test_versions_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-package-here"))
    assert list(package_versions()) == ["python", "torch"]


@pytest.mark.gpu
def test_a_gpu_is_described_for_json() -> None:
    machine = describe_machine("cuda")
    assert json.loads(json.dumps(machine)) == machine
    assert machine["gpu"] == torch.cuda.get_device_name()
    assert machine["cuda"] == torch.version.cuda
    assert machine["gpu_memory_gib"] > 0


@pytest.mark.parametrize(
    ("noise", "patience", "made"),
    [
        (0.0, {0.05: 4}, range(8, 9)),  # nothing more to learn
        (0.04, {0.05: 4}, range(19, 22)),  # as many as fit, and their intervals are useful
        (0.2, {}, range(16, 22)),  # no longer than was asked
        (0.2, {0.05: 4}, range(25, 90)),  # until they are useful
        (0.8, {0.05: 4}, range(70, 90)),  # as long as is allowed
        (0.8, {0.05: 2, 0.2: 8}, range(100, 165)),  # longer while they tell nothing
    ],
)
def test_rounds_go_on_until_every_interval_is_useful(
    clock: Clock, noise: float, patience: dict[float, float], made: range
) -> None:
    generator = np.random.default_rng(0)
    quick: dict[str, nn.Module] = {
        name: Ticking(clock, lambda: 1 + noise * generator.uniform(-1, 1), [], name) for name in ("none", "tome")
    }
    seen: list[tuple[int, int]] = []
    results = measure_speed(
        quick, batch_size=1, input_size=SIZE, seconds=40, patience=patience, on_round=lambda *told: seen.append(told)
    )
    assert len(results[0].rounds) == len(seen) and len(seen) in made
    assert len({planned for _, planned in seen}) <= 1 + len(
        patience
    )  # a bar that starts anew all the time tells no time
    assert all(done <= planned for done, planned in seen)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))


def test_rounds_go_on_for_a_time_that_is_vague_where_the_ratio_is_not(clock: Clock) -> None:
    # Two paces, each for half of the time: they cancel in the ratio, and neither is the typical one.
    noise = np.random.default_rng(0)
    models: dict[str, nn.Module] = {
        name: Ticking(clock, lambda: (1 + (clock.now // 8) % 2) * noise.uniform(0.99, 1.01), [], name)
        for name in ("none", "tome")
    }
    results = measure_speed(models, batch_size=1, input_size=SIZE, seconds=48, patience={0.05: 4})
    assert results[1].speedup_high / results[1].speedup_low < 1.05
    assert len(results[0].rounds) > 40


def test_the_interval_covers_a_known_ratio_while_the_machine_drifts(clock: Clock) -> None:
    generator = np.random.default_rng(0)
    hits, simulations = 0, 150
    for _ in range(simulations):
        period, phase = generator.uniform(5, 60), generator.uniform(0, 6.28)

        def cost(seconds: float, period: float = period, phase: float = phase) -> float:
            # A machine that slows to a half and recovers, over some rounds or many, and never times alike twice.
            return seconds * (1.5 + 0.5 * np.sin(clock.now / period + phase)) * generator.lognormal(sigma=0.03)

        models = {
            name: Ticking(clock, partial(cost, seconds), [], name) for name, seconds in (("none", 0.3), ("tome", 0.2))
        }
        result = measure_speed(models, batch_size=1, input_size=SIZE, seconds=60)[1]
        hits += result.speedup_low <= 1.5 <= result.speedup_high
    assert 0.90 < hits / simulations < 0.99


def test_latency_is_of_single_images_in_turns_within_each_round(clock: Clock) -> None:
    models, log = ticking(clock, none=0.02, tome=0.01, free=0.01)
    none, tome, free = measure_speed(
        models, batch_size=2, input_size=SIZE, rounds=10, seconds=0.45, latency_of=("none", "tome")
    )
    assert len(none.rounds) == 10
    assert none.latency == pytest.approx([0.02] * 10) and tome.latency == pytest.approx([0.01] * 10)
    assert free.latency == []
    rounds = [log[-50:][start : start + 5] for start in range(0, 50, 5)]
    assert all(sorted(turns[:3]) == ["free", "none", "tome"] for turns in rounds)
    assert all(sorted(turns[3:]) == ["none", "tome"] for turns in rounds)
    assert models["tome"].images[-1].shape == (1, *SIZE)  # type: ignore[index,union-attr]
    unhurried = measure_speed(models, batch_size=2, input_size=SIZE, rounds=8, seconds=100, latency_of=("tome",))
    assert len(unhurried[1].latency) == 56  # seven a round, about fifty in all


def test_the_largest_batch_is_one_that_every_model_has_memory_for() -> None:
    class Small(nn.Module):
        def __init__(self, most: int) -> None:
            super().__init__()
            self.weight, self.most = nn.Parameter(torch.zeros(1)), most

        def forward(self, images: Tensor) -> Tensor:
            if len(images) > self.most:
                raise torch.OutOfMemoryError
            return images

    sizes = [Small(100), Small(40)]
    assert speed.largest_batch(sizes, input_size=SIZE) == 32
    assert speed.largest_batch(sizes, input_size=SIZE, most=16) == 16
    assert speed.largest_batch([Small(1)], input_size=SIZE) == 1
    with pytest.raises(RuntimeError, match="broken"):
        model = Small(9)
        model.forward = lambda images: (_ for _ in ()).throw(RuntimeError("broken"))  # type: ignore[method-assign]
        speed.largest_batch([model], input_size=SIZE)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc's malloc, which is not there")
def test_memory_that_was_freed_is_not_taken_from_the_system_again() -> None:
    import resource

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert speed.keep_freed_memory()
    # Without it all are 2**26 / 4096. What little else is allocated may take the place of one of them.
    assert min(faults() for _ in range(10)) < 2**26 / 4096 / 10


def test_memory_is_not_guessed_where_it_cannot_be_told() -> None:
    assert speed.measure_memory(nn.Linear(1, 1), batch_size=1, input_size=SIZE) is None


@pytest.mark.gpu
def test_peak_memory_grows_with_the_batch() -> None:
    model = nn.Conv2d(3, 64, 3).cuda()
    small, large = (speed.measure_memory(model, batch_size=n, input_size=(3, 64, 64)) for n in (1, 64))
    assert small is not None and large is not None and small[0] < large[0] <= large[1]


def test_what_makes_timings_worthless_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_cpu_seconds", iter([(10.0, 100.0, 5.0), (50.0, 200.0, 25.0)]).__next__)
    seen = environment.Watch(torch.device("cpu")).stop()
    assert seen.other_cpu == pytest.approx(0.2) and seen.gpu is None
    assert len(seen.warnings) == 1 and "other work took 20% of the machine's CPU time" in seen.warnings[0]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4096)
    assert any("4096 threads share" in text for text in environment._host_warnings(torch.device("cpu"), 0.0))
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    (text,) = environment._host_warnings(torch.device("cuda"), 0.0)
    assert "unset" in text


@pytest.mark.parametrize(
    ("granted", "cores"),
    [("max 100000", 8), ("150000 100000", 2), ("20000 100000", 1), ("3200000 100000", 8), ("", 8), (None, 8)],
)
def test_a_container_has_as_many_cores_as_it_is_granted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, granted: str | None, cores: int
) -> None:
    if granted is not None:
        (tmp_path / "cpu.max").write_text(granted)
    monkeypatch.setattr(environment, "_CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert environment.available_cores() == cores


class Library:
    """Stands for NVML: one GPU or a slice of one; it must be open to be asked, and be closed in the end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, prefix: str = "GPU-") -> None:
        import pynvml

        self.open, self.opened = 0, 0
        self.refused = {"nvmlDeviceGetTemperature"}
        self.answers: dict[str, object] = {
            "nvmlSystemGetDriverVersion": "550.54.15",
            "nvmlDeviceGetPowerUsage": 69_500,
            "nvmlDeviceGetEnforcedPowerLimit": 70_000,
            "nvmlDeviceGetCurrentClocksEventReasons": 0x4 | 0x20 | 0x1,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x8,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=pid) for pid in (7, 8, 9, 9)],
            "nvmlDeviceGetClockInfo": 1200,
            "nvmlDeviceGetMaxClockInfo": 1590,
            "nvmlDeviceGetTemperature": 80,
            "nvmlDeviceGetHandleByUUID": None,
            "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": None,
        }

        def answer(function: str, *words: object) -> object:
            assert self.open
            if function in self.refused:
                raise pynvml.NVMLError_NotSupported
            if function == "nvmlDeviceGetHandleByUUID":
                if words != (f"{prefix}a-b",):
                    raise pynvml.NVMLError_NotFound
                return "own"
            if function == "nvmlDeviceGetDeviceHandleFromMigDeviceHandle":
                if prefix != "MIG-":
                    raise pynvml.NVMLError_InvalidArgument
                return "card"
            if words and prefix == "MIG-":  # of a slice NVML knows the processes, and of the card all else
                assert words[0] == ("own" if function == "nvmlDeviceGetComputeRunningProcesses" else "card")
            return self.answers[function]

        def start() -> None:
            self.open, self.opened = self.open + 1, self.opened + 1

        def stop() -> None:
            self.open -= 1

        for name in self.answers:
            monkeypatch.setattr(pynvml, name, partial(answer, name))
        monkeypatch.setattr(pynvml, "nvmlInit", start)
        monkeypatch.setattr(pynvml, "nvmlShutdown", stop)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="a-b"))


@pytest.mark.parametrize("prefix", ["GPU-", "MIG-"])
def test_the_state_of_a_gpu_is_what_nvml_tells(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    library = Library(monkeypatch, prefix)
    assert environment.gpu_state(torch.device("cuda")) == {
        "clock_mhz": 1200,
        "clock_max_mhz": 1590,
        "memory_clock_mhz": 1200,
        "power_w": 69.5,
        "power_limit_w": 70.0,
        "temperature_c": None,
        "throttling": ["power limit", "temperature"],
        "other_processes": 2,
    }
    assert environment._driver() == "550.54.15"
    assert library.open == 0
    assert environment.gpu_state(torch.device("cpu")) is None


def test_what_nvml_does_not_tell_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    library = Library(monkeypatch)
    library.refused |= {"nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetComputeRunningProcesses"}
    state = environment.gpu_state(torch.device("cuda"))
    assert state is not None and state["throttling"] == ["hardware slowdown"] and state["other_processes"] is None
    library.refused |= {"nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlSystemGetDriverVersion"}
    state = environment.gpu_state(torch.device("cuda"))
    assert state is not None and state["throttling"] is None and environment._driver() is None
    watch = environment.Watch(torch.device("cuda"))
    seen = watch.stop()
    assert seen.gpu is not None and seen.gpu["throttling"] is None and not any("GPU" in text for text in seen.warnings)
    library.refused.add("nvmlDeviceGetHandleByUUID")
    assert environment.gpu_state(torch.device("cuda")) is None
    assert library.open == 0

    def missing() -> None:
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    assert environment.gpu_state(torch.device("cuda")) is environment._driver() is None
    assert environment.Watch(torch.device("cuda")).stop().gpu is None


def test_a_gpu_is_watched_while_it_works_and_not_when_it_has_cooled_down(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(monkeypatch)
    library.refused.clear()
    watch = environment.Watch(torch.device("cuda"))
    for clock, reasons, degrees, processes in ((1590, 0, 60, (7,)), (900, 0x20, 86, (7, 8)), (1500, 0x4, 85, (7,))):
        library.answers |= {
            "nvmlDeviceGetClockInfo": clock,
            "nvmlDeviceGetCurrentClocksEventReasons": reasons,
            "nvmlDeviceGetTemperature": degrees,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=pid) for pid in processes],
        }
        watch.look()
        assert library.open == 1  # kept, so that looks are short
    library.answers |= {"nvmlDeviceGetClockInfo": 300, "nvmlDeviceGetCurrentClocksEventReasons": 0x1}
    seen = watch.stop()
    assert library.open == 0 and seen.gpu is not None
    assert (seen.gpu["clock_mhz"], seen.gpu["temperature_c"], seen.gpu["other_processes"]) == (900, 86, 1)
    assert (seen.gpu["throttling"], seen.gpu["throttled"], seen.gpu["looks"]) == (["power limit", "temperature"], 2, 3)
    throttled, crowded = environment._gpu_warnings(seen.gpu)
    assert "in 2 of 3 rounds (power limit, temperature; down to 900 of 1590 MHz, up to 86 °C)" in throttled
    assert crowded.startswith("another process is on the GPU")
    assert json.loads(json.dumps(seen.gpu)) == seen.gpu


def test_git_state_is_of_the_checkout_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # a hook has some, which would lead the commands below to the repository it is of
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # which may ask for signatures
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))  # temporary files may lie in a checkout
    assert environment.git_state(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    state = environment.git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and not state["modified"]
    (tmp_path / "file").write_text("2")
    assert environment.git_state(tmp_path) == {**state, "modified": True}


def test_a_machine_that_gets_busy_does_not_keep_one_waiting(clock: Clock) -> None:
    # Ten times as slow from the first round on as the warm-up promised.
    models: dict[str, nn.Module] = {
        name: Ticking(clock, lambda: 0.1 if clock.now < 2 else 1.0, [], name) for name in ("none", "tome")
    }
    results = measure_speed(models, batch_size=1, input_size=SIZE, seconds=2.6)  # which 13 rounds would fill
    assert speed.FEWEST_ROUNDS == len(results[0].rounds) == len(results[1].rounds)


@pytest.mark.parametrize("fails_at", [1, 8, 13])  # in the warm-up, a round, a later one
def test_a_model_that_fails_at_any_time_is_left_out_and_named(clock: Clock, fails_at: int) -> None:
    passes = iter(range(1, 1000))

    def cost() -> float:
        if next(passes) >= fails_at:
            raise RuntimeError("late")
        return 1.0

    models: dict[str, nn.Module] = {
        "none": Ticking(clock, lambda: 1.0, [], "none"),
        "tome": Ticking(clock, cost, [], "tome"),
        "mctf": Ticking(clock, lambda: 2.0, [], "mctf"),
    }
    told: list[str] = []
    note = lambda name, error: told.append(f"{name}: {error}")  # noqa: E731
    results = measure_speed(models, batch_size=1, input_size=SIZE, seconds=100, on_failure=note)
    assert told == ["tome: late"]
    assert [(result.name, result.speedup) for result in results] == [("none", 1), ("mctf", 0.5)]
    assert len(results[0].rounds) == len(results[1].rounds)


def test_a_model_that_answers_fewer_images_than_it_was_shown_is_not_timed() -> None:
    class First(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:1].flatten(1)

    with pytest.raises(ValueError, match="gave 1 answers to 4 images"):
        measure_speed({"first": First()}, batch_size=4, input_size=(3, 8, 8), rounds=1, seconds=0.01)
