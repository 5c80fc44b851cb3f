"""Files of weights from anywhere: as training scripts write them, and as nobody should."""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import random
import resource
import zipfile
from collections import OrderedDict, defaultdict
from contextlib import contextmanager

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file

from tokbench.errors import UserError
from tokbench.models import read_checkpoint

STATE = {f"{name}.weight": torch.rand(2, 3) for name in ("patch_embed.proj", "blocks.0.norm1", "head")}


def read(content, path):
    torch.save(content, path / "file.pth")
    return read_checkpoint(path / "file.pth")


def prefixed(prefix):
    return {prefix + name: tensor for name, tensor in STATE.items()}


def same(state):
    return state.keys() == STATE.keys() and all(torch.equal(state[name], STATE[name]) for name in STATE)


PREFIXES = {
    "Lightning": {"state_dict": prefixed("model."), "pytorch-lightning_version": "2", "loops": {"fit": {}}},
    "a module's attribute": prefixed("net."),
    "DeepSpeed": {"module": prefixed("module."), "optimizer": None, "ds_version": "0.9"},
    "compiled DDP in Lightning": {"state_dict": prefixed("model._orig_mod.module.")},
    "DINO": {
        "student": prefixed("module.backbone."),
        "teacher": prefixed("backbone.") | {"head.last.weight": torch.zeros(1)},
    },
    "DINOv2": {"teacher": prefixed("backbone.") | {"dino_head.mlp.0.weight": torch.zeros(1)}},
}


@pytest.mark.parametrize("trainer", PREFIXES)
def test_a_prefix_that_all_names_share_is_taken_off(trainer, tmp_path):
    assert same(read(PREFIXES[trainer], tmp_path))


def test_names_that_converters_look_for_are_left(tmp_path):
    for prefix in ("visual.trunk.", "radio_model.model."):
        assert read(prefixed(prefix), tmp_path).keys() == prefixed(prefix).keys()
    mixed = prefixed("a.") | {"b.weight": torch.zeros(1)}
    assert read(mixed, tmp_path).keys() == mixed.keys()


@pytest.mark.parametrize("empty", [{}, None, {"decay": 0.99}, {"module": {}}, OrderedDict()])
def test_averaged_weights_that_are_none_are_passed_over(empty, tmp_path):
    assert same(read({"state_dict_ema": empty, "model_ema": empty, "state_dict": STATE}, tmp_path))


class Config:
    """A class that whoever reads the file does not have."""

    def __init__(self):
        self.lr = 0.1


BESIDE = {
    "a numpy scalar": np.float64(81.2),
    "an array": np.arange(3),
    "random states": (random.getstate(), np.random.get_state(), torch.get_rng_state()),
    "a path": pathlib.Path("runs/1"),
    "a Windows path": pathlib.PureWindowsPath("runs"),
    "a defaultdict": defaultdict(list, a=[1]),
    "an object": Config(),
    "a class": Config,
    "a device": torch.device("cpu"),
    "a set": {1, 2},
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("what", BESIDE)
def test_what_lies_beside_the_weights_is_no_obstacle(what, old, tmp_path):
    content = {"model": STATE, "best": BESIDE[what], "epoch": 3}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=not old)
    assert same(read_checkpoint(tmp_path / "file.pth"))


def test_what_stands_in_the_way_is_named(tmp_path):
    with pytest.raises(UserError, match=r"only model \(a test_checkpoints.Config\), epoch; save model.state_dict"):
        read({"model": Config(), "epoch": 1}, tmp_path)
    with pytest.raises(UserError, match="cannot be read: .*posix.system"):
        read({"model": STATE, "hook": os.system}, tmp_path)


# --- shards


def shards(folder, names=("a.safetensors", "b.safetensors")):
    parts = [dict(list(STATE.items())[:2]), dict(list(STATE.items())[2:])]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {key: name for name, part in zip(names, parts, strict=True) for key in part}})
    )
    return index


def test_shards_are_read_by_their_index(tmp_path):
    index = shards(tmp_path)
    assert same(read_checkpoint(index))
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="its files hold no head.weight"):
        read_checkpoint(index)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors' does not exist"):
        read_checkpoint(index)


@pytest.mark.parametrize("place", ["../b.safetensors", "/etc/passwd", "model.safetensors.index.json"])
def test_an_index_names_only_files_beside_it(place, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(UserError, match="no file of weights beside it"):
        read_checkpoint(index)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"])
def test_a_damaged_index_is_refused_in_a_line(text, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(index)


# --- hostile


def reduce(module: str, name: str, arguments: bytes) -> bytes:
    return b"\x80\x02}(X\x01\x00\x00\x00ac" + f"{module}\n{name}\n".encode() + arguments + b"Ru."


def number(n: int) -> bytes:
    return b"\x8a\x10" + n.to_bytes(16, "little") + b"\x85"


PICKLES = {
    "an unhashable key": b"\x80\x02}(]K\x01u.",
    "a size of a number": reduce("torch", "Size", b"K\x05\x85"),
    "bytearray of more than counts": reduce("builtins", "bytearray", number(2**100)),
    "bytearray of more than there is": reduce("builtins", "bytearray", number(2**60)),
    "bytearray of 8 GiB": reduce("builtins", "bytearray", number(8 << 30)),
    "bytearray as Python 2 calls it": reduce("__builtin__", "bytearray", number(8 << 30)),
    "numpy's empty record": reduce("numpy._core.multiarray", "_reconstruct", number(8 << 30)),
    "a tensor of 8 GiB": reduce("torch", "Tensor", number(2 << 30)),
    "storage of 8 GiB": reduce("torch.storage", "UntypedStorage", number(8 << 30)),
    "a path of a number": reduce("pathlib", "PosixPath", number(8 << 30)),
    "nothing": b"",
    "an end without a beginning": b".",
    "deep nesting": b"\x80\x02" + b"(" * 100_000 + b".",
}


def zipped(path, pickle_: bytes, compression=zipfile.ZIP_STORED, name="a/data.pkl"):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, content in ((name, pickle_), ("a/version", "3\n"), ("a/byteorder", "little")):
            archive.writestr(member, content)


@contextmanager
def little_memory():
    """At most 64 MiB is used meanwhile, and none claimed afterwards: from too large a process none can be forked."""
    used, claimed = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, psutil.Process().memory_info().vms
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 64 << 10  # KiB
    assert psutil.Process().memory_info().vms - claimed < 1 << 30


@pytest.mark.parametrize("what", PICKLES)
def test_a_hostile_pickle_is_refused_in_a_line_and_little_memory(what, tmp_path):
    zipped(tmp_path / "file.pth", PICKLES[what])
    with little_memory(), pytest.raises(UserError, match=r"\A.+\Z"):
        read_checkpoint(tmp_path / "file.pth")


def test_an_old_file_with_less_than_it_claims_takes_little_memory(tmp_path):
    torch.save({"a": torch.zeros(4)}, tmp_path / "file.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "file.pth").read_bytes()
    claim = b"X\x03\x00\x00\x00cpuq\x06K\x04N"  # where the storage lies, its length, and no view of it
    assert whole.count(claim) == 1
    longer = claim.replace(b"K\x04", b"\x8a\x05" + (1 << 31).to_bytes(5, "little"))
    (tmp_path / "file.pth").write_bytes(whole.replace(claim, longer))
    with little_memory(), pytest.raises(UserError, match=r"cannot be read|fewer numbers"):
        read_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["a/data.pkl", "a/DATA.PKL"])
def test_a_file_that_unpacks_to_more_than_itself_is_refused(name, tmp_path):
    zipped(tmp_path / "file.pth", b"\x80\x02}." + bytes(1 << 24), zipfile.ZIP_DEFLATED, name)
    assert (tmp_path / "file.pth").stat().st_size < 1 << 16
    with pytest.raises(UserError, match="its parts unpack to more than the file"):
        read_checkpoint(tmp_path / "file.pth")


def test_a_compressed_part_among_stored_ones_counts(tmp_path):
    torch.save(STATE, tmp_path / "file.pth")
    with zipfile.ZipFile(tmp_path / "file.pth", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("file/data/9", bytes(1 << 24))
    with pytest.raises(UserError, match="unpack to more"):
        read_checkpoint(tmp_path / "file.pth")


def test_a_stored_shape_beyond_the_file_is_refused(tmp_path):
    """torch lets a tensor's shape lengthen its storage."""
    content = {"a": torch.zeros(4)}
    torch.save(content, tmp_path / "file.pth")
    with zipfile.ZipFile(tmp_path / "file.pth") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    key = next(name for name in parts if name.endswith("data.pkl"))
    longer = pickle.BININT + (1 << 28).to_bytes(4, "little")
    # QK\x00(K\x04)… : storage offset 0, size (4,), stride (1,)
    assert parts[key].count(b"QK\x00K\x04\x85") == 1
    parts[key] = parts[key].replace(b"QK\x00K\x04\x85", b"QK\x00" + longer + b"\x85")
    with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(UserError, match=r"fewer numbers|cannot be read"):
        read_checkpoint(tmp_path / "file.pth")
