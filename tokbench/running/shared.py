"""The blocks that cells have in common with the unreduced model, computed once for all in a pass over the images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tokbench.fusion.blocks import Fusion
from tokbench.measure._model import evaluation_mode, placement


def blocks_before_removal(fusion: Fusion) -> int:
    """How many blocks come before the first that removes tokens."""
    tokens = fusion.prefix + prod(fusion.grid)
    return next((block for block in range(fusion.depth) if fusion.to_remove(block, tokens)), fusion.depth)


@contextmanager
def sharing_first_blocks(base: Any, *cells: Any, input_size: tuple[int, ...]) -> Iterator[None]:
    """Inside, cells that are shown images right after `base`, the unreduced model, take over what its blocks made of
    these before the cell's first removal.

    Answers stay the same, bit for bit: a cell whose answer to a random image does not, shares nothing, nor does one
    that fails. input_size: (C, H, W).
    """
    with ExitStack() as stack:
        first = _FirstBlocks(base, stack)
        for cell in cells:
            if cell not in _ALIKE:
                _ALIKE[cell] = blocks_before_removal(cell.fusion) > 0 and _answers_alike(first, cell, input_size)
            if _ALIKE[cell]:
                first.share_with(cell, stack)
        yield


# Whether cells answer alike when they share: workers show the same ones many ranges of images.
_ALIKE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _answers_alike(first: _FirstBlocks, cell: Any, input_size: tuple[int, ...]) -> bool:
    device, dtype = placement(cell)
    image = torch.rand(1, *input_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.inference_mode(), evaluation_mode([first.base, cell]), ExitStack() as stack:
        try:
            alone = cell(image)
            first.share_with(cell, stack)
            first.base(image)
            return torch.equal(cell(image), alone)
        except Exception:  # it will fail in the pass, too, where that is recorded
            return False


class _FirstBlocks:
    """What the unreduced model's blocks gave for the images that it was last shown."""

    def __init__(self, base: Any, until: ExitStack) -> None:
        self.base = base
        self._given: dict[int, Tensor] = {}  # by block
        self._images: object = None
        until.callback(base.register_forward_pre_hook(self._begin).remove)

    def _begin(self, base: Any, images: tuple[Tensor, ...]) -> None:
        self._given.clear()
        self._images = _which(images[0])

    def share_with(self, cell: Any, until: ExitStack) -> None:
        """Let a cell take over blocks, until the stack is closed."""
        fusion, before, same = cell.fusion, blocks_before_removal(cell.fusion), False

        def keep(block: Any, args: Any, output: Tensor) -> None:
            self._given[before] = output

        def look(cell: Any, images: tuple[Tensor, ...]) -> None:
            nonlocal same
            same = _which(images[0]) == self._images  # not where one of them had to halve the batch

        def taking_over(block: Any) -> Any:
            def forward(x: Tensor, *args: Any, **options: Any) -> Tensor:
                if not same:
                    return type(block).forward(block, x, *args, **options)  # type: ignore[no-any-return]
                if block.index == 0:
                    fusion.begin(x)
                fusion.finish(0, int(x.shape[1]))
                return self._given[before] if block.index == before - 1 else x

            return forward

        until.callback(self.base.blocks[before - 1].register_forward_hook(keep).remove)
        until.callback(cell.register_forward_pre_hook(look).remove)
        for block in cell.blocks[:before]:
            block.forward = taking_over(block)
            until.callback(block.__dict__.pop, "forward")


def _which(images: Tensor) -> object:
    """What tells images apart as long as they are there."""
    return images.data_ptr(), images.shape
