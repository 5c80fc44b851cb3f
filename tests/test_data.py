from __future__ import annotations

import errno
import hashlib
import io
import os
import pickle
import resource
import signal
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_folders import make_folder, vit
from PIL import Image
from scipy.io import savemat
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, IterableDataset, dataloader

from tokbench import data
from tokbench.bundled.clutter import CLASSES, compose, draw_layout, read_idx
from tokbench.data import ImageSource, ImageStream, batches, load_batches, open_dataset, timm_readers
from tokbench.data.decoding import ImageError, decode
from tokbench.data.labels import label_classes, label_numbers
from tokbench.data.preparing import data_config
from tokbench.errors import RunStopped, UserError

BUNDLED = Path(data.__file__).parents[1] / "bundled"
WNIDS = ImageNetInfo().label_names()


def grey_vit() -> VisionTransformer:
    model = VisionTransformer(img_size=56, patch_size=8, in_chans=1, num_classes=10, embed_dim=8, depth=1, num_heads=1)
    model.pretrained_cfg = {"mean": (0.5,), "std": (0.5,), "crop_pct": 1.0, "label_names": list(CLASSES)}
    return model


def complaint(spec: object, model: VisionTransformer, limit: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(str(spec), model, limit=limit)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def labels(source: ImageSource | ImageStream) -> list[int]:
    return [label for _, label in source]


@pytest.mark.parametrize(("channels", "mean"), [(3, (0.485, 0.456, 0.406)), (1, (0.44,))])
def test_images_are_prepared_as_timm_prepares_them(tmp_path, channels, mean):
    model = vit(2, channels, mean=mean, std=(0.229, 0.224, 0.225)[:channels])
    (tmp_path / "a").mkdir()
    Image.effect_noise((47, 39), 90).convert("RGB").save(tmp_path / "a" / "1.png")
    picture = decode(tmp_path / "a" / "1.png", "1.png").convert("RGB" if channels == 3 else "L")
    expected = timm.data.create_transform(**data_config(model), is_training=False)(picture)
    assert torch.equal(open_dataset(str(tmp_path), model)[0][0], expected)
    (batch,) = load_batches(open_dataset(str(tmp_path), model), 2)
    assert torch.equal(batch.images[0], expected) and batch.images.is_contiguous()


# --- bundled


def test_bundled_images_are_the_composites_the_model_was_trained_on():
    source = open_dataset("bundled", grey_vit())
    assert (len(source), source.num_classes, source.classes) == (10000, 10, list(CLASSES))
    items = read_idx(BUNDLED / "t10k-images-idx3-ubyte.gz")
    layout = draw_layout(np.arange(10000), 10000, np.random.RandomState(0))
    for i in (0, 17, 9999):
        image, label = source[i]
        expected = torch.from_numpy(compose(items, layout[i : i + 1])).float().div(127.5).sub(1)
        torch.testing.assert_close(image, expected)
        assert label == read_idx(BUNDLED / "t10k-labels-idx1-ubyte.gz")[i]


def test_bundled_images_suit_a_colour_model_too():
    assert open_dataset("bundled", vit())[3][0].shape == (3, 32, 32)


def test_the_bundled_data_has_not_changed():
    fingerprint = open_dataset("bundled", grey_vit()).fingerprint
    assert fingerprint.startswith("d57e32da")
    assert len(fingerprint) == len(hashlib.sha256().hexdigest())


# --- limit


def test_limit_takes_a_fixed_random_subset_in_order_and_a_smaller_one_is_part_of_it(tmp_path):
    folder = make_folder(tmp_path, {f"class{c}": 20 for c in range(5)})
    model = vit(5)
    everything = labels(open_dataset(str(folder), model))
    half, some = (open_dataset(str(folder), model, limit=n) for n in (50, 10))
    assert everything == sorted(everything) and len(everything) == 100
    assert labels(half) == sorted(labels(half)) and len(half) == 50
    assert min(labels(half).count(c) for c in range(5)) >= 6
    assert set(some.indices) < set(half.indices)
    assert labels(open_dataset(str(folder), model, limit=10)) == labels(some)
    assert len(open_dataset(str(folder), model, limit=999)) == 100
    assert "at least 1" in complaint(folder, model, limit=0)


def test_the_fingerprint_tells_images_and_order_but_not_the_model(tmp_path):
    folder = make_folder(tmp_path / "a", {"x": 3, "y": 3})
    source = open_dataset(str(folder), vit(2))
    assert open_dataset(str(folder), vit(7, in_chans=1)).fingerprint == source.fingerprint
    assert open_dataset(str(folder), vit(2), limit=4).fingerprint != source.fingerprint
    moved = make_folder(tmp_path / "b", {"x": 3, "y": 3})
    assert open_dataset(str(moved), vit(2)).fingerprint == source.fingerprint
    (moved / "x" / "000.png").rename(moved / "y" / "009.png")
    assert open_dataset(str(moved), vit(2)).fingerprint != source.fingerprint


# --- labels


def test_wnid_folders_are_put_into_imagenet_order_even_when_only_some_are_there(tmp_path):
    chosen = [WNIDS[900], WNIDS[3], WNIDS[217]]
    source = open_dataset(str(make_folder(tmp_path, dict.fromkeys(chosen, 1))), vit(1000))
    assert labels(source) == [WNIDS.index(name) for name in sorted(chosen)]
    assert source.num_classes == 3


def test_wnid_folders_are_counted_in_order_for_a_model_with_as_many_classes(tmp_path):
    chosen = sorted([WNIDS[900], WNIDS[3], WNIDS[217]])
    assert labels(open_dataset(str(make_folder(tmp_path, dict.fromkeys(chosen, 1))), vit(3))) == [0, 1, 2]


def test_a_folder_that_is_no_class_among_wnids_is_refused(tmp_path):
    folder = make_folder(tmp_path, {WNIDS[0]: 1, "misc": 1})
    assert "classes the model does not know (misc)" in complaint(folder, vit(1000))


def test_folders_named_as_the_models_classes_take_their_numbers(tmp_path):
    source = open_dataset(str(make_folder(tmp_path, {"Bag": 1, "ankle_boot": 1, "T-shirt top": 1})), grey_vit())
    assert source.classes == ["Bag", "T-shirt top", "ankle_boot"]
    assert labels(source) == [8, 0, 9]


PLURALS = ["T-shirts", "Trousers", "Pullovers", "Dresses", "Coats", "Sandals", "Shirts", "Sneakers", "Bags", "Boots"]


@pytest.mark.parametrize("kind", ["folder", "torch", "hfds", "more"])
def test_names_of_which_the_model_knows_none_are_refused_with_both_lists(kind, tmp_path):
    names = [*PLURALS, "Hats"] if kind == "more" else PLURALS
    folder = make_folder(tmp_path / "data", dict.fromkeys(names, 1))
    spec = str(folder)
    if kind == "torch":
        spec = f"torch/image_folder:root={folder}"
    if kind == "hfds":
        spec = parquet(tmp_path / "rows", PLURALS, [0, 1])
    message = complaint(spec, grey_vit())
    assert "Bags, " in message and "T-shirt/top, Trouser, " in message and "name them as the model does" in message


def test_names_decide_before_the_guess_that_1000_classes_are_imagenets(tmp_path):
    own = vit(1000, label_names=[f"thing {number}" for number in range(1000)])
    source = open_dataset(str(make_folder(tmp_path / "a", {"thing_10": 1, "Thing 9": 1})), own)
    assert labels(source) == [9, 10] and not source.warnings
    wnids = make_folder(tmp_path / "b", dict.fromkeys(WNIDS[:2], 1))
    assert "none of its 2 classes" in complaint(wnids, own)
    placeholders = vit(1000, label_names=[f"LABEL_{number}" for number in range(1000)])
    assert labels(open_dataset(str(wnids), placeholders)) == [0, 1]


def test_imagenets_own_words_are_its_classes_in_a_model_and_in_folders(tmp_path):
    words = [words.replace("/", " ") for words in ImageNetInfo().label_descriptions()]
    wnids = make_folder(tmp_path / "wnids", {WNIDS[5]: 1, WNIDS[217]: 1})
    assert sorted(labels(open_dataset(str(wnids), vit(1000, label_names=words)))) == [5, 217]
    named = make_folder(tmp_path / "named", {"tench": 1, "goldfish, Carassius auratus": 1})
    assert sorted(labels(open_dataset(str(named), vit(1000)))) == [0, 1]
    assert "none of its 2 classes" in complaint(make_folder(tmp_path / "pets", {"Rex": 1, "Tom": 1}), vit(1000))


@pytest.mark.parametrize(
    ("numbers", "classes", "expected", "guessed"),
    [
        (range(1000), 1000, {"10": 10, "2": 2, "999": 999}, False),  # ImageNet-V2
        ([0, 3, 17], 1000, {"0": 0, "17": 17, "3": 3}, False),
        ([0, 2, 7], 10, {"0": 0, "2": 2, "7": 7}, True),
        (range(10), 10, {"3": 3}, False),
        (range(1, 12), 11, {"1": 0, "10": 9, "2": 1}, True),
        ([100, 20, 9], 3, {"9": 0, "20": 1, "100": 2}, True),
    ],
)
@pytest.mark.parametrize("form", ["", "torch/image_folder:root="])
def test_folders_that_are_numbers_are_class_numbers(form, numbers, classes, expected, guessed, tmp_path):
    source = open_dataset(f"{form}{make_folder(tmp_path, {str(n): 1 for n in numbers})}", vit(classes))
    given = dict(zip(source.classes, labels(source), strict=True))
    assert expected.items() <= given.items() and len(set(given.values())) == len(numbers)
    assert [warning.code for warning in source.warnings] == ["labels_guessed"] * guessed


def test_a_model_that_knows_its_classes_names_takes_their_numbers_too(tmp_path):
    source = open_dataset(str(make_folder(tmp_path, {"8": 1, "2": 1})), grey_vit())
    assert labels(source) == [2, 8] and [warning.code for warning in source.warnings] == ["labels_guessed"]


@pytest.mark.parametrize(("classes", "missing"), [(21843, 1), (21841, 1), (11821, 7), (11221, 9)])
def test_larger_imagenet_heads_take_imagenet_1k_and_say_what_they_lack(classes, missing):
    model = vit(2)
    model.num_classes = classes
    labelling = label_classes(sorted(WNIDS), model, "data")
    heads = ImageNetInfo(infer_imagenet_subset(model)).label_names()
    assert [heads[n] for n in labelling.numbers if n >= 0] == [w for w in sorted(WNIDS) if w in set(heads)]
    (warning,) = labelling.warnings
    assert warning.code == "unmapped_classes" and warning.text.startswith(f"{missing} of the 1000 classes of data")
    assert labelling(sorted(WNIDS).index("n02085782")) == (-1 if missing > 1 else heads.index("n02085782"))


@pytest.mark.parametrize("name", ["A", "R"])
def test_answers_on_imagenet_a_and_r_are_chosen_among_their_classes(name):
    folder = Path(timm.data.__file__).parent / "_info"
    synsets = (folder / f"imagenet_{name.lower()}_synsets.txt").read_text().split()
    labelling = label_classes(sorted(synsets), vit(1000), "data")
    assert labelling.among == [int(n) for n in (folder / f"imagenet_{name.lower()}_indices.txt").read_text().split()]
    assert labelling.warnings[0].code == "subset_of_logits" and f"ImageNet-{name}" in labelling.warnings[0].text
    assert label_classes(sorted(synsets)[1:], vit(1000), "data").among is None
    assert label_classes(sorted(synsets), vit(200), "data").among is None


def test_a_wnid_that_a_1000_class_head_lacks_has_no_label(tmp_path):
    source = open_dataset(str(make_folder(tmp_path, {WNIDS[7]: 2, "n00004475": 1})), vit(1000))
    assert labels(source) == [-1, 7, 7] and source.warnings[0].code == "unmapped_classes"


@pytest.mark.parametrize("files", ["images", "deep/images"])
def test_a_lone_folder_of_images_is_no_class(files, tmp_path):
    make_folder(tmp_path / "data", {files: 2})
    (tmp_path / "data" / "empty").mkdir()
    (tmp_path / "data" / files).with_name("val_annotations.txt").touch()
    source = open_dataset(str(tmp_path / "data"), vit(200))
    assert labels(source) == [-1, -1] and source.classes is None
    (warning,) = source.warnings
    assert warning.code == "no_labels" and "--labels" in warning.text and "val_annotations.txt" in warning.text


def test_a_lone_folder_may_hold_class_folders_or_be_a_class_by_its_name(tmp_path):
    make_folder(tmp_path / "cub", {"images/001.Sooty_Tern": 1, "images/002.Laysan": 1, "parts": 0})
    names = ["laysan", "sooty tern"]
    assert labels(open_dataset(str(tmp_path / "cub"), vit(2, label_names=names))) == [1, 0]
    assert labels(open_dataset(str(make_folder(tmp_path / "one", {WNIDS[3]: 1})), vit(1000))) == [3]
    (tmp_path / "ilsvrc" / "val_img").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "ilsvrc" / "val_img" / "ILSVRC2012_val_00000001.JPEG")
    assert "give a list of them with --labels" in complaint(tmp_path / "ilsvrc", vit(1000))


def test_a_model_of_one_output_gets_images_without_labels(tmp_path):
    source = open_dataset(str(make_folder(tmp_path, {"a": 1, "b": 1})), vit(1))
    assert labels(source) == [-1, -1] and source.warnings[0].code == "no_classes"


def test_links_to_folders_are_followed_and_loops_cut(tmp_path):
    store = make_folder(tmp_path / "store", {"one": 2, "two": 3})
    folder = make_folder(tmp_path / "val", {"cat": 1, "dog": 1})
    (folder / "cat" / "more").symlink_to(store / "one")
    (folder / "dog" / "more").symlink_to(store / "two")
    (folder / "cow").symlink_to(store / "two")
    expected = [0] * 3 + [1] * 3 + [2] * 4
    assert labels(open_dataset(str(folder), vit(3))) == expected
    (folder / "cat" / "up").symlink_to(folder)
    (store / "one" / "back").symlink_to(folder / "cat")
    (folder / "cat" / "self").symlink_to(folder / "cat" / "self")
    assert labels(open_dataset(str(folder), vit(3))) == expected


LISTS = {
    "names.csv": "filename,label\n2.png,Bag\n0.png,T-shirt/top\n1.png,Ankle boot\n",
    "turned.csv": "class,file\nBag,2.png\nT-shirt/top,0.png\nAnkle boot,1.png\n",
    "numbers.txt": "0.png 0\n1.png 9\n2.png 8\n",
    "val_annotations.txt": "0.png\tT-shirt/top\t0\t0\t63\t63\n1.png\tAnkle boot\t0\t0\t1\t1\n2.png\tBag\t0\t0\t1\t1\n",
    "stems.csv": "0,T-shirt/top\n1,Ankle boot\n2,Bag\n",
    "in_order.txt": "0\n9\n8\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_tells_the_labels_of_a_flat_folder(name, tmp_path):
    folder = make_folder(tmp_path / "data", {"images": 3})
    for number, image in enumerate(sorted((folder / "images").iterdir())):
        image.rename(folder / "images" / f"{number}.png")
    (tmp_path / name).write_text(LISTS[name])
    source = open_dataset(str(folder), grey_vit(), labels=tmp_path / name)
    assert labels(source) == [0, 9, 8] and "no_labels" not in [warning.code for warning in source.warnings]
    assert source.fingerprint != open_dataset(str(folder), grey_vit()).fingerprint


def test_kaggles_and_the_devkits_lists_of_ilsvrc_give_wnids(tmp_path):
    folder = tmp_path / "val"
    folder.mkdir()
    for number in (1, 2):
        Image.new("RGB", (4, 4)).save(folder / f"ILSVRC2012_val_0000000{number}.JPEG")
    kaggle = tmp_path / "LOC_val_solution.csv"
    rows = [f"ILSVRC2012_val_0000000{n},{WNIDS[n * 7]} 85 1 499 272" for n in (2, 1)]
    kaggle.write_text("\n".join(["ImageId,PredictionString", *rows]))
    assert labels(open_dataset(str(folder), vit(1000), labels=kaggle)) == [7, 14]
    truth = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("490\n361\n")
    with pytest.raises(UserError, match="needs the devkit's 'meta.mat' beside it"):
        open_dataset(str(folder), vit(1000), labels=truth)
    synsets = np.array([(490, WNIDS[65]), (361, WNIDS[970])], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    savemat(tmp_path / "meta.mat", {"synsets": synsets})
    assert labels(open_dataset(str(folder), vit(1000), labels=truth)) == [65, 970]


def test_images_that_a_list_leaves_out_have_no_label_and_are_counted(tmp_path):
    folder = make_folder(tmp_path / "data", {"images": 3})
    (tmp_path / "a.csv").write_text("images/001.png,Bag\nother.png,Coat\n")
    source = open_dataset(str(folder), grey_vit(), labels=tmp_path / "a.csv")
    assert labels(source) == [-1, 8, -1]
    assert [(warning.code, warning.text[:6]) for warning in source.warnings] == [("unlabelled", "2 of 3")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("x.png,Bag\n", "names none of the images"),
        ("000.png,Bags\n", "none of its 1 classes (Bags) is one of the model's 10"),
        ("", "is empty"),
        ("Bag\n", "has 1 lines of one class each, for 3 images"),
        ("000.png,Bag\n001.png,\n", "line 2: no file name and class"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        (None, "does not exist. Did you mean 'labels.csv'?"),
    ],
)
def test_a_list_that_is_none_is_refused(content, words, tmp_path):
    folder = make_folder(tmp_path / "data", {"images": 3})
    (tmp_path / "labels.csv").write_bytes(content.encode() if isinstance(content, str) else content or b"")
    with pytest.raises(UserError) as caught:
        open_dataset(str(folder), grey_vit(), labels=tmp_path / ("labels.csv" if content is not None else "label.csv"))
    assert words in str(caught.value)
    with pytest.raises(UserError, match="has its own"):
        open_dataset("bundled", grey_vit(), labels=tmp_path / "labels.csv")


def test_more_folders_than_classes_are_refused(tmp_path):
    folder = make_folder(tmp_path, {"a": 1, "b": 1, "c": 1})
    assert "has 3 classes (a, b, c), the model only 2" in complaint(folder, vit(2))


@pytest.mark.parametrize(
    ("folders", "classes", "words"),
    [("ab", 3, "has 2 classes, the model 3"), (["A", "a", "B"], 3, "alphabetical order, 10 before 2 and B before a")],
)
def test_what_only_order_tells_is_said(folders, classes, words, tmp_path, caplog):
    source = open_dataset(str(make_folder(tmp_path, dict.fromkeys(folders, 1))), vit(classes))
    assert labels(source) == list(range(len(folders)))
    assert [warning.code for warning in source.warnings] == ["labels_guessed"]
    assert words in source.warnings[0].text and words in caplog.text


def test_a_model_without_classifier_gets_the_classes_of_the_data(tmp_path, caplog):
    source = open_dataset(str(make_folder(tmp_path, {"a": 1, "b": 1})), vit(0))
    assert labels(source) == [0, 1]
    numbered = label_numbers(vit(0), "data")
    assert [numbered(label) for label in (7, "3", -2, None, "cat")] == [7, 3, -1, -1, -1]
    assert [warning.code for warning in source.warnings] == ["no_classes"] and "no classifier" in caplog.text


# --- folders


def test_the_validation_split_is_taken_where_there_is_one(tmp_path):
    make_folder(tmp_path / "train", {"a": 3, "b": 3})
    assert "only a training split" in complaint(tmp_path, vit(2))
    make_folder(tmp_path / "val", {"a": 1, "b": 2})
    source = open_dataset(str(tmp_path), vit(2))
    assert labels(source) == [0, 1, 1]
    assert source.name == f"{tmp_path.name}/val"


def test_images_come_in_the_models_form_from_every_mode_of_png(tmp_path):
    (tmp_path / "a" / "deeper").mkdir(parents=True)
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (50, 40)).save(tmp_path / "a" / "deeper" / f"{mode}.png")
    for in_chans in (1, 3):
        images = [image for image, _ in open_dataset(str(tmp_path), vit(1, in_chans))]
        assert {image.shape for image in images} == {(in_chans, 32, 32)} and len(images) == 4
        assert {image.dtype for image in images} == {torch.float32}


def test_a_model_without_configuration_gets_images_of_the_size_it_was_built_for(tmp_path):
    model = vit(1, in_chans=1)
    del model.pretrained_cfg
    assert open_dataset(str(make_folder(tmp_path, {"a": 1})), model)[0][0].shape == (1, 32, 32)
    assert "takes 4 channels" in complaint(tmp_path, vit(1, in_chans=4))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "does not exist. Did you mean 'missin'?"),
        ("nowhere/at/all", "does not exist. Other data: bundled, hfds/…"),
        ("empty", "is empty"),
        ("classes", "no images in them"),
        ("imagenet", "n01440764/ILSVRC2012_val_00000293.JPEG"),
        ("imagenet/val", "n01440764/ILSVRC2012_val_00000293.JPEG"),
        ("flat/0.png", "is a file"),
    ],
)
def test_a_folder_that_holds_no_labelled_images_is_refused(name, message, tmp_path):
    (tmp_path / "missin").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "flat").mkdir()
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    (tmp_path / "imagenet" / "train" / WNIDS[0]).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "flat" / "0.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "imagenet" / "val" / "ILSVRC2012_val_00000001.JPEG")
    assert message in complaint(tmp_path / name, vit())


def test_a_misspelt_bundled_is_refused():
    assert "Did you mean 'bundled' or 'bundled:train'?" in complaint("bundeld", vit())
    assert "data is empty" in complaint("", vit())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named_in_one_line_also_from_a_worker(workers, tmp_path):
    (make_folder(tmp_path, {"a": 1}) / "a" / "zzz.jpg").write_text("no image")
    with pytest.raises(UserError) as caught:
        list(DataLoader(open_dataset(str(tmp_path), vit(1)), num_workers=workers))
    assert str(caught.value).startswith("image ") and "zzz.jpg' cannot be decoded: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_are_pickleable():
    source = pickle.loads(pickle.dumps(open_dataset("bundled", grey_vit(), limit=9)))
    image, label = source[8]
    assert image.shape == (1, 56, 56) and 0 <= label < 10


# --- what timm opens


def test_torchvision_data_is_opened_and_labelled_by_its_own_classes(tmp_path):
    folder = make_folder(tmp_path, {WNIDS[5]: 1, WNIDS[2]: 1})
    source = open_dataset(f"torch/image_folder:root={folder}", vit(1000))
    assert labels(source) == sorted([5, 2], key=lambda i: WNIDS[i])
    assert (source.name, source.num_classes, len(source)) == ("torch/image_folder", 2, 2)
    assert pickle.loads(pickle.dumps(source))[0][0].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torch/cifar10", "say where its files are, as in torch/cifar10:root=FOLDER"),
        ("torch/cifar10:root=/nowhere", "cannot be opened: Dataset not found"),
        ("torch/cifr:root=/nowhere", "cannot be opened: Unknown torchvision dataset cifr"),
        ("torch/cifar10:rot=/nowhere", "unknown option 'rot'. Did you mean 'root'?"),
        ("torch/cifar10:input_key=x", "unknown option 'input_key'. It takes split, root, download."),
        ("torch/", "names no data set"),
    ],
)
def test_data_that_timm_cannot_open_is_refused(spec, message):
    assert message in complaint(spec, vit())


@pytest.mark.parametrize("spec", ["hfds/a/b", "hfids/a/b", "wds/shards", "tfds/mnist"])
def test_a_package_that_is_not_installed_is_named(spec, monkeypatch):
    monkeypatch.setattr(timm_readers.importlib.util, "find_spec", lambda name: None)
    assert "needs a package: pip install " in complaint(spec, vit())


class FakeStream(IterableDataset):
    """What timm gives for a stream: iterable, with a length that is 0 where nobody knows."""

    def __init__(self, images: int, known: int):
        self.images, self.known = images, known

    def __len__(self) -> int:
        return self.known

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return ((Image.new("RGB", (40, 40)), i) for i in range(self.images))


@pytest.fixture
def stream(monkeypatch):
    """Opens a FakeStream by timm's name for one."""

    def open_stream(images: int, known: int, limit: int | None) -> ImageSource | ImageStream:
        monkeypatch.setattr(timm_readers.importlib.util, "find_spec", lambda name: True)
        monkeypatch.setattr(timm_readers, "create_dataset", lambda *args, **kwargs: FakeStream(images, known))
        return open_dataset("wds/shards", vit(), limit=limit)

    return open_stream


def test_a_stream_gives_its_first_images_in_order(stream):
    source = stream(images=9, known=0, limit=4)
    assert source.streaming and len(source) == 4 and source.num_classes == 10
    assert labels(source) == labels(source) == [0, 1, 2, 3]
    assert len(stream(images=9, known=9, limit=None)) == 9
    batches = DataLoader(source, batch_size=3, num_workers=1)
    assert [label.tolist() for _, label in batches] == [[0, 1, 2], [3]]


def test_a_stream_of_unknown_length_needs_a_limit(stream):
    with pytest.raises(UserError, match="how many with --limit N"):
        stream(images=9, known=0, limit=None)


def test_a_stream_that_gives_nothing_or_less_than_promised_is_told(stream, caplog):
    with pytest.raises(UserError, match="gives no images"):
        labels(stream(images=0, known=5, limit=None))
    assert len(labels(stream(images=3, known=0, limit=5))) == 3
    assert "ended after 3 of 5 images" in caplog.text
    (batch,) = load_batches(stream(images=3, known=5, limit=None), 8)
    assert [(image.index, image.reason) for image in batch.skipped] == [
        (place, "the stream ended before it") for place in (3, 4)
    ]


def test_a_stream_refuses_several_workers(stream):
    with pytest.raises(UserError, match="--readers 0 or 1"):
        list(DataLoader(stream(images=9, known=9, limit=None), num_workers=2))


def test_images_without_class_folders_have_no_labels(tmp_path, caplog):
    for number in range(3):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(tmp_path / f"{number}.png")
    source = open_dataset(str(tmp_path), vit())
    assert [source[index][1] for index in range(len(source))] == [-1, -1, -1]
    assert source.classes is None
    assert "without labels" in caplog.text


# --- streams as they lie on disk


def encoded(color: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 36), (color, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                info = tarfile.TarInfo(f"{number:03d}.{ending}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def test_what_a_shard_holds_that_cannot_be_decoded_is_named_and_counted(tmp_path):
    pytest.importorskip("webdataset")
    good = [{"png": encoded(i), "cls": str(i).encode()} for i in range(4)]
    samples = [good[0], {"png": b"no image", "cls": b"1"}, good[2], {"png": encoded(3), "cls": b"cat"}, {"cls": b"1"}]
    write_shard(tmp_path / "val-0.tar", samples)
    write_shard(tmp_path / "val-1.tar", [good[3]])
    source = open_dataset(f"wds/{tmp_path}:split=val-{{0..1}}.tar|7", vit())
    for workers in (0, 1):
        batches = list(load_batches(source, 4, workers=workers))
        assert [batch.labels.tolist() for batch in batches] == [[0, 2], [3]]
        assert batches[-1].end == 7
        bad = [image for batch in batches for image in batch.skipped]
        assert [image.index for image in bad] == [1, 3, 4, 6]
        assert [image.name for image in bad[:3]] == ["val-0.tar/001", "val-0.tar/003", "val-0.tar/004"]
        for image, words in zip(bad, ["cannot identify", "'cat'", "no jpg or png", "ended before it"], strict=True):
            assert words in image.reason


def test_plain_tars_are_counted_read_and_labelled_by_number_or_name(tmp_path):
    pytest.importorskip("webdataset")
    samples = [{"jpeg": encoded(0), "cls": b"8"}, {"png": encoded(1), "cls": b"Ankle_boot"}, {"png": encoded(2)}]
    write_shard(tmp_path / "a-val-0.tar", samples)
    write_shard(tmp_path / "a-val-1.tar", [{"png": encoded(3), "cls": b"-1"}, {"png": encoded(4), "cls": b"Boots"}])
    write_shard(tmp_path / "a-train-0.tar", samples)
    source = open_dataset(f"wds/{tmp_path}", grey_vit())
    assert len(source) == 5 and source.streaming
    (batch,) = load_batches(source, 8)
    assert batch.labels.tolist() == [8, 9, -1, -1]
    assert batch.skipped[0].name == "a-val-1.tar/001" and "none of the model's (T-shirt/top" in batch.skipped[0].reason
    assert len(open_dataset(f"wds/{tmp_path}:split=train", grey_vit())) == 3
    assert len(open_dataset(f"wds/{tmp_path}", grey_vit(), limit=2)) == 2
    assert "no shards of split 'tst': its shards are a-train-0.tar" in complaint(f"wds/{tmp_path}:split=tst", vit())
    for shard in tmp_path.glob("*val*"):
        shard.unlink()
    assert "only a training split" in complaint(f"wds/{tmp_path}", vit())
    (tmp_path / "a-train-0.tar").write_bytes(b"no archive")
    assert "cannot be opened" in complaint(f"wds/{tmp_path}:split=train", vit())


def test_plain_tars_may_keep_labels_in_json(tmp_path):
    pytest.importorskip("webdataset")
    write_shard(tmp_path / "0.tar", [{"webp": encoded(0), "json": b'{"class": "Bag"}'}])
    (batch,) = load_batches(open_dataset(f"wds/{tmp_path}:target_key=class", grey_vit()), 2)
    assert batch.labels.tolist() == [8]


def test_a_shard_that_cannot_be_read_is_told(tmp_path):
    pytest.importorskip("webdataset")
    write_shard(tmp_path / "val-0.tar", [{"png": encoded(0), "cls": b"0"}])
    (tmp_path / "val-1.tar").write_bytes(b"no archive" * 100)
    source = open_dataset(f"wds/{tmp_path}:split=val-{{0..1}}.tar|2", vit())
    with pytest.raises(Exception, match="val-1.tar"):
        list(load_batches(source, 1))


def test_rows_that_hold_no_image_are_named_and_counted(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": b, "path": None} for b in (encoded(0), b"no image", encoded(2))], "label": [0, 1, 2]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "validation-00000.parquet")
    source = open_dataset(f"hfids/{tmp_path}:root={tmp_path / 'cache'}", vit(), limit=3)
    (batch,) = load_batches(source, 4)
    assert batch.labels.tolist() == [0, 2]
    assert [image.index for image in batch.skipped] == [1] and "cannot identify" in batch.skipped[0].reason


def parquet(folder: Path, names: list[str] | None, given: list[int | None]) -> str:
    """A Hugging Face data set of a few rows: its spec."""
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    rows = {"image": [{"bytes": encoded(i), "path": None} for i in range(len(given))], "label": given}
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "validation-00000.parquet")
    return f"hfds/{folder}:root={folder.parent / 'cache'}"


def test_rows_without_a_label_have_none(tmp_path):
    source = open_dataset(parquet(tmp_path / "rows", None, [3, -1, None, 1, 12]), vit(10))
    (batch,) = load_batches(source, 8)
    assert batch.labels.tolist() == [3, -1, -1, 1]
    assert ["its label is 12, and there are 10 classes" in image.reason for image in batch.skipped] == [True]


# --- readers that are other processes


@pytest.fixture(autouse=True)
def _torch_looks_after_its_processes_often(monkeypatch):
    """Usually every 5 s."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(dataloader._MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))


def few_images(tmp_path: Path) -> ImageSource:
    source = open_dataset(str(make_folder(tmp_path, {"a": 6, "b": 6})), vit(2))
    assert isinstance(source, ImageSource)
    return source


def of_torch(signum, frame):
    raise RuntimeError("raised amid something else")


of_torch.__module__ = "torch.utils.data._utils.signal_handling"


@pytest.fixture
def sigchld():
    """Set the handler of a child's end; the one that was there comes back."""
    before = signal.getsignal(signal.SIGCHLD)
    yield lambda handler: signal.signal(signal.SIGCHLD, handler)
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize(
    ("ending", "handler", "kept"),
    [
        (signal.SIGKILL, signal.SIG_DFL, signal.SIG_DFL),
        (signal.SIGBUS, signal.SIG_DFL, signal.SIG_DFL),
        (signal.SIGKILL, of_torch, signal.SIG_DFL),
    ],
)
def test_a_reader_that_was_killed_is_named_with_its_signal_and_only_where_it_is_waited_for(
    ending, handler, kept, tmp_path, sigchld
):
    sigchld(handler)
    source = few_images(tmp_path)
    inner, here = source._images, os.getpid()

    class Killing:
        def __getitem__(self, index: int):
            if index == 9 and os.getpid() != here:
                os.kill(os.getpid(), ending)
            return inner[index]

    source._images = Killing()
    read = load_batches(source, 2, workers=1)
    assert len(next(read).labels) == 2
    assert signal.getsignal(signal.SIGCHLD) is kept
    with pytest.raises(RunStopped, match=rf"reader, process \d+, was killed by signal {ending} \({ending.name}\)"):
        list(read)


@pytest.mark.parametrize(
    ("scarce", "words"),
    [("memory", "No space left on device in shared memory"), ("files", "process .* ended: Too many open files")],
)
def test_a_reader_that_cannot_hand_over_ends_the_run_in_one_line(scarce, words, tmp_path, monkeypatch):
    collate = batches.default_collate

    def fail(images: list[torch.Tensor]) -> torch.Tensor:
        if scarce == "memory":
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"
            )
        stack = collate(images)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # no descriptor left to hand it over by
        return stack

    monkeypatch.setattr(batches, "default_collate", fail)
    with pytest.raises(RunStopped, match=words) as caught:
        list(load_batches(few_images(tmp_path), 2, workers=1))
    assert "--readers" in str(caught.value) and "\n" not in str(caught.value)


def test_a_batch_is_the_same_whoever_reads_it_and_readers_are_no_more_than_cores(tmp_path, monkeypatch):
    source, loader, made = few_images(tmp_path), batches.DataLoader, []

    def count(*args, **more):
        made.append(more["num_workers"])
        return loader(*args, **more)

    monkeypatch.setattr(batches, "DataLoader", count)
    monkeypatch.setattr(batches, "_cores", lambda: 2)
    here, there = (list(load_batches(source, 5, workers=workers)) for workers in (0, 200))
    assert made == [0, 2]
    for mine, theirs in zip(here, there, strict=True):
        assert torch.equal(mine.images, theirs.images) and torch.equal(mine.labels, theirs.labels)
        assert mine.end == theirs.end


def test_a_reader_whose_process_is_gone_says_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(batches.Queue, "_on_queue_feeder_error", None)
    batches._begin_worker(0)
    for error in (BrokenPipeError(), ConnectionResetError(), EOFError(), ValueError("mine")):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == "ValueError: mine\n"


# --- what else lies in folders


def test_a_pipe_neither_hangs_nor_counts_and_hidden_folders_are_left_out(tmp_path, caplog):
    folder = make_folder(tmp_path, {"a": 2, "a/.ipynb_checkpoints": 1, "b": 1})
    os.mkfifo(folder / "a" / "pipe.png")
    assert len(open_dataset(str(folder), vit(2))) == 3
    assert "1 are no regular files, and are left out ('a/pipe.png')" in caplog.text
    with pytest.raises(ImageError, match="no regular file"):
        decode(folder / "a" / "pipe.png", "pipe.png")


def test_a_sub_folder_that_cannot_be_read_is_told(tmp_path, caplog, monkeypatch):
    folder = make_folder(tmp_path, {"a": 1, "a/closed": 1, "b": 1})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(open_dataset(str(folder), vit(2))) == 2
    assert "1 sub-folders cannot be read, and what is in them is left out ('a/closed')" in caplog.text


@pytest.mark.parametrize(("name", "shown"), [(b"a\nb", r"a\nb"), (b"latin-\xe9", r"latin-\udce9")])
def test_a_data_folders_odd_name_is_a_title_anyone_can_print(tmp_path, name, shown):
    folder = make_folder(tmp_path / os.fsdecode(name), {"x": 1})
    assert open_dataset(str(folder), vit(1)).name == shown
