"""Every kind of image file one meets: decoded as a person would see it, or skipped, counted and named."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import make_folder, vit
from PIL import Image
from stand_ins import Listener, plain_records, small_grid, tiny_model

from tokbench import data
from tokbench.config import MethodSpec, RunOptions
from tokbench.data import decoding, folders, load_batches, open_dataset, timm_readers
from tokbench.data.decoding import ImageError, decode
from tokbench.errors import RunStopped
from tokbench.results.folder import RunFolder
from tokbench.results.predictions import Predictions
from tokbench.running import runner
from tokbench.running.half_pass import HalfPass
from tokbench.running.reader import Reader

RAMP = np.tile(np.linspace(0, 255, 32, dtype=np.uint8), (24, 1))  # 24 × 32, dark on the left


def pixels(path: Path) -> np.ndarray:
    return np.asarray(decode(path, path.name).convert("RGB"))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(path: Path) -> Path:
    """A PNG of a few bytes that says it is 30,000 pixels wide and high."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0")) + png_chunk(b"IEND", b""))
    return path


def zoo(folder: Path) -> dict[str, bool]:
    """Fill a folder with odd image files: for each, whether it can be decoded."""
    folder.mkdir(parents=True, exist_ok=True)
    colour = Image.fromarray(np.stack([RAMP, RAMP[:, ::-1], 255 - RAMP // 2], axis=-1))
    kinds: dict[str, bool] = {}

    def save(name: str, image: Image.Image, good: bool = True, **options: object) -> Path:
        image.save(folder / name, **options)
        kinds[name] = good
        return folder / name

    save("plain.png", colour)
    save("cmyk.jpg", colour.convert("CMYK"))
    save("sixteen.png", Image.fromarray(RAMP.astype(np.uint16) * 257))
    save("sixteen.tif", Image.fromarray(RAMP.astype(np.uint16) * 257))
    save("palette.png", colour.convert("P"), transparency=0)
    save("alpha.png", colour.convert("RGBA"))
    save("one.png", colour.resize((1, 1)))
    save("wide.png", colour.resize((20000, 120)))
    frames = [colour, Image.new("RGB", colour.size)]
    save("animated.gif", frames[0], save_all=True, append_images=frames[1:])
    save("animated.webp", frames[0], save_all=True, append_images=frames[1:], lossless=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    save("turned.jpg", colour, exif=turned, quality=95)
    save("line\nbreak.png", colour)
    name = os.fsdecode(b"latin-\xe9.png")
    save(name, colour)
    save("narrow.png", Image.new("L", (20000, 1)), good=False)
    save("float.tif", Image.fromarray(RAMP.astype(np.float32)), good=False)
    save("wideint.tif", Image.fromarray(RAMP.astype(np.int32) * 100000), good=False)
    whole = save("whole.jpg", colour).read_bytes()
    rest = {
        "cut.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"no image at all",
        "html.png": b"<html>",
    }
    for broken, content in rest.items():
        (folder / broken).write_bytes(content)
    bomb(folder / "bomb.png")
    (folder / "gone.png").symlink_to(folder / "nowhere")
    return kinds | dict.fromkeys([*rest, "bomb.png", "gone.png"], False)


@pytest.fixture(scope="module")
def animals(tmp_path_factory) -> tuple[Path, dict[str, bool]]:
    folder = tmp_path_factory.mktemp("zoo")
    return folder, zoo(folder / "class")


def test_every_image_is_decoded_or_refused_with_a_reason(animals, tmp_path):
    folder, kinds = animals
    for name, good in kinds.items():
        if good:
            assert pixels(folder / "class" / name).dtype == np.uint8
        else:
            with pytest.raises(ImageError) as caught:
                decode(folder / "class" / name, name)
            assert caught.value.name == name and caught.value.reason and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sixteen.png", "sixteen.tif"])
def test_sixteen_bits_are_scaled_and_not_cut(animals, name):
    assert np.array_equal(pixels(animals[0] / "class" / name)[..., 0], RAMP)


def test_an_image_is_turned_as_its_exif_says(animals):
    seen = pixels(animals[0] / "class" / "turned.jpg")
    assert seen.shape == (32, 24, 3)
    upright = np.rot90(pixels(animals[0] / "class" / "plain.png"), -1)
    assert np.abs(seen.astype(int) - upright).mean() < 8


def test_all_eight_orientations_agree_with_pillow(tmp_path):
    from PIL import ImageOps

    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(RAMP).save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as image:
            expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(pixels(tmp_path / "a.png"), expected), orientation


def test_what_is_transparent_is_white(tmp_path):
    image = Image.new("P", (40, 40), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 20, 40))
    image.save(tmp_path / "p.png", transparency=0)
    seen = pixels(tmp_path / "p.png")
    assert (seen[:, :20] == (255, 0, 0)).all() and (seen[:, 20:] == 255).all()


def test_the_first_frame_of_an_animation_is_taken(animals):
    plain = pixels(animals[0] / "class" / "plain.png")
    assert np.array_equal(pixels(animals[0] / "class" / "animated.webp"), plain)
    assert np.abs(pixels(animals[0] / "class" / "animated.gif").astype(int) - plain).mean() < 12


def test_cmyk_looks_as_it_did(animals):
    seen, plain = (pixels(animals[0] / "class" / name) for name in ("cmyk.jpg", "plain.png"))
    assert np.abs(seen.astype(int) - plain).mean() < 8


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_leave_out_what_cannot_be_decoded_and_name_it(animals, workers):
    folder, kinds = animals
    source = open_dataset(str(folder), vit(1))
    assert len(source) == len(kinds)
    batches = list(load_batches(source, 4, workers=workers))
    bad = {Path(image.name).name for batch in batches for image in batch.skipped}
    assert bad == {name for name, good in kinds.items() if not good}
    assert sum(len(batch.labels) for batch in batches) == sum(kinds.values())
    assert batches[-1].end == len(kinds)
    assert [batch.end for batch in load_batches(source, 4, start=8)] == [batch.end for batch in batches[2:]]


def test_a_run_skips_the_same_images_for_every_cell_and_lists_them(animals, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_model", lambda *args, **kwargs: tiny_model())
    folder, kinds = animals
    options = RunOptions(device="cpu", batch_size=4, only=("accuracy",), max_bad=50)
    grid = replace(small_grid(MethodSpec("tome", ("8",))), data=str(folder))
    listener = Listener()
    runner.run(grid, tmp_path / "run", options=options, progress=listener)
    bad = sum(not good for good in kinds.values())
    assert any(f"{bad} of {len(kinds)} images" in text and "skipped.json" in text for text in listener.warnings)
    run = RunFolder.open(tmp_path / "run")
    listed = json.loads((run.path / "skipped.json").read_text())["tiny"]
    assert {Path(image["name"]).name for image in listed} == {name for name, good in kinds.items() if not good}
    for record in run.records():
        assert (record.skipped, record.images) == (bad, len(kinds) - bad)
        assert len(Predictions.load(run.prediction_path(record.cell)).label) == record.images
    more = replace(grid, methods=(MethodSpec("random", ("8",)),))
    runner.run(more, tmp_path / "run", options=options)
    assert {record.skipped for record in run.records()} == {bad}

    with pytest.raises(RunStopped, match=r"images of .* cannot be decoded, more than 5 %: the first is .*--max-bad"):
        runner.run(grid, tmp_path / "strict", options=replace(options, max_bad=5))


def test_more_cells_decode_no_more_images(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_model", lambda *args, **kwargs: tiny_model())
    folder = tmp_path / "photos"
    for name in "abc":
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (40, 30), (number * 80, 0, 0)).save(folder / name / f"{number}.jpg")
    decoded: list[str] = []
    monkeypatch.setattr(folders, "decode", lambda file, name: decoded.append(name) or decode(file, name))
    options = RunOptions(device="cpu", batch_size=4, only=("accuracy",))
    for names in (("tome",), ("tome", "topk", "evit")):
        decoded.clear()
        grid = replace(small_grid(*(MethodSpec(name, ("8", "4")) for name in names)), data=str(folder))
        table = runner.run(grid, tmp_path / f"{len(names)}", options=options, progress=Listener())
        assert len(table) == 1 + 2 * len(names) and table["images"].eq(9).all()
        assert len(decoded) == len(set(decoded)) == 9


def test_images_that_came_or_went_between_two_sessions_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_model", lambda *args, **kwargs: tiny_model())
    folder = make_folder(tmp_path / "data", {"a": 4, "b": 4, "c": 4})
    options = RunOptions(device="cpu", batch_size=4, only=("accuracy",), max_bad=50)
    grid = replace(small_grid(MethodSpec("tome", ("8",))), data=str(folder))
    runner.run(grid, tmp_path / "run", options=options, progress=Listener())
    image = folder / "b" / "001.png"
    image.write_bytes(b"x" * image.stat().st_size)  # the same size: the fingerprint cannot tell
    with pytest.raises(RunStopped, match="0 were skipped before image 8, now 1"):
        runner.run(replace(grid, methods=(MethodSpec("random", ("8",)),)), tmp_path / "run", options=options)


@pytest.mark.parametrize(
    ("name", "mode", "pixels_each", "options"),
    [
        ("a.png", "RGB", 12, {}),
        ("p.png", "P", 20, {"transparency": 0}),
        ("w.webp", "RGB", 20, {}),
        ("g.png", "L", 3, {}),
    ],
)
def test_an_image_that_takes_too_much_memory_is_refused(name, mode, pixels_each, options, tmp_path, monkeypatch):
    Image.new(mode, (100, 80)).save(tmp_path / name, **options)
    monkeypatch.setattr(decoding, "LARGEST_BYTES", 100 * 80 * pixels_each)
    assert pixels(tmp_path / name).shape == (80, 100, 3)
    monkeypatch.setattr(decoding, "LARGEST_BYTES", 100 * 80 * pixels_each - 1)
    with pytest.raises(ImageError, match="100 × 80 pixels would take .* to decode"):
        decode(tmp_path / name, name)


@pytest.mark.parametrize(("progressive", "share", "shape"), [(False, 0.3, (40, 50)), (True, 0.6, (20, 25))])
def test_a_jpeg_that_takes_too_much_memory_is_decoded_smaller_and_others_are_not(
    progressive, share, shape, tmp_path, monkeypatch
):
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 100, dtype=np.uint8), (80, 1))).convert("RGB")
    ramp.save(tmp_path / "a.jpg", quality=95, progressive=progressive)
    with Image.open(tmp_path / "a.jpg") as image:
        assert np.array_equal(pixels(tmp_path / "a.jpg"), np.asarray(image))
    monkeypatch.setattr(decoding, "LARGEST_BYTES", int(100 * 80 * 12 * share))
    small = decode(tmp_path / "a.jpg", "a.jpg")
    assert (small.height, small.width) == shape
    assert np.abs(np.asarray(small.resize(ramp.size)).astype(int) - np.asarray(ramp)).mean() < 4
    monkeypatch.setattr(decoding, "LARGEST_BYTES", 1000)
    with pytest.raises(ImageError, match="pixels would take"):
        decode(tmp_path / "a.jpg", "a.jpg")


def test_a_small_file_does_not_fill_a_readers_memory(tmp_path):
    """13,000 × 13,000 transparent pixels, within Pillow's bound: 3.4 GB to decode."""
    image = Image.new("1", (13000, 13000))
    image.save(tmp_path / "a.png", transparency=0)
    assert (tmp_path / "a.png").stat().st_size < 2**20
    with pytest.raises(ImageError, match="would take 3.1 GiB to decode, more than 1"):
        decode(tmp_path / "a.png", "a.png")


@pytest.mark.parametrize("name", ["a.jpe", "a.jp2", "a.avif", "a.tga"])
def test_images_by_less_usual_names_are_found_and_decoded(name, tmp_path):
    (tmp_path / "c").mkdir()
    form = {"jpe": "JPEG", "jp2": "JPEG2000", "avif": "AVIF", "tga": "TGA"}[name[2:]]
    if form not in decoding._formats():
        pytest.skip(f"this Pillow knows no {form}")
    Image.new("RGB", (40, 40), (200, 0, 0)).save(tmp_path / "c" / name, form)
    (batch,) = load_batches(open_dataset(str(tmp_path), vit(2)), 2)
    assert len(batch.images) == 1 and not batch.skipped


def test_files_that_are_no_images_and_classes_without_any_are_told(tmp_path, caplog):
    folder = make_folder(tmp_path, {"a": 1, "b": 0, "c": 1})
    (folder / "a" / "Thumbs.db").touch()
    open_dataset(str(folder), vit(3))
    assert "1 files are no images by their names ('a/Thumbs.db')" in caplog.text
    assert "1 class folders have no images ('b')" in caplog.text


def test_timm_does_not_answer_with_the_next_image(tmp_path):
    class Reader:
        files = [tmp_path / "good.png", tmp_path / "bad.png", tmp_path / "good.png"]

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int):
            return open(self.files[index], "rb"), index

    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").touch()
    opened = timm_readers.create_dataset("", root=str(make_folder(tmp_path / "any", {"a": 1})))
    opened.reader = Reader()
    images = timm_readers._decoding(opened, "hfds/x")
    assert images[2][1] == 2
    with pytest.raises(ImageError, match="'hfds/x, number 1' cannot be decoded"):
        images[1]


def test_a_reader_that_raises_anything_costs_one_image(tmp_path):
    class Failing(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int):
            if index:
                raise KeyError("column")
            return Image.new("RGB", (40, 40)), 0

    prepare = open_dataset(str(make_folder(tmp_path, {"a": 1})), vit(1))._prepare
    source = data.ImageSource("x", Failing(), np.arange(2), prepare, "f")
    (batch,) = load_batches(source, 2)
    assert len(batch.labels) == 1
    assert (batch.skipped[0].index, batch.skipped[0].name) == (1, "x, number 1")


def test_damaged_images_are_decoded_or_reported_and_nothing_else():
    script = Path(__file__).parents[1] / "benchmarks" / "bad_images.py"
    command = [sys.executable, script, "--mutations", "280"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mutants of 14 files" in done.stdout and "'decoded'" in done.stdout and "'bad'" in done.stdout


def test_formats_that_start_other_programs_are_no_images(tmp_path):
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({tmp_path}/made) (w) file\n%%EOF\n"
    (tmp_path / "a.png").write_text(script)
    with pytest.raises(ImageError, match="cannot identify"):
        decode(tmp_path / "a.png", "a.png")
    assert not (tmp_path / "made").exists()


def test_an_image_that_a_stream_cannot_decode_itself_stops_the_run(tmp_path):
    """As TensorFlow decodes for tfds/: its iteration ends there."""

    def decoded_elsewhere():
        yield Image.new("RGB", (40, 40)), 0
        raise RuntimeError("Expected image (JPEG, PNG, or GIF), got unknown format\n[Op:IteratorGetNext]")

    prepare = open_dataset(str(make_folder(tmp_path, {"a": 1})), vit(1))._prepare
    stream = data.ImageStream("tfds/x", decoded_elsewhere(), 3, prepare, "f")
    with pytest.raises(RunStopped, match="images of tfds/x cannot be read: RuntimeError: Expected image .* format$"):
        list(Reader(stream, 2, 0, HalfPass(), None).batches())


def test_calibration_takes_the_first_images_that_can_be_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "load_model", lambda *args, **kwargs: tiny_model())
    folder = make_folder(tmp_path / "data", {"a": 35})
    for image in sorted((folder / "a").iterdir())[:33]:
        image.write_bytes(b"x")
    grid = replace(small_grid(MethodSpec("tofu", ("8",), {"prune_blocks": "auto"})), data=str(folder))
    runner.run(grid, tmp_path / "run", options=RunOptions(device="cpu", only=("flops",)))
    assert plain_records(tmp_path / "run")[1]["calibrated"]["images"] == 2


@pytest.mark.parametrize(
    "method, measure",
    [(MethodSpec("tome", ("8",)), "accuracy"), (MethodSpec("tofu", ("8",), {"prune_blocks": "auto"}), "flops")],
)
def test_a_run_without_one_good_image_stops_with_one_line(tmp_path, monkeypatch, method, measure):
    monkeypatch.setattr(runner, "load_model", lambda *args, **kwargs: tiny_model())
    folder = make_folder(tmp_path / "data", {"a": 3})
    for image in (folder / "a").iterdir():
        image.write_bytes(b"x")
    options = RunOptions(device="cpu", batch_size=2, only=(measure,), max_bad=100)
    grid = replace(small_grid(method), data=str(folder))
    with pytest.raises(RunStopped, match="none of the 3 images of data can be decoded"):
        runner.run(grid, tmp_path / "run", options=options)
