"""What two runs were measured under: where that differs, and what the difference leaves to compare."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MOVES_SPEED = ("device", "gpu", "cpu", "threads", "dtype", "batch_size", "compile")
_HARDWARE = ("gpu", "cpu", "threads")


@dataclass(frozen=True)
class Differences:
    """How a run's conditions differ from a baseline's.

    Attributes:
        told: one clause each, such as "torch 2.9.0 → 2.10.0".
        settings: which of device, hardware, dtype, batch_size and compile are others; speed-ups are not comparable
            where any is.
        caveats: what can be compared all the same, what cannot, and what to do about it, a sentence each.
    """

    told: list[str]
    settings: list[str]
    caveats: list[str]

    def lines(self) -> list[str]:
        """All of it for people; nothing where nothing differs."""
        return [f"other conditions than the baseline's: {'; '.join(self.told)}", *self.caveats] if self.told else []


def differences(
    before: Mapping[str, Any], after: Mapping[str, Any], baseline: Path, has_speed: bool = False
) -> Differences:
    """Compare the manifests of a baseline and of a run. has_speed: whether both have speed-ups."""
    # Older runs say only what was asked for, such as batch size "auto".
    asked = not all("conditions" in manifest for manifest in (before, after))
    then, now = (_conditions(manifest, asked) for manifest in (before, after))
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    told = [f"{name} {then.get(name) or 'none'} → {now.get(name) or 'none'}" for name in names]
    settings = [name for name in _MOVES_SPEED if name in names and _matters(name, then, now)]
    return Differences(told, settings, _caveats(settings, then, baseline, has_speed))


def in_words(settings: Iterable[str]) -> str:
    """Settings as one says them: "device and batch size"."""
    *rest, last = [name.replace("_", " ").replace("gpu", "GPU").replace("cpu", "CPU") for name in settings]
    return f"{', '.join(rest)} and {last}" if rest else last


def decide(settings: list[str]) -> str:
    return "decides" if len(settings) == 1 else "decide"


def _conditions(manifest: Mapping[str, Any], asked: bool) -> dict[str, Any]:
    machine, options = manifest.get("machine") or {}, (manifest.get("grid") or {}).get("options") or {}
    how = options if asked else manifest["conditions"]
    device = (manifest.get("conditions") or {}).get("device") or machine.get("device")
    return {
        **(manifest.get("packages") or {}),
        "device": str(device).partition(":")[0] if device else None,
        **{key: machine.get(key) for key in ("gpu", "cuda", "cpu", "threads")},
        **{key: how.get(key) for key in ("dtype", "batch_size")},
        "compile": "on" if how.get("compile") else "off",
    }


def _matters(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a difference in this matters by itself: hardware only where both runs computed on that kind of it."""
    if name not in _HARDWARE:
        return True
    return then["device"] == now["device"] and (then["device"] == "cuda") == (name == "gpu")


def _caveats(settings: list[str], then: Mapping[str, Any], baseline: Path, has_speed: bool) -> list[str]:
    if not settings:
        return []
    caveats = ["compared all the same: FLOPs and tokens, which depend on none of this"]
    if "dtype" in settings:
        caveats.append(
            "compared with care: top-1 and flips, as another dtype by itself changes answers: what fails may be that"
        )
    elif settings != ["compile"]:
        caveats.append(
            "compared with care: top-1 and flips, as near-ties may fall otherwise: a few flips are no change"
        )
    if has_speed:
        caveats.append(f"not compared: speed-ups, as {in_words(settings)} {decide(settings)} them")
    gpu = f" on a machine with {then['gpu']}" if then["gpu"] and {"device", "gpu"} & set(settings) else ""
    if gpu or set(settings) - set(_HARDWARE):
        caveats.append(f"to measure as the baseline did: tokbench check --baseline {shlex.quote(str(baseline))}{gpu}")
    return caveats
