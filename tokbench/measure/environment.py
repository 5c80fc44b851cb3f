"""What a measurement ran on: machine, drivers and package versions. Nothing that names a person or a host."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("tokbench", "torch", "torchvision", "timm", "fvcore", "numpy", "scipy", "safetensors", "triton")


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

    Keys always there: platform, cpu, cores (those this process may use), threads (torch's), memory_gib (None
    where the system does not tell), device, python, torch, timm. On CUDA also: gpu, gpu_memory_gib,
    gpu_capability, cuda, cudnn, driver (None where nvidia-smi does not tell), matmul_fp32 ("tf32" where
    float32 matrix products may use TF32).
    """
    device = torch.device(device)
    versions = package_versions()
    machine: dict[str, Any] = {
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
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


def _memory_gib() -> float | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
