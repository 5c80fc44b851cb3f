"""What a measurement ran on: machine, drivers and package versions. Nothing that names a person or a host."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("tokbench", "torch", "torchvision", "timm", "fvcore", "numpy", "scipy", "safetensors", "triton")

_SDPA = ("flash", "mem_efficient", "cudnn", "math")
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

    Keys always there: platform, cpu, governor (of its clocks; None where the system does not tell), cores (those this
    process may use), threads (torch's), memory_gib, sdpa (the kernels of fused attention that are switched on), device,
    python, torch, timm. On CUDA also: gpu, gpu_memory_gib,
    gpu_capability, cuda, cudnn, driver (None where nvidia-smi does not tell), matmul_fp32 ("tf32" where
    float32 matrix products may use TF32).
    """
    device = torch.device(device)
    versions = package_versions()
    machine: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "governor": _governor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "sdpa": [name for name in _SDPA if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()],
        "device": str(device),
        **{name: versions.get(name) for name in ("python", "torch", "timm")},
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
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.split()
    return lines[0] if lines else None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


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

    other_cpu: share of the machine's CPU time that other processes took, in [0, 1]. gpu: the GPU's state after it,
    None without one. warnings: sentences, each on one thing that may make the timings worthless.
    """

    other_cpu: float
    gpu: dict[str, Any] | None
    warnings: tuple[str, ...]


class Watch:
    """Watches the machine while speed is measured: `watch = Watch(device)`, the work, then `watch.stop()`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu = gpu_state(device)
        self._began = _cpu_seconds()

    def stop(self) -> Disturbance:
        """What was seen since the watch began."""
        busy, everything, own = (now - then for now, then in zip(_cpu_seconds(), self._began, strict=True))
        other = max(0.0, busy - own) / everything if everything > 0 else 0.0
        after = gpu_state(self._device)
        return Disturbance(round(other, 3), after, tuple(_cpu_warnings(self._device, other) + _gpu_warnings(after)))


def _cpu_seconds() -> tuple[float, float, float]:
    """(seconds all cores were busy, seconds all cores had, seconds this process took), counted from some moment."""
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # On Linux guests' time is part of user time.
    everything = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return everything - idle, everything, own.user + own.system


def _cpu_warnings(device: torch.device, other: float) -> list[str]:
    warnings = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if other > 0.1:
        warnings.append(
            f"other work took {other:.0%} of the machine's CPU time while speed was measured: "
            "time again on an idle machine before believing a speed-up"
        )
    if device.type == "cpu" and torch.get_num_threads() > cores:
        warnings.append(
            f"{torch.get_num_threads()} threads share {cores} cores: set OMP_NUM_THREADS={cores} and time again"
        )
    return warnings


def gpu_state(device: torch.device) -> dict[str, Any] | None:
    """Clocks (MHz), power (W), temperature (°C), reasons for throttling, other processes: what NVML tells; else None.

    A figure that this GPU does not tell is None. On devices other than CUDA, or without NVML: None.
    """
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")

        def ask(function: str, *words: Any) -> Any:
            try:
                return getattr(pynvml, function)(handle, *words)
            except pynvml.NVMLError:
                return None

        power, limit = ask("nvmlDeviceGetPowerUsage"), ask("nvmlDeviceGetEnforcedPowerLimit")
        reasons = ask("nvmlDeviceGetCurrentClocksEventReasons") or 0
        processes = ask("nvmlDeviceGetComputeRunningProcesses")
        return {
            "clock_mhz": ask("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
            "clock_max_mhz": ask("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_SM),
            "power_w": None if power is None else power / 1000,
            "power_limit_w": None if limit is None else limit / 1000,
            "temperature_c": ask("nvmlDeviceGetTemperature", pynvml.NVML_TEMPERATURE_GPU),
            "throttling": [name for bit, name in _THROTTLING.items() if reasons & bit],
            "other_processes": None if processes is None else sum(one.pid != os.getpid() for one in processes),
        }
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _gpu_warnings(gpu: dict[str, Any] | None) -> list[str]:
    warnings = []
    if gpu and gpu["throttling"]:
        warnings.append(
            f"the GPU throttled ({', '.join(gpu['throttling'])}; {gpu['clock_mhz']} of {gpu['clock_max_mhz']} MHz, "
            f"{gpu['temperature_c']} °C): slow cells may only have run while it was hot"
        )
    # In a container even the own process may go by another number, so one is no proof.
    if gpu and (gpu["other_processes"] or 0) > 1:
        warnings.append(
            f"{gpu['other_processes']} other processes are on the GPU: their work slows some rounds and not others"
        )
    return warnings
