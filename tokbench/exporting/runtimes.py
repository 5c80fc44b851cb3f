"""What runs models and exported files: each on the same device, and on the CPU with as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokbench.errors import UserError

# The name of a file's one input, images (B, C, H, W), and of its one output, (B, D).
INPUT, OUTPUT = "images", "output"
CPU = torch.device("cpu")
Run = Callable[[Tensor], Tensor]


def open_pt2(path: Path) -> Run:
    """With PyTorch, on the device that the file was exported on."""
    return torch.export.load(path).module()


def open_onnxruntime(path: Path, device: torch.device = CPU, provider: str = "CPUExecutionProvider") -> Run:
    """An .onnx file with ONNX Runtime. Raises RuntimeError where it would take another provider instead."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what it raises says it, too
    # Else its threads go on spinning after a pass, and slow down whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    chosen: Any = provider if device.type == "cpu" else (provider, {"device_id": device.index or 0})
    session = onnxruntime.InferenceSession(path, options, providers=[chosen])
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"ONNX Runtime took {session.get_providers()[0]} instead of {provider}")
    if device.type == "cpu":
        return lambda images: torch.from_numpy(session.run(None, {INPUT: images.cpu().numpy()})[0])
    return partial(_run_on_gpu, session, session.get_outputs()[0].shape[1])


def _run_on_gpu(session: Any, outputs: int, images: Tensor) -> Tensor:
    """Without a copy to the host and back."""
    images = images.contiguous()
    found = torch.empty(len(images), outputs, dtype=images.dtype, device=images.device)
    binding = session.io_binding()
    for bind, name, held in ((binding.bind_input, INPUT, images), (binding.bind_output, OUTPUT, found)):
        kind = torch.empty(0, dtype=held.dtype).numpy().dtype
        bind(name, "cuda", held.device.index or 0, kind, tuple(held.shape), held.data_ptr())
    torch.cuda.current_stream(images.device).synchronize()  # ONNX Runtime computes in a stream of its own
    session.run_with_iobinding(binding)
    return found


def open_openvino(path: Path, device: torch.device = CPU, provider: str = "CPU") -> Run:
    """An .onnx file with OpenVINO, in the file's own precision."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    for node in model.get_ops():
        if node.get_type_name() == "TopK":
            node.set_attribute("stable", True)  # as ONNX defines it; OpenVINO reads it as any order among equals
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "EXECUTION_MODE_HINT": "ACCURACY"}
    compiled = core.compile_model(model, provider, settings)
    return lambda images: torch.from_numpy(compiled(images.cpu().numpy())[0].copy())


@dataclass(frozen=True)
class Runtime:
    """What times models: PyTorch itself, or what opens their .onnx files.

    providers: what computes, by the kind of device that it can compute on; None: PyTorch on any. package: that it
    needs, and the extra of tokbench that installs it. open: what opens a file.
    """

    providers: dict[str, str] | None = None
    package: str = ""
    extra: str = ""
    open: Callable[[Path, torch.device, Any], Run] | None = None

    def provider(self, device: torch.device) -> str | None:
        """What computes on that device."""
        return self.providers[device.type] if self.providers else None


# By the names in config.RUNTIMES.
RUNTIMES = {
    "eager": Runtime(),
    "compile": Runtime(),
    "onnxruntime": Runtime(
        {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}, "onnxruntime", "onnx", open_onnxruntime
    ),
    "openvino": Runtime({"cpu": "CPU"}, "openvino", "openvino", open_openvino),
    "tensorrt": Runtime({"cuda": "TensorrtExecutionProvider"}, "onnxruntime", "onnx", open_onnxruntime),
}


def require_runtimes(names: Iterable[str], device: torch.device, dtype: str) -> None:
    """Raise UserError, saying what helps, for a runtime that cannot run here, on that device or in that dtype."""
    for name in names:
        runtime = RUNTIMES[name]
        if runtime.providers is None:
            continue
        if device.type not in runtime.providers:
            where = " or ".join(runtime.providers)
            raise UserError(f"runtime {name!r} computes on {where}, and the device here is {device.type}")
        if dtype == "bf16":
            raise UserError(f"runtime {name!r} takes fp32 or fp16, not bf16")
        missing = [package for package in ("onnx", "onnxscript", runtime.package) if find_spec(package) is None]
        if missing:
            raise UserError(f"runtime {name!r} needs {' and '.join(missing)}: pip install 'tokbench[{runtime.extra}]'")
        if runtime.package == "onnxruntime":
            _require_provider(name, runtime.providers[device.type])


def _require_provider(name: str, provider: str) -> None:
    import onnxruntime

    there = onnxruntime.get_available_providers()
    if provider not in there:
        raise UserError(
            f"runtime {name!r} needs ONNX Runtime's {provider}, and here it has {', '.join(there)}: "
            "pip install onnxruntime-gpu"
        )


def runtime_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the packages of these runtimes, of what exports to them, too."""
    packages = [package for name in names if (own := RUNTIMES[name].package) for package in ("onnx", "onnxscript", own)]
    return {package: version(package) for package in dict.fromkeys(packages) if find_spec(package)}
