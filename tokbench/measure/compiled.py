"""`torch.compile` for many models in one process."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def compile_model(model: Model, *, backend: str | Callable[..., Any] = "inductor") -> Model:
    """Compile a model in place, as `model.compile()` does, for one shape at a time and without graph breaks.

    torch caches compiled code by code object, which all models of one class share: from the ninth model on
    (`torch._dynamo.config.recompile_limit`) they would run uncompiled, with only a line in the log. Here every model
    gets a code object of its own, so there is no limit and no model evaluates the guards of the others.
    A model that cannot be compiled raises torch's error. Copies of the model (`fork`, pickle) are not compiled.
    """

    def call(*inputs: Any, **named: Any) -> Any:
        return model._call_impl(*inputs, **named)

    own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    model._compiled_call_impl = torch.compile(own, backend=backend, dynamic=False, fullgraph=True)
    return model
