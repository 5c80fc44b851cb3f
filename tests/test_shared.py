"""Blocks that cells have in common with the unreduced model: computed once, and no answer changes for it."""

from __future__ import annotations

import pytest
import torch
from stand_ins import tiny_model
from tiny_vits import TINY, eva, vit

import tokbench
from tokbench.fusion.patch import fork, tokens_per_block
from tokbench.running.shared import blocks_before_removal, sharing_first_blocks

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (3, TINY["img_size"], TINY["img_size"])
CELLS = {"topk": "keep:0.5@2,3", "tome": "8", "evit": "list:0,0,0,9", "mctf": "keep:0.7@1", "ats": "keep:0.5@1,2"}


class Calls:
    """Counts the passes through each block of a model."""

    def __init__(self, model) -> None:
        self.of = [0] * len(model.blocks)
        for number, block in enumerate(model.blocks):
            block.mlp.register_forward_hook(lambda *_, number=number: self.count(number))

    def count(self, number: int) -> None:
        self.of[number] += 1


@pytest.mark.parametrize("build", [vit, eva])
def test_answers_and_tokens_are_the_same_and_the_blocks_are_not_run(build):
    base = build()
    cells = {name: tokbench.apply(fork(base), name, schedule) for name, schedule in CELLS.items()}
    before = {name: blocks_before_removal(cell.fusion) for name, cell in cells.items()}
    assert before == {"topk": 2, "tome": 0, "evit": 3, "mctf": 1, "ats": 1}
    batches = [torch.rand(size, *SIZE) for size in (3, 3, 2)]
    with torch.inference_mode():
        alone = {name: [(cell(batch), tokens_per_block(cell)) for batch in batches] for name, cell in cells.items()}
        with sharing_first_blocks(base, *cells.values(), input_size=SIZE):
            calls = {name: Calls(cell) for name, cell in cells.items()}
            for number, batch in enumerate(batches):
                base(batch)
                for name, cell in cells.items():
                    answer, tokens = alone[name][number]
                    assert torch.equal(cell(batch), answer) and tokens_per_block(cell) == tokens
            assert {name: calls[name].of for name in calls} == {
                name: [0] * count + [3] * (4 - count) for name, count in before.items()
            }
        cells["evit"](batches[0])
    assert calls["evit"].of == [1, 1, 1, 4]
    assert not any(base._forward_pre_hooks.values()) and not any(block._forward_hooks for block in base.blocks)


def test_other_images_than_the_unreduced_model_saw_last_go_all_the_way():
    base = vit()
    cell = tokbench.apply(fork(base), "topk", "keep:0.5@3")
    images = torch.rand(4, *SIZE)
    with torch.inference_mode():
        expected = cell(images)
        with sharing_first_blocks(base, cell, input_size=SIZE):
            for piece in images.split(2):  # what a model does that is short of memory
                base(piece)
            pieces = torch.cat([cell(piece) for piece in images.split(2)])
            assert torch.equal(cell(images), expected)
    torch.testing.assert_close(pieces, expected)


def test_a_cell_with_weights_of_its_own_or_that_fails_shares_nothing():
    base, other = tiny_model(), tiny_model()
    with torch.no_grad():
        other.blocks[0].mlp.fc2.bias.add_(1)
    strange, failing = (tokbench.apply(model, "topk", "keep:0.5@2") for model in (other, fork(base)))
    failing.head.register_forward_hook(lambda *_: 1 / 0)
    with torch.inference_mode():
        images = torch.rand(2, 3, 32, 32)
        expected = strange(images)
        with sharing_first_blocks(base, strange, failing, input_size=(3, 32, 32)):
            base(images)
            assert torch.equal(strange(images), expected)
            with pytest.raises(ZeroDivisionError):
                failing(images)
