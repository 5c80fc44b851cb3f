"""Pictures of merged tokens: what is drawn is the token map, of the image as the model sees it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from stand_ins import tiny_model

import tokbench
from tokbench.config import MethodSpec
from tokbench.data import load_images, to_pictures
from tokbench.data.preparing import data_config
from tokbench.errors import UserError
from tokbench.fusion.core import METHODS
from tokbench.report.text import broken
from tokbench.show import tokens, trace
from tokbench.show.tokens import TokenGrid, TokenRow, _borders, draw_tokens, mean_colors
from tokbench.show.trace import show, trace_tokens

# Two rows of three patches: one token of three, one of two, and one patch dropped.
GRID = TokenGrid("made up", np.array([[5, 5, 9], [5, 9, -1]]))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "load_model", lambda name, checkpoint, input_size: tiny_model())


# --- drawing, from arrays alone


def test_sizes_count_the_patches_of_each_token() -> None:
    np.testing.assert_array_equal(GRID.sizes(), [[3, 3, 2], [3, 2, np.nan]])
    assert GRID.count() == 2


def test_a_token_has_the_mean_color_of_its_patches() -> None:
    image = np.zeros((4, 6, 3))
    image[:, :, 0] = np.kron([[0.3, 0.6, 0.2], [0.9, 0.4, 1.0]], np.ones((2, 2)))
    red = mean_colors(image, GRID.token)[..., 0]
    assert red[0, 0] == red[0, 1] == red[1, 0] == pytest.approx(0.6)
    assert red[0, 2] == red[1, 1] == pytest.approx(0.3)


def test_borders_lie_between_different_tokens_only() -> None:
    pieces = {tuple(map(tuple, piece)) for piece in _borders(GRID.token)}
    assert pieces == {
        ((2, 0), (2, 1)),  # 5 | 9
        ((1, 1), (1, 2)),  # 5 | 9
        ((2, 1), (2, 2)),  # 9 | dropped
        ((1, 1), (2, 1)),  # 5 over 9
        ((2, 1), (3, 1)),  # 9 over dropped
    }


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_pictures_are_written_by_suffix(tmp_path: Path, suffix: str, start: bytes) -> None:
    row = TokenRow("made up", np.full((4, 6, 3), 0.5), [GRID])
    out = draw_tokens([row, row], tmp_path / "new" / f"tokens.{suffix}", theme="dark")
    assert out.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("ToMe: 16", 20, ["ToMe: 16"]),
        ("mctf:attn_track=false,bidirectional=false: 4", 25, ["mctf:attn_track=false,", "bidirectional=false: 4"]),
        ("ILSVRC2012_val_00000001.JPEG: 4", 17, ["ILSVRC2012_val_", "00000001.JPEG: 4"]),
        ("nothingtobreak: 4", 8, ["nothingtobreak:", "4"]),
        ("", 8, [""]),
    ],
)
def test_lines_end_where_words_or_parameters_do(text: str, width: int, lines: list[str]) -> None:
    assert broken(text, width).split("\n") == lines


def test_long_titles_are_broken_before_they_run_into_each_other(tmp_path: Path, monkeypatch: Any) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(tokens, "save", lambda figure, *_, **__: figures.append(figure))
    grid = TokenGrid("mctf:attn_track=false,bidirectional=false: 4", np.arange(4).reshape(2, 2))
    long = TokenGrid("a" * 60, grid.token)
    row = TokenRow("an_image_with_a_long_name_1.JPEG", np.zeros((8, 8, 3)), [long, grid])
    heading = (
        "vit_small_patch16_224.augreg_in21k_ft_in1k, keep 0.7@3,6,9; numbers: patch tokens left of 196, of one image"
    )
    draw_tokens([row], tmp_path / "a.png", heading=heading)
    (figure,) = figures
    figure.draw_without_rendering()
    titles = [panel.title.get_window_extent() for panel in figure.axes[:3]]
    assert all(left.x1 < right.x0 for left, right in pairwise(titles))
    assert figure.get_suptitle().count("\n") == 1
    (above,) = [text for text in figure.texts if text.get_text().startswith("vit_small")]
    assert above.get_window_extent().x1 < figure.bbox.x1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_word_stands_out_from_the_background(tmp_path: Path, monkeypatch: Any, theme: str) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(tokens, "save", lambda figure, *_, **__: figures.append(figure))
    draw_tokens([TokenRow("made up", np.zeros((4, 6, 3)), [GRID])], tmp_path / "a.png", heading="head", theme=theme)
    (figure,) = figures
    figure.draw_without_rendering()
    words = [text for text in figure.findobj(Text) if text.get_text()]
    told = {text.get_text() for text in words}
    assert {"head", "made up", "1", "patches in the token (hatched: dropped)"} <= told
    background = sum(to_rgb(figure.get_facecolor()))
    assert all(abs(sum(to_rgb(text.get_color())) - background) > 1.2 for text in words)


def test_everything_dropped_can_be_drawn(tmp_path: Path) -> None:
    row = TokenRow("gone", np.zeros((4, 6, 3)), [TokenGrid("gone", np.full((2, 3), -1))])
    assert draw_tokens([row], tmp_path / "a.png").is_file()


# --- what the model saw


def test_the_picture_is_the_preprocessed_crop(photo: Path) -> None:
    model = tiny_model()
    images = load_images([str(photo)], model)
    pictures = to_pictures(images, model)
    assert images.shape == (1, 3, 32, 32) and pictures.shape == (1, 32, 32, 3)
    assert pictures.min() >= 0 and pictures.max() <= 1
    config: Any = data_config(model)
    mean, std = (np.reshape(config[key], (3, 1, 1)) for key in ("mean", "std"))
    back = (pictures[0].transpose(2, 0, 1) - mean) / std
    np.testing.assert_allclose(back, images[0].numpy(), atol=1e-5)


def test_bundled_images_are_counted_from_one() -> None:
    model = tokbench.load_model()
    source = tokbench.open_dataset("bundled", model)
    images = load_images(["bundled:1", "bundled:17"], model)
    assert torch.equal(images[0], source[0][0]) and torch.equal(images[1], source[16][0])
    assert to_pictures(images, model).shape == (2, 56, 56, 3)  # grey, drawn in three channels
    for wrong in ("bundled:0", "bundled:10001", "bundled:x", "bundled"):
        with pytest.raises(UserError, match="bundled:1 to bundled:10000"):
            load_images([wrong], model)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_followed(name: str, photo: Path) -> None:
    model = tiny_model()
    images = load_images([str(photo)] * 2, model)
    schedule = "keep:0.5@1,2" if METHODS[name].flops_shape == "keep" else "8"
    found = trace_tokens(model, images, MethodSpec(name), schedule)
    assert found.maps.shape == (4, 2, 8, 8)
    assert not hasattr(model, "fusion")  # the model itself was left alone

    other: Any = tokbench.apply(tiny_model(), name, schedule, trace=True)
    other(images)
    np.testing.assert_array_equal(found.maps[-1].reshape(2, 64), tokbench.token_map(other)[:, 1:].numpy())
    left = [TokenGrid("", found.maps[block, 0]).count() for block in range(4)]
    assert left == [tokens - 1 for tokens in tokbench.tokens_per_block(other)]  # without the class token


def test_tofu_measures_where_to_prune_on_the_images(photo: Path) -> None:
    model = tiny_model()
    images = load_images([str(photo)], model)
    found = trace_tokens(model, images, MethodSpec.from_text("tofu:prune_blocks=auto"), "8")
    assert (found.maps[-1] < 0).any() and TokenGrid("", found.maps[-1, 0]).count() == 64 - 4 * 8


def test_blocks_that_remove_something_are_shown(tiny: None, photo: Path, tmp_path: Path, monkeypatch: Any) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(trace, "draw_tokens", lambda rows, out, **options: drawn.append((rows, options)) or out)
    show([str(photo)], tmp_path / "a.png", methods=["topk", "tome"], schedule="keep:0.5@1,3", blocks=True)
    rows, options = drawn[0]
    assert [row.label for row in rows] == ["top-k", "ToMe"] and options["sizes"] is False
    assert [grid.title for grid in rows[0].grids] == ["block 1: 32", "block 3: 16"]
    show([str(photo)], tmp_path / "a.png", methods=["tome"], schedule="0", blocks=True)
    assert [grid.title for grid in drawn[1][0][0].grids] == ["nothing removed: 64"]


def test_several_images_make_a_grid(tiny: None, photo: Path, tmp_path: Path) -> None:
    one = show([str(photo)], tmp_path / "one.png", methods=["tome"], schedule="8")
    two = show([str(photo), str(photo)], tmp_path / "two.png", methods=["tome", "random:seed=1"], schedule="8")
    (wide, high), (wider, higher) = Image.open(one).size, Image.open(two).size
    assert wider > wide and higher > 1.7 * high


def test_bad_input_is_one_line(tiny: None, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    (tmp_path / "text.png").write_text("no image")
    for images, options, answer in [
        ([str(tmp_path / "phto.png")], {}, "does not exist. Did you mean 'photo.png'"),
        ([str(tmp_path)], {}, "is a folder"),
        ([str(tmp_path / "text.png")], {}, "cannot be decoded"),
        ([str(photo)], {"methods": ["none"]}, "nothing to show"),
        ([str(photo)], {"methods": ["tme"]}, "Did you mean 'tome'"),
        ([str(photo)], {"schedule": "kep:0.5@3"}, "Did you mean 'keep'"),
        ([str(photo)], {"theme": "black"}, "light, dark"),
    ]:
        with pytest.raises(UserError, match=answer):
            show(images, out, **{"methods": ["tome"], "schedule": "8", **options})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="png, svg, pdf"):
        show([str(photo)], tmp_path / "a.gif")
    assert not out.exists()
