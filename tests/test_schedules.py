from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st

import tokbench
from tokbench.schedules import GRAMMAR, Schedule, ScheduleError, parse_schedule


def removals(text: str | int, depth: int = 12, patches: int = 196) -> list[int]:
    schedule, removed = parse_schedule(text), []
    for block in range(depth):
        removed.append(schedule.removals(block, depth, patches))
        patches -= removed[-1]
    return removed


def test_constant_removes_the_same_everywhere():
    assert removals("constant:13") == removals("13") == removals(13) == [13] * 12


def test_linear_falls_rises_or_stays():
    assert removals("linear:13,-1") == [26, 23, 21, 18, 16, 14, 11, 9, 7, 4, 2, 0]
    assert removals("linear:13,1") == [0, 2, 4, 7, 9, 11, 14, 16, 18, 21, 23, 26]
    assert removals("linear:13,0") == [13] * 12


def test_list_is_by_block_number_and_zero_after_its_end():
    assert removals("list:8,8,0,4", depth=6) == [8, 8, 0, 4, 0, 0]


def test_keep_acts_at_its_blocks_and_rounds_what_stays_up():
    assert removals("keep:0.7@3,6,9") == [0, 0, 0, 58, 0, 0, 41, 0, 0, 29, 0, 0]


def test_ratio_rounds_what_goes_down():
    assert removals("ratio:0.9", depth=3) == [19, 17, 16]


@pytest.mark.parametrize("example", [example for example, _ in GRAMMAR.values()])
def test_canonical_text_parses_to_the_same_schedule(example):
    assert parse_schedule(str(parse_schedule(example))) == parse_schedule(example)


@given(st.integers(1, 400), st.data())
def test_a_keep_rate_that_was_found_by_counting_survives_its_text(patches, data):
    kept = data.draw(st.integers(1, patches))
    schedule = Schedule("keep", (kept / patches,), (3, 6))
    assert parse_schedule(str(schedule)) == schedule


@given(st.floats(0.01, 1.0), st.integers(1, 2000))
def test_keep_never_removes_everything(rate, patches):
    assert 0 <= Schedule("keep", (rate,), (0,)).removals(0, 12, patches) < patches


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("thirteen", "thirteen"),
        ("keep", "keep:0.7@3,6,9"),
        ("constant:1.5", "1.5"),
        ("constant:-3", "-3"),
        ("constnat:13", "constant"),
        ("linear:13", "slope"),
        ("linear:13,2", "2"),
        ("list:8,x,0", "'x'"),
        ("keep:0.7", "@"),
        ("keep:0.7@3,b", "'b'"),
        ("keep:0.7@3,3", "once"),
        ("keep:1.7@3", "1.7"),
        ("keep:0@3", "'0'"),
        ("ratio:nan", "nan"),
        ("diffrate:small", "'small'"),
        ("flops:50", "50"),
        ("", "constant:13"),
    ],
)
def test_what_does_not_parse_is_pointed_at_in_one_line(text, part):
    with pytest.raises(ScheduleError) as error:
        parse_schedule(text)
    assert part in str(error.value) and f"'{text}'" in str(error.value) and "\n" not in str(error.value)


def test_rates_that_were_searched_for_one_model_are_looked_up_for_no_other():
    with torch.device("meta"):
        deit, vit = (timm.create_model(f"{name}_small_patch16_224") for name in ("deit", "vit"))
        mae = timm.create_model("vit_base_patch16_224", global_pool="avg")
        larger = timm.create_model("deit_small_patch16_224", img_size=256)
    fusion = tokbench.apply(deit, "diffrate", "diffrate:2.9").fusion
    assert [fusion.schedule.removals(block, 12, 196) for block in range(12)] == [
        0,
        3,
        18,
        20,
        15,
        8,
        12,
        14,
        19,
        24,
        8,
        53,
    ]
    assert fusion.method.prune == (0, 1, 4, 8, 6, 2, 4, 4, 8, 10, 6, 53)
    assert str(fusion.schedule) == "diffrate:2.9, rates searched on ImageNet-1k"
    assert parse_schedule(str(fusion.schedule)) == parse_schedule("diffrate:2.9")
    assert tokbench.apply(mae, "diffrate", "diffrate:10").fusion.schedule.found[1] == 16
    for model, method, schedule, params, words in [
        (vit, "diffrate", "diffrate:2.9", {}, "no other model's"),
        (larger, "diffrate", "diffrate:2.9", {}, "at 224×224"),
        (deit, "diffrate", "diffrate:3", {}, "there are diffrate:2.3, "),
        (deit, "diffrate", "diffrate:2.9", {"prune": 0.5}, "its own prune"),
        (deit, "tome", "diffrate:2.9", {}, "is for method 'diffrate'"),
    ]:
        with pytest.raises(tokbench.UserError, match=words):
            tokbench.apply(model, method, schedule, **params)
