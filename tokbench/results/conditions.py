"""The conditions of runs: how two differ, what can still be compared, and whether a run can continue."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokbench.errors import UserError
from tokbench.results.records import Conditions, Manifest, ModelConditions

_MOVES_SPEED = ("device", "gpu", "cpu", "threads", "kernels", "dtype", "batch_size", "runtime", "fused_attention")
_HARDWARE = ("gpu", "cpu", "threads", "kernels")
# What predictions and speed may depend on, so that one run has one version of each.
_VERSIONS = ("tokbench", "torch", "torchvision", "timm", "onnx", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Differences:
    """How a run's conditions differ from a baseline's.

    Attributes:
        told: one clause each, such as "torch 2.9.0 → 2.10.0".
        settings: which of device, hardware, kernels, dtype, batch_size, runtime and fused attention differ; if any
            does, speed-ups are not comparable.
        caveats: what can still be compared, what cannot, and what to do about it, a sentence each.
    """

    told: list[str]
    settings: list[str]
    caveats: list[str]

    def lines(self) -> list[str]:
        """All differences as lines of text; none if nothing differs."""
        return [f"other conditions than the baseline's: {'; '.join(self.told)}", *self.caveats] if self.told else []


def differences(before: Manifest, after: Manifest, baseline: Path, has_speed: bool = False) -> Differences:
    """Compare the manifests of a baseline and of a run. has_speed: whether both have speed-ups."""
    # Runs of the first version say only what was asked for, such as batch size "auto".
    asked = before.conditions is None or after.conditions is None
    then, now = _described(before, asked), _described(after, asked)
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    told = [f"{name} {then.get(name) or 'none'} → {now.get(name) or 'none'}" for name in names]
    settings = [name for name in _MOVES_SPEED if name in names and _matters(name, then, now)]
    return Differences(told, settings, _caveats(settings, then, baseline, has_speed))


def agreed(before: Manifest, now: Manifest, what: str, grown: Collection[str] = ()) -> Conditions:
    """The conditions of the continued run: those of `before`, and of the models and data that are new in `now`.

    what: names the run. grown: models that get more images than before. Raises UserError that names every difference in
    what both have.
    """
    if before.conditions is None or now.conditions is None:
        raise UserError(f"{what} was made by an older tokbench, and cannot be continued; --fresh begins a new run.")
    then, here = _described(before), _described(now)
    hardware = (*(("gpu",) if here["device"] == "cuda" else ("cpu", "threads")), "kernels")
    found = [
        f"{name.replace('_', ' ')} was {then.get(name)} and is {here.get(name)}"
        for name in ("dtype", "device", "batch_size", "runtime", "fused_attention", *hardware, *_VERSIONS)
        if then.get(name) != here.get(name)
    ]
    found += [
        f"the plugin {name} is another one than before"
        for name, digest in now.plugins.items()
        if before.plugins.get(name, digest) != digest
    ]
    models = dict(before.conditions.models)
    for label, model in now.conditions.models.items():
        known = models.get(label, ModelConditions())
        found += _model_differences(label, known, model, label in grown)
        models[label] = known.model_copy(update=model.model_dump(exclude_none=True))
    if found:
        raise UserError(f"cannot continue {what}: {'; '.join(found)}. --fresh begins a new run beside it.")
    return before.conditions.model_copy(update={"models": models})


def _model_differences(label: str, was: ModelConditions, now: ModelConditions, grown: bool) -> Iterable[str]:
    def differ(name: str) -> bool:
        return None not in (getattr(was, name), getattr(now, name)) and getattr(was, name) != getattr(now, name)

    if differ("weights_sha256"):
        yield f"the weights of model {label!r} were {was.weights_sha256:.12}… and are {now.weights_sha256:.12}…"
    if differ("input_size"):
        yield f"the input size of model {label!r} was {was.input_size} and is {now.input_size}"
    if grown:
        return
    if differ("data") or differ("images"):
        yield f"data was {was.images:,} images of {was.data} and is {now.images:,} of {now.data}"
    elif differ("data_fingerprint"):
        yield f"the images of {now.data} are others ({now.data_fingerprint:.12}…)"


def in_words(settings: Iterable[str]) -> str:
    """Settings in words: "device and batch size"."""
    *rest, last = [name.replace("_", " ").replace("gpu", "GPU").replace("cpu", "CPU") for name in settings]
    return f"{', '.join(rest)} and {last}" if rest else last


def decide(settings: list[str]) -> str:
    return "decides" if len(settings) == 1 else "decide"


def _described(manifest: Manifest, asked: bool = False) -> dict[str, Any]:
    """All conditions by name. asked: use what was asked for if the run records no more."""
    machine = manifest.machine
    how = manifest.grid.options if asked or manifest.conditions is None else manifest.conditions.plain()
    device = (manifest.conditions and manifest.conditions.device) or machine.device
    return {
        **manifest.packages,
        "device": device.partition(":")[0] if device else None,
        **{name: getattr(machine, name, None) for name in ("gpu", "cuda", "cpu", "threads", "kernels")},
        **{name: how.get(name) for name in ("dtype", "batch_size")},
        "fused_attention": how.get("fused", "on"),
        "runtime": ", ".join(how.get("runtimes") or ["compile" if how.get("compile") else "eager"]),
    }


def _matters(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a difference in this condition matters: in hardware only if both runs used that kind of it."""
    if name not in _HARDWARE:
        return True
    return then["device"] == now["device"] and (name == "kernels" or (then["device"] == "cuda") == (name == "gpu"))


def _caveats(settings: list[str], then: Mapping[str, Any], baseline: Path, has_speed: bool) -> list[str]:
    if not settings:
        return []
    caveats = ["compared all the same: FLOPs and tokens, which depend on none of this"]
    if "dtype" in settings:
        caveats.append(
            "compared with care: top-1 and flips, as another dtype by itself changes answers: what fails may be that"
        )
    elif settings != ["runtime"]:
        caveats.append(
            "compared with care: top-1 and flips, as near-ties may fall otherwise: a few flips are no change"
        )
    if has_speed:
        caveats.append(f"not compared: speed-ups, as {in_words(settings)} {decide(settings)} them")
    gpu = f" on a machine with {then['gpu']}" if then["gpu"] and {"device", "gpu"} & set(settings) else ""
    if gpu or set(settings) - set(_HARDWARE):
        caveats.append(f"to measure as the baseline did: tokbench check --baseline {shlex.quote(str(baseline))}{gpu}")
    return caveats
