"""A tiny model and plain images in place of real ones, for tests of whole runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from tokbench import data, models, resolve
from tokbench.config import Grid, MethodSpec, ModelSpec, RunOptions
from tokbench.fusion.patch import tokens_per_block
from tokbench.measure import speed
from tokbench.measure.environment import Disturbance
from tokbench.measure.flops import FlopCount, count_flops
from tokbench.progress import Progress
from tokbench.results.folder import RunFolder
from tokbench.running import bench, runner, timing

IMAGES, CLASSES = 24, 3


class Source(torch.utils.data.Dataset):
    """Images whose class is plain to see for a model that averages: its channel is the brightest."""

    name, fingerprint, num_classes, classes, streaming = "blobs", "f" * 64, CLASSES, None, False
    warnings, among = (), None

    def __init__(self, count: int = IMAGES):
        self.count = count
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.count

    @property
    def indices(self) -> np.ndarray:
        return np.arange(self.count)

    def limited(self, limit: int | None) -> Source:
        """The first ones, as of a stream; the fingerprint tells how many."""
        if limit is None or limit >= self.count:
            return self
        part = Source(limit)
        part.fingerprint = f"{limit:064d}"
        return part

    def pixels(self, index: int):
        return self[index]

    def floats(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def __getitem__(self, index: int):
        self.read.append(index)
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index))
        image[index % CLASSES] += 1
        return image, index % CLASSES


def tiny_model(depth: int = 4) -> VisionTransformer:
    """A ViT of 64 patches that reads the class off the mean patch."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=24, depth=depth, num_heads=2, num_classes=CLASSES, global_pool="avg"
    )
    with torch.no_grad():
        for block in model.blocks:
            block.attn.proj.weight.mul_(0.01)
            block.mlp.fc2.weight.mul_(0.01)
        model.pos_embed.zero_()
        for channel in range(CLASSES):
            model.patch_embed.proj.weight[channel].zero_()
            model.patch_embed.proj.weight[channel, channel] = 0.2
        model.head.weight.zero_()
        model.head.weight[:, :CLASSES] = torch.eye(CLASSES)
    return model.eval()


_COUNTS: dict[Any, FlopCount] = {}


def count_once(model: Any, input_size: Any = None, *, images: torch.Tensor | None = None) -> FlopCount:
    """`count_flops`, which traces for a quarter of a second, but once for a method in models of one architecture."""
    if images is not None:
        return count_flops(model, input_size, images=images)
    fusion, attention = getattr(model, "fusion", None), [block.attn.fused_attn for block in model.blocks]
    architecture = [(parameter.shape, parameter.dtype, parameter.device) for parameter in model.parameters()]
    key = str((fusion and (fusion.method, str(fusion.schedule)), attention, architecture, input_size))
    if key not in _COUNTS:
        _COUNTS[key] = count_flops(model, input_size)
    return _COUNTS[key]


def count_by_tokens(model: Any, input_size: Any, images: torch.Tensor | None = None) -> FlopCount:
    """Blocks cost what their tokens say."""
    model(torch.rand(1, *input_size) if images is None else images)
    after = tokens_per_block(model)
    before = [model.patch_embed.num_patches + model.num_prefix_tokens, *after[:-1]]
    blocks = [n * n + 100 * (n + m) for n, m in zip(before, after, strict=True)]
    return FlopCount(sum(blocks) + 1000, {f"blocks.{i}": cost for i, cost in enumerate(blocks)}, {}, {})


def count_each_once(monkeypatch) -> None:
    """For runs whose methods count the same in every test."""
    for module in (bench, resolve):
        monkeypatch.setattr(module, "count_flops", count_once)


def stand_in(monkeypatch, source: Source) -> Source:
    """Put the tiny model and these images behind every name. Timing is short; on the CPU no garbage is collected."""
    monkeypatch.setattr(runner, "load_model", lambda name, checkpoint, input_size: tiny_model())
    monkeypatch.setattr(runner, "open_dataset", lambda spec, model, limit, labels=None: source.limited(limit))
    count_each_once(monkeypatch)
    monkeypatch.setattr(timing, "SPEED_SECONDS_PER_CELL", 0.001)
    monkeypatch.setattr(speed, "ESTIMATE_SECONDS", 0)
    if not torch.cuda.is_available():
        for module in (bench, timing):
            monkeypatch.setattr(module, "release_memory", lambda device: None)
    quiet = Disturbance(0.0, None, ())
    monkeypatch.setattr(
        timing, "Watch", lambda device: SimpleNamespace(begin=lambda: None, look=lambda: None, stop=lambda: quiet)
    )
    monkeypatch.setattr(timing, "vague_speedups", lambda results: [])
    return source


def stand_in_for_checks(monkeypatch, source: Source) -> Source:
    """As `stand_in`, and where `tokbench check` opens a baseline's model and images again."""
    stand_in(monkeypatch, source)
    monkeypatch.setattr(models, "load_model", runner.load_model)
    monkeypatch.setattr(data, "open_dataset", runner.open_dataset)
    return source


class Listener(Progress):
    def __init__(self) -> None:
        self.told: list[tuple] = []
        self.warnings: list[str] = []

    def phase(self, name, total):
        self.told.append(("phase", name, total))

    def advance(self, done):
        self.told.append(("advance", done))

    def warn(self, text):
        self.warnings.append(text)

    def finished(self, cells, plots):
        self.told.append(("finished", len(cells), [plot.name for plot in plots]))


def small_grid(*methods: MethodSpec, models: tuple[ModelSpec, ...] = (ModelSpec("tiny"),), **options) -> Grid:
    methods = methods or (MethodSpec("tome", ("8",)), MethodSpec("random", ("8",)))
    return Grid(models=models, methods=methods, options=RunOptions(device="cpu", batch_size=10, **options))


def plain_records(run: Path) -> list[dict[str, Any]]:
    """A run's records as JSON has them."""
    return [record.plain() for record in RunFolder.open(run).records()]
