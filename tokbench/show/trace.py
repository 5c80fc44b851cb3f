"""Follow an image's patches through a model: methods are applied, and what became of each patch is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokbench.calibrate import wants_images
from tokbench.config import MethodSpec
from tokbench.data import load_images, to_pictures
from tokbench.errors import UserError
from tokbench.fusion.core import make_method
from tokbench.fusion.patch import fork, require_supported, token_map
from tokbench.models import load_model
from tokbench.report.canvas import require_format
from tokbench.report.styles import find_theme
from tokbench.report.text import short_schedule, variant_name
from tokbench.resolve import apply
from tokbench.schedules import parse_schedule
from tokbench.show.tokens import TokenGrid, TokenRow, draw_tokens


@dataclass(frozen=True)
class Trace:
    """What one method did to some images.

    maps: (L, B, rows, columns) int, after each block the token that each patch belongs to, −1 where it was dropped.
    """

    method: MethodSpec
    maps: np.ndarray

    @property
    def name(self) -> str:
        return variant_name(self.method.name, str(self.method))


def trace_tokens(model: nn.Module, images: Tensor, method: MethodSpec, schedule: str) -> Trace:
    """Run `method` in a fork of a model on images (B, C, H, W); the model itself is left alone.

    Parameters that a method measures on the model (ToFu's `prune_blocks=auto`) are measured on these images.

    Raises UserError as `tokbench.apply` does, and for "none", which leaves every patch as it is.
    """
    _require_method(method)
    vit: Any = fork(model)
    measured_on = images if wants_images(make_method(method.name, **method.params)) else None
    traced: Any = apply(vit, method.name, schedule, trace=True, images=measured_on, **method.params)
    maps: list[Tensor] = []
    for block in traced.blocks:
        block.register_forward_hook(lambda *_: maps.append(token_map(traced)))
    with torch.inference_mode():
        traced(images)
    rows, columns = traced.fusion.grid
    prefix = traced.num_prefix_tokens
    patches = torch.stack(maps)[:, :, prefix:]
    return Trace(method, patches.reshape(len(maps), len(images), rows, columns).cpu().numpy())


def show(
    images: Sequence[str],
    out: str | Path,
    *,
    model: str = "bundled",
    checkpoint: str | Path | None = None,
    input_size: int | None = None,
    methods: Sequence[str] = ("tome", "tofu", "mctf", "evit"),
    schedule: str = "flops:0.5",
    blocks: bool = False,
    theme: str = "light",
) -> Path:
    """Draw what methods make of images, as the model sees them: preprocessed and cropped. Returns `out`.

    images: files, or `bundled:17` for the 17th bundled image. methods: as on the command line, `tome` or
    `tome:prop_attn=false`. blocks: the tokens after each block that removes some, instead of the last ones with
    their sizes. Raises UserError for anything that cannot be read, applied or written.
    """
    require_format(Path(out))
    find_theme(theme)
    parse_schedule(schedule)
    specs = [MethodSpec.from_text(text) for text in methods]
    for spec in specs:
        _require_method(spec)
    vit: Any = load_model(model, checkpoint, input_size=input_size)
    require_supported(vit)
    batch = load_images(images, vit)
    traces = [trace_tokens(vit, batch, spec, schedule) for spec in specs]
    rows = _rows([Path(name).name for name in images], to_pictures(batch, vit), traces, blocks)
    heading = f"{model}, {short_schedule(schedule)}; numbers: patch tokens left of {traces[0].maps[0, 0].size}"
    return draw_tokens(rows, out, heading=heading, sizes=not blocks, theme=theme)


def _require_method(method: MethodSpec) -> None:
    if method.name == "none":
        raise UserError("method 'none' leaves every patch as it is, so there is nothing to show.")
    method.check()


def _rows(names: Sequence[str], pictures: np.ndarray, traces: Sequence[Trace], blocks: bool) -> list[TokenRow]:
    """A row for each image. blocks: one for each image and method, with a picture of each block that removed some."""
    rows = []
    for index, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        if not blocks:
            rows.append(TokenRow(name, picture, [_grid(trace.name, trace.maps[-1, index]) for trace in traces]))
            continue
        for trace in traces:
            left = [trace.maps[0, index].size, *(TokenGrid("", grid).count() for grid in trace.maps[:, index])]
            acting = [block for block, (before, after) in enumerate(pairwise(left)) if before != after]
            grids = [_grid(f"block {block}", trace.maps[block, index]) for block in acting]
            grids = grids or [_grid("nothing removed", trace.maps[-1, index])]
            rows.append(TokenRow(f"{name}: {trace.name}" if len(names) > 1 else trace.name, picture, grids))
    return rows


def _grid(title: str, token: np.ndarray) -> TokenGrid:
    return TokenGrid(f"{title}: {TokenGrid('', token).count()}", token)
