"""Prepared images that are kept: the same as decoded ones, whatever happens to the file they are in."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import make_folder, vit

from tokbench.config import Grid, ModelSpec, RunOptions
from tokbench.data import folders, load_batches, open_dataset
from tokbench.data.cache import PixelCache
from tokbench.data.labels import without_labels
from tokbench.data.preparing import preparation
from tokbench.data.sources import ImageSource, ImageStream
from tokbench.errors import UserError
from tokbench.running import runner


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images", {"a": 3, "b": 2})


def opened(images: Path, cache: Path, channels: int = 3) -> ImageSource:
    source = open_dataset(str(images), vit(2, channels))
    assert isinstance(source, ImageSource)
    source.keep_in(cache)
    return source


def never_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "decode", lambda *_: pytest.fail("it is in the cache"))


@pytest.mark.parametrize("channels", [1, 3])
def test_what_was_kept_is_what_was_decoded(images, tmp_path, monkeypatch, channels):
    plain = [*map(open_dataset(str(images), vit(2, channels)).__getitem__, range(5))]
    for source in (opened(images, tmp_path / "cache", channels), opened(images, tmp_path / "cache", channels)):
        for index in range(5):
            assert torch.equal(source[index][0], plain[index][0]) and source[index][1] == plain[index][1]
        never_decode(monkeypatch)


def test_processes_share_what_is_kept(images, tmp_path, monkeypatch):
    first = opened(images, tmp_path / "cache")
    (batch,) = load_batches(first, 5, workers=1)
    never_decode(monkeypatch)
    assert torch.equal(torch.stack([first[index][0] for index in range(5)]), batch.images)
    sent = pickle.dumps(first)
    assert len(sent) < 20_000 and torch.equal(pickle.loads(sent)[4][0], first[4][0])


def test_a_damaged_image_is_decoded_again(images, tmp_path):
    source = opened(images, tmp_path / "cache")
    right = [source[index][0] for index in range(5)]
    (file,) = (tmp_path / "cache").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = opened(images, tmp_path / "cache")
    assert all(torch.equal(again[index][0], right[index]) for index in range(5))
    assert file.read_bytes() != bytes(content)  # and is kept again


def test_a_file_cut_short_is_made_whole(images, tmp_path):
    source = opened(images, tmp_path / "cache")
    right = source[4][0]
    (file,) = (tmp_path / "cache").iterdir()
    os.truncate(file, 100)
    assert torch.equal(opened(images, tmp_path / "cache")[4][0], right)


def test_images_that_changed_are_not_taken_for_those_before(images, tmp_path):
    before = opened(images, tmp_path / "cache")[1][0]
    path = images / "a" / "001.png"
    size = path.stat().st_size
    shutil.copy(images / "a" / "002.png", path)
    os.utime(path, ns=(1, 1))
    assert path.stat().st_size == size and not torch.equal(opened(images, tmp_path / "cache")[1][0], before)


def test_models_that_see_other_pixels_have_files_of_their_own(images, tmp_path):
    for config in ({}, {"crop_pct": 0.5}, {"mean": (0.4,) * 3}):
        source = open_dataset(str(images), vit(2, 3, **config))
        source.keep_in(tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2  # mean and standard deviation come after


def test_a_full_disk_is_told_and_stops_nothing(images, tmp_path, monkeypatch, caplog):
    source = opened(images, tmp_path / "cache")
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    right = [source[index][1] for index in range(5)]
    assert right == [0, 0, 0, 1, 1] and caplog.text.count("no more images are kept") == 1


def test_a_folder_that_cannot_hold_them_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache '.*file': images cannot be kept: .*"):
        PixelCache(tmp_path / "file" / "x.pixels", 2, (4, 4, 3))
    with pytest.raises(UserError, match=r"it takes \d+\.\d GB, more than the disk has left"):
        PixelCache(tmp_path / "x.pixels", 10**12, (224, 224, 3))
    cache = PixelCache(tmp_path / "y.pixels", 2, (4, 4, 3))
    assert cache.get(1) is None
    cache.put(1, np.full((4, 4, 3), 7, np.uint8), -1)
    assert cache.get(0) is None and cache.get(1)[1] == -1


def test_a_stream_cannot_be_kept(tmp_path, monkeypatch):
    stream = ImageStream("wds/x", [], 3, preparation(vit(2), without_labels(vit(2))), "f")
    monkeypatch.setattr(runner, "open_dataset", lambda *_, **__: stream)
    monkeypatch.setattr(runner, "load_model", lambda *_, **__: vit(2))
    grid = Grid(models=(ModelSpec("bundled"),), options=RunOptions(cache=str(tmp_path)))
    with pytest.raises(UserError, match=r"--cache: wds/x is a stream, .*"):
        runner.load_subject(grid.models[0], grid, grid.options)
