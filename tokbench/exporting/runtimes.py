"""What runs an exported file: each opens it on the CPU, with as many threads as torch has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The name of a file's one input, images (B, C, H, W), and of its one output, (B, D).
INPUT, OUTPUT = "images", "output"
Run = Callable[[Tensor], Tensor]


def open_pt2(path: Path) -> Run:
    """With PyTorch, on the device that the file was exported on."""
    module: Run = torch.export.load(path).module()
    return module


def open_onnxruntime(path: Path) -> Run:
    """An .onnx file with ONNX Runtime."""
    import onnxruntime

    options: Any = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.cpu().numpy()})[0])


def open_openvino(path: Path) -> Run:
    """An .onnx file with OpenVINO, in the file's own precision."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    for node in model.get_ops():
        if node.get_type_name() == "TopK":
            node.set_attribute("stable", True)  # as ONNX defines it; OpenVINO reads it as any order among equals
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "EXECUTION_MODE_HINT": "ACCURACY"}
    compiled = core.compile_model(model, "CPU", settings)
    return lambda images: torch.from_numpy(compiled(images.cpu().numpy())[0].copy())
