"""The conditions of a measurement: machine, drivers, package versions. Nothing that identifies a person or host."""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch

from tokbench.fusion.kernels import kernels_on

PACKAGES = ("tokbench", "torch", "torchvision", "timm", "fvcore", "numpy", "scipy", "safetensors", "triton")

_SDPA = ("flash", "mem_efficient", "cudnn", "math")
# The CPU limit of a cgroup v2: microseconds of CPU time (or "max") per period in microseconds.
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# NVML's bits for involuntary throttling; idling and application clocks are not included.
_THROTTLING = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "hardware temperature",
    0x80: "power brake",
}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results may depend on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Everything that speed depends on, ready for JSON.

    Always: platform, libc (None if unknown), cpu, cpu_capability (the instruction set that torch uses), governor (of
    the CPU clocks; None if unknown), cores (see `available_cores`), threads (torch's), memory_gib, sdpa (the enabled
    fused attention kernels), kernels (what tokbench's own are written in, None without any), device, python, torch,
    timm, torch_build (CUDA version and commit of the torch build). On CUDA also: gpu, gpu_memory_gib, gpu_capability,
    cuda, cudnn, driver (None if NVML does not report it), matmul_fp32 and conv_fp32 ("tf32" if float32 matrix products
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
        "kernels": kernels_on(device),
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
        # Reading the older allow_tf32 raises once a program has set the precision through this API.
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
    """The number of cores this process may use: its CPU affinity, limited by its container's CPU quota."""
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
    """{"commit", "modified"} of the git checkout that tokbench runs from; None if it is not a checkout."""
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
    # An installed copy may be inside another checkout, for example in a project's virtual environment.
    return {"commit": commit.strip(), "modified": bool(status.strip())} if tracked.strip() else None


@dataclass(frozen=True)
class Disturbance:
    """What else the machine did while speed was measured.

    other_cpu: share of the machine's CPU time used by other processes, in [0, 1]. gpu: the summary of all looks at the
    GPU: lowest clock, highest power, temperature and number of other processes, every reason for throttling, and in how
    many looks it throttled; None without a GPU. warnings: sentences, one for each thing that may spoil the timings.
    """

    other_cpu: float
    gpu: dict[str, Any] | None
    warnings: tuple[str, ...]


class Watch:
    """Watches the machine while speed is measured: `watch = Watch(device)`, the work, then `watch.stop()`.

    Call `watch.begin()` after each warm-up, for compilers are no other work, and `watch.look()` after each round to
    sample a GPU: soon after the work it is idle and no longer throttled.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._looks: list[dict[str, Any]] = []
        self._library = ExitStack()
        if device.type == "cuda":
            self._library.enter_context(_nvml())  # keep NVML open, so that looks are quick
        self.begin()

    def begin(self) -> None:
        """Forget what happened up to now."""
        self._began = _cpu_seconds()

    def look(self) -> None:
        """Sample the GPU's state, if there is a GPU."""
        if state := gpu_state(self._device):
            self._looks.append(state)

    def stop(self) -> Disturbance:
        """End the watch and return what it saw."""
        busy, everything, own = (now - then for now, then in zip(_cpu_seconds(), self._began, strict=True))
        other = max(0.0, busy - own) / everything if everything > 0 else 0.0
        if not self._looks:
            self.look()
        self._library.close()
        gpu = _together(self._looks)
        return Disturbance(round(other, 3), gpu, tuple(_host_warnings(self._device, other) + _gpu_warnings(gpu)))


def together(seen: Sequence[Disturbance], device: torch.device) -> Disturbance:
    """What several processes saw, each while it measured, as one."""
    if len(seen) == 1:
        return seen[0]
    other, gpus = fmean(one.other_cpu for one in seen), [one.gpu for one in seen if one.gpu]
    gpu = _together(gpus)
    if gpu:
        gpu |= {name: sum(own[name] for own in gpus) for name in ("looks", "throttled")}
    return Disturbance(round(other, 3), gpu, tuple(_host_warnings(device, other) + _gpu_warnings(gpu)))


def _cpu_seconds() -> tuple[float, float, float]:
    """(busy seconds of all cores, total seconds of all cores, seconds of this process), from an arbitrary start."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # On Linux, guest time is already part of user time.
    everything = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return everything - idle, everything, own.user + own.system


def thread_warnings(device: torch.device) -> list[str]:
    """That threads outnumber the cores, which can be told before anything is measured."""
    cores, threads = available_cores(), torch.get_num_threads()
    if device.type != "cpu" or threads <= cores:
        return []
    return [f"{threads} threads share {cores} cores: set OMP_NUM_THREADS={cores} and measure again"]


def _host_warnings(device: torch.device, other: float) -> list[str]:
    warnings = thread_warnings(device)
    if other > 0.1:
        warnings.append(
            f"other work took {other:.0%} of the machine's CPU time while speed was measured: "
            "measure again on an idle machine before trusting a speed-up"
        )
    if device.type == "cuda" and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") != "0":
        warnings.append("CUDA_LAUNCH_BLOCKING makes the host wait for every kernel: unset it and measure again")
    return warnings


@contextmanager
def _nvml() -> Iterator[bool]:
    """Open NVML inside the block; yields whether it is available. NVML counts opens, so blocks can be nested."""
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
    """Clocks (MHz), power (W), temperature (°C), reasons for throttling and other processes, from NVML.

    Values that the GPU does not report are None. Returns None on devices other than CUDA and without NVML.
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
        # By UUID, because CUDA_VISIBLE_DEVICES may hide and reorder GPUs for CUDA but not for NVML.
        uuid = torch.cuda.get_device_properties(device).uuid
        own = ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid}") or ask("nvmlDeviceGetHandleByUUID", f"MIG-{uuid}")
        if own is None:
            return None
        # A MIG slice has its own processes; clocks, power and temperature are the whole card's.
        card = ask("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", own) or own
        power, limit = ask("nvmlDeviceGetPowerUsage", card), ask("nvmlDeviceGetEnforcedPowerLimit", card)
        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons", card)
        if reasons is None:  # the name before driver 535
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
            # One is this process, which cannot be found by its PID: in a container NVML reports another one.
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
            "compare cells within this run only, or lock its clocks lower (nvidia-smi -lgc) and measure again"
        )
    if gpu and gpu["other_processes"]:
        others = (
            "another process is" if gpu["other_processes"] == 1 else f"{gpu['other_processes']} other processes are"
        )
        warnings.append(f"{others} on the GPU, which slows some rounds more than others")
    return warnings
