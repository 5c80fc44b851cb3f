"""Searches for a loaded model, with their results kept for the next time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import platformdirs
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.config import MethodSpec, Searched
from tokbench.errors import UserError
from tokbench.fusion.core import make_method
from tokbench.progress import Progress
from tokbench.schedules import Schedule
from tokbench.searching.budget import parse_budget
from tokbench.searching.images import written_marks
from tokbench.searching.objective import Memory, Workers
from tokbench.searching.search import Found, Search
from tokbench.validation import validated

# Part of the key of kept results: increase it when the search finds other schedules.
_VERSION = 3


def search(
    model: VisionTransformer,
    method: str,
    budget: str,
    *,
    images: Tensor,
    batch_size: int = 16,
    seed: int = 0,
    seconds: float = float("inf"),
    progress: Progress | None = None,
    **params: Any,
) -> Schedule:
    """The removals per block that change the model's answers least within a budget, as a `list:` schedule for `apply`.

    Args:
        model: a timm ViT; a method in it is left where it is.
        method: a name from `list_methods()`.
        budget: "flops:0.35", at most that share of the unreduced model's FLOPs, or "speedup:1.5", as timed here.
        images: (B, C, H, W), preprocessed, about 256, and none that will be measured on.
        batch_size: of the timing, for a speed-up.
        seed: of the search.
        seconds: time limit. Searches that it cuts short do not repeat exactly.
        progress: told what happens; silent by default.
        params: the method's own parameters.

    Raises:
        UserError: an unknown method, parameter or budget, or a budget that the method cannot reach on this model.
    """
    made, parsed = _searchable(method, params), parse_budget(budget)
    if not len(images):
        raise UserError("there are no images to search on")
    return Search(
        model, made, parsed, images,
        batch_size=batch_size, seed=seed, seconds=seconds, progress=progress or Progress(),
    ).run().schedule  # fmt: skip


def _searchable(name: str, params: dict[str, Any]) -> Any:
    if name == "none":
        raise UserError("method 'none' is the unreduced model: it has no schedule to search")
    method = make_method(name, **params)
    if method.speed_only:
        raise UserError(f"method '{name}' is a control for speed: nothing tells a good schedule of it from a bad one")
    return method


@dataclass
class Searcher:
    """Searches for one loaded model; earlier results for the same weights and images are returned at once.

    label, weights: of the model, as in records. model: on the device and in the dtype to search in. data, images: the
    argument and the result of `search_images`. marks: what these are known by. workers: have the same images and model.
    """

    label: str
    weights: str
    model: VisionTransformer
    data: str
    images: Tensor
    batch_size: int
    progress: Progress
    seed: int = 0
    seconds: float = float("inf")
    tune: bool = False
    workers: Workers | None = None
    current: Search | None = None

    def __post_init__(self) -> None:
        parameter = next(self.model.parameters())
        self.shown = self.images.to(parameter.device, parameter.dtype)
        self.marks = written_marks(self.images)

    def search(self, method: MethodSpec, budget: str) -> Searched:
        """The searched schedule for a budget. Raises UserError if the method cannot reach it."""
        made = _searchable(method.name, method.params)
        goal = parse_budget(budget)
        kept = _folder() / f"{self._key(method, goal, self.seed, self.tune)}.json"
        if found := _kept(kept):
            return replace(found, model=self.label)
        self.current = Search(
            self.model, made, goal, self.shown, self.batch_size, self.seed, seconds=self.seconds,
            tune=self.tune, progress=self.progress, memory=Memory(_folder() / f"{self._key(method)}.jsonl"),
            workers=self.workers,
        )  # fmt: skip
        searched = self._written(method, budget, self.current.run())
        self.current = None
        kept.write_text(json.dumps(asdict(searched)), encoding="utf-8")
        return searched

    def so_far(self, method: MethodSpec, budget: str) -> Searched | None:
        """The best of an interrupted search; None if nothing was tried yet."""
        found = self.current.found() if self.current else None
        return None if found is None else self._written(method, budget, found)

    def _written(self, method: MethodSpec, budget: str, found: Found) -> Searched:
        params = {**method.params, **(found.method.parameters() if self.tune else {})}
        device, dtype = self._placement()
        return Searched(
            model=self.label,
            weights_sha256=self.weights,
            method=method.name,
            params=json.loads(json.dumps(params)),
            budget=str(parse_budget(budget)),
            schedule=str(found.schedule),
            usual=str(found.usual),
            distance=found.distance,
            usual_distance=found.before,
            predicted=float(found.predicted),
            cost=found.cost,
            data=self.data,
            images=found.images,
            marks=self.marks,
            seed=self.seed,
            passes=found.passes,
            device=device,
            dtype=dtype,
        )

    def _placement(self) -> tuple[str, str]:
        parameter = next(self.model.parameters())
        return parameter.device.type, str(parameter.dtype).removeprefix("torch.")

    def _key(self, method: MethodSpec, *more: Any) -> str:
        about = [_VERSION, self.weights, str(method), self.marks, self._placement(), *map(str, more)]
        return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:32]


def _folder() -> Path:
    folder = platformdirs.user_cache_path("tokbench") / "search"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _kept(path: Path) -> Searched | None:
    """An earlier result; None if there is no such file, or it is half written or of another version."""
    try:
        return validated(Searched, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, UserError):
        return None
