from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data.config import resolve_model_data_config
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from tokbench.errors import UserError
from tokbench.models import hub, load_model, loading, model_names, read_checkpoint, weights_sha256

TINY = "test_vit"  # timm's own for tests: 64 wide, 6 blocks, 160 pixels
BUNDLED = dict(img_size=56, patch_size=4, in_chans=1, num_classes=10, embed_dim=96, depth=12, num_heads=3)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Making weights at random on a busy machine is many times slower with several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny() -> VisionTransformer:
    torch.manual_seed(0)
    return timm.create_model(TINY, num_classes=7)


@pytest.fixture(scope="module")
def bundled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bundled") / "weights.safetensors"
    save_file({name: tensor.half() for name, tensor in VisionTransformer(**BUNDLED).state_dict().items()}, path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that does not answer and an empty cache. The list receives the addresses that were asked."""
    asked: list[str] = []

    def unreachable(url: str, timeout: float) -> None:
        asked.append(url)
        raise ConnectionError("Name or service not known\nsecond line")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    return asked


def complaint(name: str, checkpoint: Path | None = None, **options: int) -> str:
    with pytest.raises(UserError) as caught:
        load_model(name, checkpoint, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_bundled_model_is_a_grey_vit_with_its_own_preprocessing(bundled_file, monkeypatch):
    monkeypatch.setattr(loading, "BUNDLED_WEIGHTS", bundled_file)
    model = load_model()
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(torch.zeros(2, 1, 56, 56)).shape == (2, 10)
    config = resolve_model_data_config(model)
    assert (config["input_size"], config["mean"], config["std"], config["crop_pct"]) == ((1, 56, 56), (0.5,), (0.5,), 1)
    assert model.pretrained_cfg["label_names"][9] == "Ankle boot"
    stored = read_checkpoint(bundled_file)
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in model.state_dict().items())


def test_an_explicit_input_size_resamples_positions_and_changes_the_preprocessing(bundled_file):
    model = load_model("bundled", bundled_file, input_size=64)
    assert model.pretrained_cfg["input_size"] == (1, 64, 64)
    assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 10)


def test_an_input_size_that_patches_do_not_fill_is_refused(bundled_file):
    assert "input_size 58 is no multiple of the 4-pixel patches" in complaint("bundled", bundled_file, input_size=58)
    assert "try 56 or 60" in complaint("bundled", bundled_file, input_size=58)
    assert "not 0" in complaint("bundled", bundled_file, input_size=0)


WRAPPERS = {
    "plain": lambda state: state,
    "timm": lambda state: {"epoch": 3, "state_dict": zeros(state), "state_dict_ema": state},
    "deit": lambda state: {"model": zeros(state), "model_ema": state, "optimizer": {"state": {}}},
    "ema": lambda state: {"ema": {"n_averaged": torch.tensor(2), **state}},
    "compiled DDP": lambda state: {"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
}


def zeros(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_training_checkpoints_are_unwrapped_and_averaged_weights_preferred(wrapper, tiny, tmp_path):
    torch.save(WRAPPERS[wrapper](tiny.state_dict()), tmp_path / "checkpoint.pth.tar")
    read = read_checkpoint(tmp_path / "checkpoint.pth.tar")
    assert read.keys() == tiny.state_dict().keys()
    assert torch.equal(read["blocks.5.mlp.fc2.weight"], tiny.state_dict()["blocks.5.mlp.fc2.weight"])


def test_the_number_of_classes_is_that_of_the_checkpoint(tiny, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "seven.safetensors")
    model = load_model(TINY, tmp_path / "seven.safetensors")
    assert model.num_classes == model.pretrained_cfg["num_classes"] == 7
    assert weights_sha256(model) == weights_sha256(tiny)
    model.head.bias.data[0] += 1
    assert weights_sha256(model) != weights_sha256(tiny)


def test_the_hash_does_not_depend_on_the_order_of_the_weights():
    first, second = torch.nn.Module(), torch.nn.Module()
    for name in ("a", "b"):
        first.register_buffer(name, torch.full((2,), ord(name), dtype=torch.bfloat16))
    for name in ("b", "a"):
        second.register_buffer(name, torch.full((2,), ord(name), dtype=torch.bfloat16))
    assert weights_sha256(first) == weights_sha256(second)
    assert weights_sha256(first) != weights_sha256(first.float())


def test_a_checkpoint_of_another_shape_is_refused_with_the_first_mismatches(tiny, bundled_file, tmp_path):
    save_file(tiny.state_dict(), tmp_path / "tiny.safetensors")
    message = complaint("bundled", tmp_path / "tiny.safetensors")
    assert "cls_token is (1, 1, 64) in the file, (1, 1, 96) in the model" in message
    assert message.count(" in the file, ") == 3
    assert "more." in message


def test_a_missing_and_a_surplus_weight_are_named(tiny, tmp_path):
    state = dict(tiny.state_dict())
    state["extra"] = state.pop("norm.bias")
    save_file(state, tmp_path / "renamed.safetensors")
    message = complaint(TINY, tmp_path / "renamed.safetensors")
    assert "norm.bias (64,) is not in the file; extra (64,) is not in the model." in message


def test_positions_of_another_input_size_are_refused_with_that_size(tmp_path):
    save_file(timm.create_model(TINY, img_size=96).state_dict(), tmp_path / "small.safetensors")
    message = complaint(TINY, tmp_path / "small.safetensors")
    assert "pos_embed is (1, 37, 64) in the file, (1, 101, 64) in the model. " in message
    assert message.endswith("Its positions look like those of input_size 96.")


def test_a_missing_checkpoint_is_refused_with_the_nearest_file(tmp_path):
    (tmp_path / "best.pth").write_bytes(b"")
    assert complaint(TINY, tmp_path / "bets.pth").endswith("bets.pth' does not exist. Did you mean 'best.pth'?")
    assert "is a folder" in complaint(TINY, tmp_path)
    assert "does not exist" in complaint(TINY, tmp_path / "nowhere" / "best.pth")


@pytest.mark.parametrize("name", ["junk.pth", "empty.pth", "junk.safetensors", "empty.safetensors", "cut.pth"])
def test_an_unreadable_checkpoint_is_refused(name, tmp_path):
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "whole.pth")
    content = {"junk": b"hello, I am text", "empty": b"", "cut": (tmp_path / "whole.pth").read_bytes()[:900]}
    (tmp_path / name).write_bytes(content[name.partition(".")[0]])
    assert f"{name}' cannot be read: " in complaint(TINY, tmp_path / name)


def test_a_pickled_model_is_never_unpickled(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    words = "holds no weights but a torch.nn.modules.linear.Linear; save model.state_dict()"
    assert words in complaint(TINY, tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "found"), [([1, 2], "a list"), ({"epoch": 1}, "only epoch"), ({}, "only an empty dict")]
)
def test_a_checkpoint_without_weights_is_refused(content, found, tmp_path):
    torch.save(content, tmp_path / "none.pt")
    assert f"holds no weights but {found}" in complaint(TINY, tmp_path / "none.pt")


def test_an_unknown_model_is_refused_with_close_matches(offline):
    assert "Did you mean 'deit_small_patch16_224'" in complaint("deit_smal_patch16_224")
    assert "'deit_small_patch16_224.fb_in1k'" in complaint("deit_small_patch16_224.fb_in2k")
    assert "Did you mean 'bundled'" in complaint("bundeld")
    assert "'hf-hub:owner/name' to load from the Hub" in complaint("owner/name")
    assert "unknown model 'hf-hub:not a name'" in complaint("hf-hub:not a name")
    assert "Config file not found" in complaint("local-dir:/nowhere")
    assert not offline


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resnet50", "ResNet"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("pit_s_224", "PoolingVisionTransformer"),
    ],
)
def test_a_model_that_is_no_plain_vit_is_refused_before_anything_is_downloaded(name, kind, offline):
    assert f"model {name!r}: {kind} is not a plain ViT" in complaint(name)
    assert not offline


def test_a_vit_that_fusion_cannot_go_into_is_refused_with_the_reason(offline):
    assert "'vit_pwee_patch16_reg1_gap_256': block 0 is a ParallelScalingBlock" in complaint(
        "vit_pwee_patch16_reg1_gap_256"
    )
    assert not offline


def test_a_vit_without_published_weights_needs_a_checkpoint(offline):
    assert "no pretrained weights for model 'vit_small_patch16_36x1_224'" in complaint("vit_small_patch16_36x1_224")
    assert not offline


def test_without_network_the_hub_is_asked_once_and_the_way_out_is_told(offline):
    message = complaint("deit_tiny_patch16_224")
    assert "Name or service not known" in message
    assert "https://huggingface.co/timm/deit_tiny_patch16_224.fb_in1k" in message
    assert "--checkpoint FILE" in message and "--model bundled" in message
    assert len(offline) == 1
    assert "https://huggingface.co/owner/name" in complaint("hf-hub:owner/name@v2")
    assert "/v2/config.json" in offline[1]


def test_weights_in_the_cache_need_no_network(offline, monkeypatch):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, file, revision: "/cache/" + file)
    hub.require_hub("timm/any", ["model.safetensors"])
    assert not offline


def test_model_names_are_vits_with_weights():
    names = model_names()
    assert names[0] == "bundled"
    assert {"deit_small_patch16_224.fb_in1k", "vit_small_patch16_dinov3.lvd1689m"} <= set(names)
    assert not any(name.startswith(("resnet", "pit_", "swin")) for name in names)
    assert model_names("bund") == ["bundled"]
    assert set(model_names("deit_*tiny*")) == {name for name in model_names("deit_") if "tiny" in name}


def test_weights_as_their_authors_publish_them_are_converted(tmp_path):
    """DINOv2's own file: a mask token, and registers and class token apart from timm's order of names."""
    name = "vit_small_patch14_reg4_dinov2"
    model = timm.create_model(name, img_size=28)
    state = model.state_dict()
    published = {key: value for key, value in state.items() if key != "reg_token"}
    published |= {"mask_token": torch.zeros(1, 384), "register_tokens": state["reg_token"]}
    # Meta's positions begin with the class token's, which timm adds to the class token itself.
    published["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    torch.save(published, tmp_path / "meta.pth")
    loaded = load_model(name, tmp_path / "meta.pth", input_size=28)
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())

    published["blocks.0.odd"] = torch.zeros(1)
    torch.save(published, tmp_path / "odd.pth")
    with pytest.raises(UserError, match="does not fit") as error:
        load_model(name, tmp_path / "odd.pth", input_size=28)
    assert "mask_token" in str(error.value)  # named as it stands in the file


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A one-block ViT of which many weights have as many numbers as its patches, at one size of patch or another."""
    return local_model(tmp_path_factory.mktemp("narrow"), img_size=(56, 56))


def local_model(folder: Path, img_size: tuple[int, int]) -> str:
    """timm's "local-dir:" name of a one-block ViT with patches of 8 pixels and images of this size."""
    args = dict(depth=1, embed_dim=192, num_heads=3, patch_size=8, img_size=img_size)
    cfg = dict(num_classes=5, input_size=[3, *img_size], mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic")
    config = dict(architecture="vit_tiny_patch16_224", num_classes=5, model_args=args, pretrained_cfg=cfg)
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


def state_of(patch: int, img_size: int | tuple[int, int]) -> dict[str, torch.Tensor]:
    args = dict(depth=1, embed_dim=192, num_heads=3, num_classes=5, patch_size=patch, img_size=img_size)
    return VisionTransformer(**args).state_dict()


@pytest.mark.parametrize("size", [None, 56])
@pytest.mark.parametrize("prefix", ["", "visual.trunk.", "net."])
def test_patches_of_another_size_are_refused_whatever_they_are_called(prefix, size, narrow, tmp_path):
    torch.save({prefix + name: tensor for name, tensor in state_of(16, 112).items()}, tmp_path / "wide.pth")
    message = complaint(narrow, tmp_path / "wide.pth", **{} if size is None else {"input_size": size})
    assert "patch_embed.proj.weight is (192, 3, 16, 16) in the file, (192, 3, 8, 8) in the model" in message


@pytest.mark.parametrize("prefix", ["", "visual.trunk."])
def test_positions_of_another_grid_are_refused_unless_a_size_is_asked_for(prefix, narrow, tmp_path):
    torch.save({prefix + name: tensor for name, tensor in state_of(8, 80).items()}, tmp_path / "more.pth")
    message = complaint(narrow, tmp_path / "more.pth")
    assert "pos_embed is (1, 101, 192) in the file" in message and message.endswith("of input_size 80.")
    assert load_model(narrow, tmp_path / "more.pth", input_size=64).pos_embed.shape == (1, 65, 192)


def test_a_grid_that_is_no_square_is_known_from_the_model_or_refused(narrow, tmp_path):
    torch.save(state_of(8, (56, 112)), tmp_path / "wide.pth")  # 7×14
    assert "positions for 98 patches, which are no square" in complaint(narrow, tmp_path / "wide.pth", input_size=64)
    torch.save(state_of(8, (32, 128)), tmp_path / "flat.pth")  # 4×16 are as many as 8×8
    flat = local_model(tmp_path, img_size=(32, 128))
    kept, square = load_model(flat, tmp_path / "flat.pth"), load_model(flat, tmp_path / "flat.pth", input_size=64)
    assert torch.equal(kept.pos_embed[:, 1:], torch.load(tmp_path / "flat.pth")["pos_embed"][:, 1:])
    expected = resample_abs_pos_embed(kept.pos_embed, [8, 8], [4, 16])
    assert torch.equal(square.pos_embed, expected) and not torch.equal(square.pos_embed, kept.pos_embed)
    torch.save(state_of(8, 80), tmp_path / "square.pth")  # 10×10, or 5×20
    assert "not the 4×16 of this model" in complaint(flat, tmp_path / "square.pth", input_size=64)


def test_random_weights_need_no_download_and_are_always_the_same(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(hub, "require_hub", refuse)
    torch.manual_seed(1)
    first, state = load_model("deit_tiny_patch16_224", random_weights=True), torch.get_rng_state()
    again = load_model("deit_tiny_patch16_224", random_weights=True)
    assert weights_sha256(first) == weights_sha256(again)
    assert torch.equal(state, torch.get_rng_state())
    assert weights_sha256(load_model(random_weights=True)) != weights_sha256(load_model())


HOSTILE = {
    "keys that are numbers": lambda state: ({**state, 7: torch.zeros(2)}, "7 (2,) is not in the model"),
    "a number for the head": lambda state: ({**state, "head.weight": torch.tensor(1.0)}, "head.weight is () in the"),
    "a number for positions": lambda state: ({**state, "pos_embed": torch.tensor(1.0)}, "pos_embed is () in the"),
    "a billion classes": lambda state: (
        {**state, "head.weight": torch.zeros(1).expand(10**9, 64)},
        "head.weight is (1000000000, 64), and the file holds fewer numbers",
    ),
    "sparse": lambda state: ({**state, "norm.weight": torch.zeros(64).to_sparse()}, "norm.weight is a sparse"),
    "no numbers": lambda state: ({**state, "norm.weight": torch.zeros(64, device="meta")}, "or meta tensor"),
    "whole numbers": lambda state: (
        {**state, "norm.weight": torch.zeros(64).long()},
        "norm.weight holds int64 numbers",
    ),
    "many rows of nothing": lambda state: ({**state, "head.weight": torch.zeros(10**10, 0)}, "would take"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_checkpoint_is_refused_before_a_model_is_built(kind, tiny, tmp_path, monkeypatch):
    state, words = HOSTILE[kind](tiny.state_dict())
    torch.save(state, tmp_path / "hostile.pth")
    monkeypatch.setattr(VisionTransformer, "load_state_dict", lambda *a, **k: pytest.fail("loaded"))
    assert words in complaint(TINY, tmp_path / "hostile.pth")


def test_a_checkpoint_wrapped_in_itself_is_refused(tmp_path):
    state: dict = {}
    state["model"] = state
    torch.save(state, tmp_path / "cycle.pth")
    assert "holds no weights but only model" in complaint(TINY, tmp_path / "cycle.pth")


@pytest.mark.filterwarnings("error")
def test_a_pickle_of_another_program_is_refused_without_a_warning(tiny, tmp_path):
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(dict(tiny.state_dict()), protocol=4))
    assert "no file of torch.save" in complaint(TINY, tmp_path / "raw.pth")


def test_an_input_size_that_no_memory_holds_is_refused(monkeypatch):
    assert "1 to 65536 pixels" in complaint("bundled", input_size=400_000_000)
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: SimpleNamespace(total=2**36))
    assert "would take 96 GiB, and this machine has 64 GiB" in complaint("bundled", input_size=65_536)
