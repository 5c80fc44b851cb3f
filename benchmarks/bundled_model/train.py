"""Train the bundled model: a plain timm ViT on Fashion-MNIST in clutter.

    python benchmarks/bundled_model/train.py --out vit_clutter.safetensors

Runs on a GPU if there is one, else on the CPU with one single-threaded process per core. No patch dropout and no token
fusion, so that no method is favored.

Stage 1 trains patch 8 (49 tokens, about five times cheaper). Stage 2 resamples patch and position embeddings to patch 4
(196 tokens) and continues. A temporary head also predicts for each patch token which item class covers it, if any
(token labeling, Jiang et al. 2021; labels are exact because we composed the images). The weight of that loss falls to
zero, so that training ends on plain classification.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer

from tokbench.bundled.clutter import CANVAS, CLASSES, ITEM, compose, draw_layout, read_idx

MODEL = dict(
    img_size=CANVAS, in_chans=1, num_classes=len(CLASSES), embed_dim=96, depth=12, num_heads=3, class_token=True
)
HELD_OUT = 1000  # the last items of the training split, for the log; the test split is not used
MUON_LR, ADAMW_LR, WEIGHT_DECAY = 0.02, 2e-3, 0.02


class Composites:
    """Endless batches of fresh composites, on the model's device."""

    def __init__(self, items: np.ndarray, labels: np.ndarray, seed: int, device: torch.device):
        self.items, self.labels, self.device = items, labels, device
        self.rng = np.random.RandomState(seed)

    def batch(self, size: int, patch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images (B, 1, 56, 56), classes (B,), and per patch its class or 10 for "no item here" (B, T)."""
        item = self.rng.randint(0, len(self.items), size)
        layout = draw_layout(item, len(self.items), self.rng)
        labels = torch.from_numpy(self.labels[item].astype(np.int64))
        covers = cover(self.items, layout, patch)
        patch_labels = torch.where(torch.from_numpy(covers), labels[:, None], len(CLASSES))
        images = to_input(compose(self.items, layout))
        return images.to(self.device), labels.to(self.device), patch_labels.to(self.device)


def cover(items: np.ndarray, layout, patch: int) -> np.ndarray:
    """Which patches are at least a quarter item: (B, T) bool."""
    shown = items[layout.item] > 0
    shown = np.where(layout.mirror[:, None, None], shown[:, :, ::-1], shown)
    mask = np.zeros((len(shown), CANVAS, CANVAS), np.float32)
    at = np.arange(ITEM)
    row, col = layout.place[:, 0, None, None] + at[:, None], layout.place[:, 1, None, None] + at
    mask[np.arange(len(shown))[:, None, None], row, col] = shown
    grid = CANVAS // patch
    return mask.reshape(-1, grid, patch, grid, patch).mean((2, 4)).reshape(-1, grid * grid) >= 0.25


def to_input(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images)[:, None].float().div(127.5).sub(1)


def at_patch_4(coarse: VisionTransformer) -> VisionTransformer:
    fine = VisionTransformer(patch_size=4, **MODEL)
    state = coarse.state_dict()
    state["patch_embed.proj.weight"] = resample_patch_embed(state["patch_embed.proj.weight"], [4, 4])
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [CANVAS // 4, CANVAS // 4])
    fine.load_state_dict(state)
    return fine


@torch.inference_mode()
def accuracy(model: VisionTransformer, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    hits = sum(
        (model(x).argmax(1) == y).sum().item() for x, y in zip(images.split(100), labels.split(100), strict=True)
    )
    model.train()
    return hits / len(labels)


def train_stage(model, data, images, batch, patch, lr_from_to, aux_from_to, held_out, log, bf16) -> None:
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = next(model.parameters()).device
    aux_head = torch.nn.Linear(model.embed_dim, len(CLASSES) + 1).to(device)
    if hasattr(model, "aux_state"):
        aux_head.load_state_dict(model.aux_state)
    for parameter in (*model.parameters(), *aux_head.parameters()):
        if world > 1:
            dist.broadcast(parameter.data, 0)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)] + list(aux_head.parameters())
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=ADAMW_LR, weight_decay=WEIGHT_DECAY),
    ]
    peak = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    parameters = [*matrices, *others]
    steps, start, losses = images // batch, time.time(), []
    for step in range(steps):
        done = step / steps
        scale = min(1.0, (step + 1) / 100) * (lr_from_to[0] + (lr_from_to[1] - lr_from_to[0]) * done)
        for optimizer, lr in zip(optimizers, peak, strict=True):
            optimizer.param_groups[0]["lr"] = lr * scale
        x, y, patch_y = data.batch(batch // world, patch)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tokens = model.forward_features(x)
            logits, patch_logits = model.forward_head(tokens), aux_head(tokens[:, 1:])
        aux = aux_from_to[0] + (aux_from_to[1] - aux_from_to[0]) * done
        loss = F.cross_entropy(logits.float(), y, label_smoothing=0.05)
        total = loss + aux * F.cross_entropy(patch_logits.float().flatten(0, 1), patch_y.flatten())
        total.backward()
        if world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat)
            for p, g in zip(parameters, flat.div_(world).split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(g.view_as(p))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if rank == 0 and ((step + 1) % max(1, 12800 // batch) == 0 or step + 1 == steps):
            line = dict(
                patch=patch,
                images=(step + 1) * batch,
                loss=round(float(np.mean(losses)), 4),
                held_out_top1=round(accuracy(model, *held_out), 4),
                minutes=round((time.time() - start) / 60, 1),
            )
            losses.clear()
            log.write(json.dumps(line) + "\n")
            log.flush()
            print(line, flush=True)
            torch.save({"model": model.state_dict(), "aux": aux_head.state_dict()}, log.name + f".patch{patch}.pt")
    model.aux_state = aux_head.state_dict()


def worker(rank: int, world: int, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29531")
        dist.init_process_group("gloo", rank=rank, world_size=world)
        torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    items = read_idx(args.data / "train-images-idx3-ubyte.gz")
    labels = read_idx(args.data / "train-labels-idx1-ubyte.gz")
    held = draw_layout(np.arange(len(items) - HELD_OUT, len(items)), len(items), np.random.RandomState(1))
    held_out = (
        to_input(compose(items, held)).to(device),
        torch.from_numpy(labels[held.item].astype(np.int64)).to(device),
    )

    def fresh(stage: int) -> Composites:
        seed = args.seed * 1000 + stage * 100 + rank
        return Composites(items[:-HELD_OUT], labels[:-HELD_OUT], seed, device)

    with open(args.log if rank == 0 else os.devnull, "a" if args.from_patch_8 else "w") as log:
        model = VisionTransformer(patch_size=8, **MODEL).to(device)
        bf16 = device.type == "cuda"
        if args.from_patch_8:
            saved = torch.load(args.from_patch_8, weights_only=True)
            model.load_state_dict(saved["model"])
            model.aux_state = saved["aux"]
        else:
            train_stage(model, fresh(0), args.images_8, 128, 8, (1, 0.3), (1, 0.6), held_out, log, bf16)
        aux_state = model.aux_state
        model = at_patch_4(model).to(device)
        model.aux_state = aux_state
        train_stage(model, fresh(1), args.images_4, 64, 4, (0.4, 0), (0.6, 0), held_out, log, bf16)
    if rank == 0:
        save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, args.out)
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", default="vit_clutter.safetensors")
    parser.add_argument("--log", default="train_log.jsonl")
    parser.add_argument("--images-8", type=int, default=320_000, help="training images at patch 8")
    parser.add_argument("--images-4", type=int, default=56_000, help="training images at patch 4")
    parser.add_argument("--from-patch-8", type=Path, help="a stage-one checkpoint to start stage two from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1 if torch.cuda.is_available() else os.cpu_count())
    args = parser.parse_args()
    if args.processes == 1:
        worker(0, 1, args)
    else:
        torch.multiprocessing.spawn(worker, (args.processes, args), nprocs=args.processes)


if __name__ == "__main__":
    main()
