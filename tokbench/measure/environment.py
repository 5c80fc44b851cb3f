"""What a measurement ran on: machine, drivers and package versions. Nothing that names a person or a host."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("tokbench", "torch", "torchvision", "timm", "fvcore", "numpy", "scipy", "safetensors", "triton")

_SDPA = ("flash", "mem_efficient", "cudnn", "math")
# What a control group of version 2 is granted: microseconds of CPU time in every so many, or "max".
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# NVML's bits for what holds clocks down against one's will; idling and a set application clock are none of these.
_THROTTLING = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "hardware temperature",
    0x80: "power brake",
}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What speed depends on, ready for JSON: platform, CPU, memory, threads, versions, and a GPU `device`.

    Keys always there: platform, libc (None where unknown), cpu, cpu_capability (the instructions that torch uses),
    governor (of its clocks; None where the system does not tell), cores (see `available_cores`), threads (torch's),
    memory_gib, sdpa (the kernels of fused attention that are switched on), device, python, torch, timm, torch_build
    (what the version leaves out: for which CUDA, from which commit). On CUDA also: gpu, gpu_memory_gib, gpu_capability,
    cuda, cudnn, driver (None where NVML does not tell), matmul_fp32 and conv_fp32 ("tf32" where float32 matrix products
    and convolutions may use TF32), cudnn_benchmark.
    """
    device = torch.device(device)
    versions = package_versions()
    machine: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "governor": _governor(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "sdpa": [name for name in _SDPA if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()],
        "device": str(device),
        **{name: versions.get(name) for name in ("python", "torch", "timm")},
        "torch_build": f"{torch.__version__} {(torch.version.git_version or '')[:12]}".strip(),
    }
    return {**machine, **_describe_gpu(device)} if device.type == "cuda" else machine


def _describe_gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "driver": _driver(),
        # The older allow_tf32 raises once a program has set the precision this way.
        "matmul_fp32": torch.backends.cuda.matmul.fp32_precision,
        "conv_fp32": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def _driver() -> str | None:
    import pynvml

    with _nvml() as is_open:
        try:
            return str(pynvml.nvmlSystemGetDriverVersion()) if is_open else None
        except pynvml.NVMLError:
            return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """How many cores' time this process may use: those it may run on, and no more than its container is granted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _CPU_QUOTA.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else min(cores, max(1, math.ceil(int(quota) / int(period))))


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return path.read_text().strip() if path.is_file() else None


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """{"commit", "modified"} of the git checkout that tokbench itself runs from; None where it is no checkout."""
    folder = folder or Path(__file__).parent
    try:
        commit, status, tracked = (
            subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--untracked-files=no", "."],
                ["ls-files", "."],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # An installed copy may lie inside somebody else's checkout, such as a project's virtual environment.
    return {"commit": commit.strip(), "modified": bool(status.strip())} if tracked.strip() else None


@dataclass(frozen=True)
class Disturbance:
    """What else went on while speed was measured, and what is to be said about it.

    other_cpu: share of the machine's CPU time that other processes took, in [0, 1]. gpu: the GPU's states put together:
    the lowest clock, the highest power, temperature and number of other processes, every reason for throttling, and
    in how many of the looks it throttled; None without one. warnings: sentences, each on one thing that may make the
    timings worthless.
    """

    other_cpu: float
    gpu: dict[str, Any] | None
    warnings: tuple[str, ...]


class Watch:
    """Watches the machine while speed is measured: `watch = Watch(device)`, the work, then `watch.stop()`.

    A GPU is looked at by `watch.look()`, best between two rounds: a moment after the last of them it is idle, cool and
    throttled by nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._looks: list[dict[str, Any]] = []
        self._library = ExitStack()
        if device.type == "cuda":
            self._library.enter_context(_nvml())  # so that a look need not open it
        self._began = _cpu_seconds()

    def look(self) -> None:
        """Note the GPU's state, if there is one to be asked."""
        if state := gpu_state(self._device):
            self._looks.append(state)

    def stop(self) -> Disturbance:
        """What was seen since the watch began."""
        busy, everything, own = (now - then for now, then in zip(_cpu_seconds(), self._began, strict=True))
        other = max(0.0, busy - own) / everything if everything > 0 else 0.0
        if not self._looks:
            self.look()
        self._library.close()
        gpu = _together(self._looks)
        return Disturbance(round(other, 3), gpu, tuple(_host_warnings(self._device, other) + _gpu_warnings(gpu)))


def _cpu_seconds() -> tuple[float, float, float]:
    """(seconds all cores were busy, seconds all cores had, seconds this process took), counted from some moment."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # On Linux guests' time is part of user time.
    everything = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return everything - idle, everything, own.user + own.system


def _host_warnings(device: torch.device, other: float) -> list[str]:
    warnings = []
    cores = available_cores()
    if other > 0.1:
        warnings.append(
            f"other work took {other:.0%} of the machine's CPU time while speed was measured: "
            "time again on an idle machine before believing a speed-up"
        )
    if device.type == "cpu" and torch.get_num_threads() > cores:
        warnings.append(
            f"{torch.get_num_threads()} threads share {cores} cores: set OMP_NUM_THREADS={cores} and time again"
        )
    if device.type == "cuda" and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        warnings.append("CUDA_LAUNCH_BLOCKING makes the host wait for every kernel: unset it and time again")
    return warnings


@contextmanager
def _nvml() -> Iterator[bool]:
    """NVML open inside the block, which is told whether it is there. It counts: only the last to leave closes it."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield False
        return
    try:
        yield True
    finally:
        pynvml.nvmlShutdown()


def gpu_state(device: torch.device) -> dict[str, Any] | None:
    """Clocks (MHz), power (W), temperature (°C), reasons for throttling, other processes: what NVML tells; else None.

    A figure that this GPU does not tell is None. On devices other than CUDA, or without NVML: None.
    """
    if device.type != "cuda":
        return None
    import pynvml

    def ask(function: str, *words: Any) -> Any:
        try:
            return getattr(pynvml, function)(*words)
        except pynvml.NVMLError:
            return None

    with _nvml() as is_open:
        if not is_open:
            return None
        # CUDA's numbers are not NVML's: CUDA_VISIBLE_DEVICES may hide and reorder GPUs. Their UUIDs are the same.
        uuid = torch.cuda.get_device_properties(device).uuid
        own = ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}") or ask("nvmlDeviceGetHandleByUUID", f"MIG-{uuid}")
        if own is None:
            return None
        # A slice of a GPU has processes of its own; clocks, power and heat are the whole card's.
        card = ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", own) or own
        power, limit = ask("nvmlDeviceGetPowerUsage", card), ask("nvmlDeviceGetEnforcedPowerLimit", card)
        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", card)
        if reasons is None:  # its name before driver 535
            reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons", card)
        processes = ask("nvmlDeviceGetComputeRunningProcesses", own)
        return {
            "clock_mhz": ask("nvmlDeviceGetClockInfo", card, pynvml.NVML_CLOCK_SM),
            "clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", card, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": ask("nvmlDeviceGetClockInfo", card, pynvml.NVML_CLOCK_MEM),
            "power_w": None if power is None else power / 1000,
            "power_limit_w": None if limit is None else limit / 1000,
            "temperature_c": ask("nvmlDeviceGetTemperature", card, pynvml.NVML_TEMPERATURE_GPU),
            "throttling": None if reasons is None else [name for bit, name in _THROTTLING.items() if reasons & bit],
            # One is this process, which in a container goes by another number: it cannot be left out by its own.
            "other_processes": None if processes is None else max(0, len({one.pid for one in processes}) - 1),
        }


_PUT_TOGETHER: dict[str, Callable[[list[Any]], Any]] = {
    "clock_mhz": min,
    "clock_max_mhz": max,
    "memory_clock_mhz": min,
    "power_w": max,
    "power_limit_w": min,
    "temperature_c": max,
    "throttling": lambda all_reasons: [one for one in _THROTTLING.values() if any(one in some for some in all_reasons)],
    "other_processes": max,
}


def _together(looks: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not looks:
        return None
    told = {name: [look[name] for look in looks if look[name] is not None] for name in _PUT_TOGETHER}
    state = {name: put(told[name]) if told[name] else None for name, put in _PUT_TOGETHER.items()}
    return {**state, "looks": len(looks), "throttled": sum(map(bool, told["throttling"]))}


def _gpu_warnings(gpu: dict[str, Any] | None) -> list[str]:
    warnings = []
    if gpu and gpu["throttling"]:
        why, hottest = ", ".join(gpu["throttling"]), gpu["temperature_c"]
        warnings.append(
            f"the GPU throttled in {gpu['throttled']} of {gpu['looks']} rounds ({why}; down to {gpu['clock_mhz']} of "
            f"{gpu['clock_max_mhz']} MHz, up to {hottest} °C): "
            "compare cells within this run only, or lock its clocks lower (nvidia-smi -lgc) and time again"
        )
    if gpu and gpu["other_processes"]:
        others = (
            "another process is" if gpu["other_processes"] == 1 else f"{gpu['other_processes']} other processes are"
        )
        warnings.append(f"{others} on the GPU: other work there slows some rounds and not others")
    return warnings
