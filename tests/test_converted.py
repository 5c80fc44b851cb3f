"""Models of other libraries: what the original says and what the converted one says, on tiny random models."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from kinds import slowly
from PIL import Image
from safetensors.torch import load_file

import tokbench
from tokbench.errors import UserError
from tokbench.models import converted, hub, load_model
from tokbench.models.converted import CONVERTED, common, hugging_face

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, image_size=32)
LABELS = {0: "tench, Tinca tinca", 1: "goldfish", 2: "T-shirt/top"}


def randomize(model: Any) -> Any:
    """Weights of ordinary size; fresh ones hardly let one token differ from the next, and are zero in places."""
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 1)
    return model.eval()


def agree(model: Any, original: Any, side: int | None = None) -> None:
    """Outputs to 1e-5 of their size, for a model and for what `original` makes of the same images."""
    images = torch.rand(2, 3, *((side, side) if side else model.patch_embed.img_size))
    with torch.inference_mode():
        mine, theirs = model(images), original(images)
    assert mine.shape == theirs.shape
    assert theirs.std() > 0.01
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def fuses(model: Any) -> None:
    tokbench.apply(model, "tome", 2)
    assert model(torch.rand(1, 3, *model.patch_embed.img_size)).isfinite().all()


# --- Hugging Face transformers


@pytest.fixture(scope="module")
def hf() -> Any:
    return pytest.importorskip("transformers")


def processor(folder: Path, **settings: Any) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


VIT = dict(image_processor_type="ViTImageProcessor", size=dict(height=32, width=32))
CLIP = dict(image_processor_type="CLIPImageProcessor", size=dict(shortest_edge=32), crop_size=32)
SIGLIP = dict(image_processor_type="SiglipImageProcessor", size=dict(height=32, width=32))
BIT = dict(image_processor_type="BitImageProcessor", size=dict(shortest_edge=40), crop_size=28)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)

# What each class gives, by the name of its output; config class, settings, image processor.
CLASSES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "ViTModel": ("ViTConfig", dict(patch_size=8, qkv_bias=False), VIT, "last_hidden_state"),
    "ViTForImageClassification": ("ViTConfig", dict(patch_size=8, id2label=LABELS), VIT, "logits"),
    "DeiTModel": ("DeiTConfig", dict(patch_size=8), VIT, "last_hidden_state"),
    "DeiTForImageClassification": ("DeiTConfig", dict(patch_size=8, id2label=LABELS), VIT, "logits"),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", dict(patch_size=8, id2label=LABELS), VIT, "logits"),
    "Dinov2Model": ("Dinov2Config", dict(patch_size=7, image_size=42, mlp_ratio=2), BIT, "pooler_output"),
    "Dinov2ForImageClassification": (
        "Dinov2Config",
        dict(patch_size=7, image_size=42, use_swiglu_ffn=True, id2label=LABELS),
        BIT,
        "logits",
    ),
    "Dinov2WithRegistersForImageClassification": (
        "Dinov2WithRegistersConfig",
        dict(patch_size=7, image_size=42, mlp_ratio=2, id2label=LABELS),
        BIT,
        "logits",
    ),
    "Dinov2WithRegistersModel": (
        "Dinov2WithRegistersConfig",
        dict(patch_size=7, image_size=42, use_swiglu_ffn=True, num_register_tokens=3),
        BIT,
        "pooler_output",
    ),
    "CLIPVisionModel": ("CLIPVisionConfig", dict(patch_size=8), CLIP, "pooler_output"),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", dict(patch_size=8, projection_dim=9), CLIP, "image_embeds"),
    "CLIPModel": ("CLIPConfig", dict(patch_size=8, hidden_act="gelu"), CLIP, "get_image_features"),
    "CLIPForImageClassification": ("CLIPConfig", dict(patch_size=8), CLIP, "logits"),
    "SiglipVisionModel": ("SiglipVisionConfig", dict(patch_size=8), SIGLIP, "pooler_output"),
    "SiglipModel": ("SiglipConfig", dict(patch_size=8), SIGLIP, "get_image_features"),
    "SiglipForImageClassification": ("SiglipConfig", dict(patch_size=8), SIGLIP, "logits"),
}


def make(hf: Any, name: str, folder: Path, **options: Any) -> Any:
    """A tiny random model of a class of transformers, saved as it saves them."""
    config_class, settings, prepare, _ = CLASSES[name]
    settings = SHAPE | settings
    if config_class in ("CLIPConfig", "SiglipConfig"):
        settings = dict(text_config=TEXT, vision_config=settings, projection_dim=9, id2label=LABELS)
    original = randomize(getattr(hf, name)(getattr(hf, config_class)(**settings)))
    original.save_pretrained(folder, **options)
    processor(folder, **prepare)
    return original


def output(original: Any, name: str) -> Any:
    kind = CLASSES[name][3]

    def call(images: torch.Tensor) -> torch.Tensor:
        if kind.startswith("get_"):
            found = getattr(original, kind)(images)
            return found if isinstance(found, torch.Tensor) else found.pooler_output
        found = getattr(original(images), kind)
        return found[:, 0] if kind == "last_hidden_state" else found

    return call


def test_every_class_is_tested():
    assert CLASSES.keys() == hugging_face.ARCHITECTURES.keys() == set(CONVERTED[0][2])


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_of_transformers_says_what_it_says_there(name, hf, tmp_path):
    original = make(hf, name, tmp_path)
    model: Any = load_model(f"hf:{tmp_path}")
    agree(model, output(original, name))
    named = "ForImageClassification" in name
    assert model.pretrained_cfg.get("label_names") == (list(LABELS.values()) if named else None)
    fuses(model)


def test_the_mean_of_merged_patches_is_that_of_all_they_stand_for():
    x, sizes = torch.rand(2, 5, 8), torch.tensor([[1, 1, 3, 1, 2], [1, 1, 1, 4, 1]])
    pooled = hugging_face.ClassAndMean(prefix=2)(x, sizes.log()[:, None, None, :].float())
    for one, out, size in zip(x, pooled, sizes, strict=True):
        whole = one[2:].repeat_interleave(size[2:], dim=0).mean(0)
        torch.testing.assert_close(out, torch.cat([one[0], whole]))


@pytest.mark.parametrize("method", slowly(tokbench.list_methods()))
def test_every_method_works_in_a_converted_model(method, hf, tmp_path):
    make(hf, "Dinov2WithRegistersForImageClassification", tmp_path)
    model: Any = load_model(f"hf:{tmp_path}")
    before, images = model.state_dict(), torch.rand(2, 3, 28, 28)
    unreduced = model(images)
    tokbench.apply(model, method, 3)
    assert model(images).isfinite().all()
    assert (tokbench.tokens_per_block(model)[-1] < 16 + 5) == (method != "none")
    tokbench.remove(model)
    assert torch.equal(model(images), unreduced) and model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", ["ViTForImageClassification", "Dinov2WithRegistersModel"])
def test_the_names_that_files_on_the_hub_have_are_known(name, hf, tmp_path):
    """Before its version 5, transformers named layers otherwise; files on the hub do still."""
    original = make(hf, name, tmp_path)
    old = {}
    for key, tensor in load_file(tmp_path / "model.safetensors").items():
        for new, before in (
            (r"attention.q_proj", "attention.attention.query"),
            (r"attention.k_proj", "attention.attention.key"),
            (r"attention.v_proj", "attention.attention.value"),
            (r"attention.o_proj", "attention.output.dense"),
            *(((r"mlp.fc1", "intermediate.dense"), (r"mlp.fc2", "output.dense")) if name.startswith("ViT") else ()),
            (r"vit.layers.", "vit.encoder.layer."),
        ):
            key = key.replace(new, before)
        old[key] = tensor
    assert any("attention.attention.query" in key for key in old)
    torch.save(old, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    agree(load_model(f"hf:{tmp_path}"), output(original, name))


def test_shards_and_a_checkpoint_of_ones_own_are_read(hf, tmp_path):
    original = make(hf, "ViTForImageClassification", tmp_path, max_shard_size="20kB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    agree(load_model(f"hf:{tmp_path}"), output(original, "ViTForImageClassification"))
    finer = randomize(original)
    finer.classifier = randomize(torch.nn.Linear(32, 5))
    torch.save(
        {"state_dict": {f"model.{key}": value for key, value in finer.state_dict().items()}}, tmp_path / "f.ckpt"
    )
    model: Any = load_model(f"hf:{tmp_path}", tmp_path / "f.ckpt")
    assert model.num_classes == 5 and "label_names" not in model.pretrained_cfg
    agree(model, output(finer, "ViTForImageClassification"))


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPVisionModel", "SiglipVisionModel"])
def test_at_another_size_positions_are_resampled_as_transformers_does(name, hf, tmp_path):
    original = make(hf, name, tmp_path)
    model = load_model(f"hf:{tmp_path}", input_size=48)
    agree(model, output(partial(original, interpolate_pos_encoding=True), name))


PROCESSORS = {
    "squashed": ("ViTImageProcessor", dict(size=dict(height=32, width=32), image_mean=[0.1, 0.2, 0.3])),
    "squashed, of old": ("ViTImageProcessor", dict(size=32, resample=3, do_normalize=False)),
    "squashed and cropped": ("DeiTImageProcessor", dict(size=dict(height=37, width=37), crop_size=32)),
    "shortest edge": ("CLIPImageProcessor", dict(size=dict(shortest_edge=38), crop_size=dict(height=32, width=32))),
    "shortest edge, of old": ("CLIPImageProcessor", dict(size=37, crop_size=32, image_std=[0.5, 0.4, 0.3])),
    "SigLIP's": ("SiglipImageProcessor", dict(size=dict(height=32, width=32), resample=3)),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_images_are_prepared_as_transformers_does(kind, hf, tmp_path):
    make(hf, "ViTForImageClassification", tmp_path)
    name, settings = PROCESSORS[kind]
    processor(tmp_path, image_processor_type=name, **settings)
    theirs = getattr(hf, name + "Pil", None) or getattr(hf, name)
    same_preparation(
        load_model(f"hf:{tmp_path}"), lambda image: theirs(**settings)(image, return_tensors="pt")["pixel_values"][0]
    )


REFUSED = {
    "another class": (
        dict(architectures=["BeitModel"]),
        VIT,
        "a BeitModel of transformers; these can be converted: ViT",
    ),
    "no class": (dict(architectures=None), VIT, "names no architecture"),
    "another activation": (dict(hidden_act="tanh"), VIT, "the activation 'tanh'; these can be converted: gelu"),
    "another processor": ({}, VIT | dict(image_processor_type="Siglip2ImageProcessor"), "with Siglip2ImageProcessor"),
    "no processor": ({}, {}, "prepares images with None"),
    "sides that differ": ({}, VIT | dict(size=dict(height=32, width=64)), "makes no square of"),
    "no common size": ({}, CLIP | dict(do_center_crop=False), "does not crop"),
    "another range": ({}, VIT | dict(rescale_factor=1 / 127.5), "does not scale pixels to 0…1"),
    "another size": ({}, VIT | dict(size=64), "made for images of 32×32 pixels (config.json), and its image processor"),
    "words for numbers": (dict(hidden_size="wide"), VIT, "its configuration cannot be understood ("),
    "heads that do not fit": (dict(num_attention_heads=3), VIT, "its configuration cannot be understood ("),
    "a list for labels": (dict(id2label=["a", "b"]), VIT, "its configuration cannot be understood ("),
    "a word for a mean": ({}, VIT | dict(image_mean=0.5), "its configuration cannot be understood ("),
    "another width": (dict(hidden_size=64), VIT, "cls_token is (1, 1, 32) in the file, (1, 1, 64) in the model"),
}


@pytest.fixture(scope="module")
def saved(hf, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    make(hf, "ViTForImageClassification", folder)
    return folder


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_converted_is_refused_in_a_line(what, saved, tmp_path):
    config, prepare, words = REFUSED[what]
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((tmp_path / "config.json").read_text()) | config))
    processor(tmp_path, **prepare)
    refuse(f"hf:{tmp_path}", words)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_file_that_is_not_there_or_damaged_is_named(file, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / file).write_text("[")
    refuse(f"hf:{tmp_path}", "is no JSON" if file.endswith("json") else "cannot be read")
    (tmp_path / file).unlink()
    refuse(f"hf:{tmp_path}", f"has no {file}")


def test_a_place_that_is_none_is_refused():
    refuse("hf:./nowhere", "there is no folder './nowhere', and it is no OWNER/NAME of the hub")
    refuse("hf:", "there is no folder ''")
    refuse("openclip:a/b/c", "there is no folder 'a/b/c'")


def refuse(name: str, words: str, checkpoint: Path | None = None) -> None:
    with pytest.raises(UserError) as caught:
        load_model(name, checkpoint)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_come_from_the_hub(hf, saved, monkeypatch):
    """The hub is a folder here; its client is not asked."""
    asked = []

    def fetch(repo: str, file: str) -> Path | None:
        asked.append((repo, file))
        return path if (path := saved / file).is_file() else None

    monkeypatch.setattr(hub, "fetch", fetch)
    assert load_model("hf:owner/name@v2").num_classes == 3
    assert asked == [
        ("owner/name@v2", file) for file in ("config.json", "model.safetensors", "preprocessor_config.json")
    ]


def test_without_network_the_way_out_is_told_and_what_is_there_is_used(saved, monkeypatch):
    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    refuse("hf:owner/name@v2", "from https://huggingface.co/owner/name elsewhere and give --model hf:FOLDER")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, file, revision: str(saved / file))
    assert load_model("hf:owner/name").num_classes == 3


def test_random_weights_need_only_the_configuration(hf, saved, tmp_path):
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copy(saved / file, tmp_path)
    assert load_model(f"hf:{tmp_path}", random_weights=True).num_classes == 3


# --- OpenCLIP


@pytest.fixture(scope="module")
def clip() -> Any:
    return pytest.importorskip("open_clip")


TOWER = dict(image_size=32, patch_size=8, layers=2, width=32, head_width=16)
TINY_TEXT = dict(context_length=8, vocab_size=20, width=16, heads=2, layers=1)
TOWERS = {
    "plain": dict(TOWER),
    "quick": dict(TOWER, quick_gelu=True),
    "scaled, of other width": dict(TOWER, ls_init_value=0.1, mlp_ratio=2.3, patch_dropout=0.5),
    "CLIPA's": dict(
        TOWER,
        no_ln_pre=True,
        pool_type="avg",
        final_ln_after_pool=True,
        pos_embed_type="sin_cos_2d",
        norm_kwargs=dict(eps=1e-3),
        act_kwargs=dict(approximate="tanh"),
    ),
    "mean": dict(TOWER, pool_type="avg"),
    "timm's, projected": dict(timm_model_name="test_vit", image_size=160, timm_pool="avg"),
    "timm's, projected with bias": dict(
        timm_model_name="test_vit", image_size=160, timm_pool="token", timm_proj_bias=True
    ),
    "timm's, as it is": dict(timm_model_name="test_vit2", image_size=160, timm_pool="avg", timm_proj="none"),
}


def make_clip(clip: Any, tower: dict[str, Any], folder: Path, **preprocess: Any) -> Any:
    tower = dict(tower)
    quick = tower.pop("quick_gelu", False)
    original = clip.CLIP(9, clip.CLIPVisionCfg(**tower), clip.CLIPTextCfg(**TINY_TEXT), quick_gelu=quick)
    randomize(original)
    torch.save(original.state_dict(), folder / "open_clip_pytorch_model.bin")
    model_cfg = dict(embed_dim=9, vision_cfg=tower, text_cfg=TINY_TEXT, quick_gelu=quick)
    config = dict(model_cfg=model_cfg, preprocess_cfg=preprocess)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return original


@pytest.mark.parametrize("what", TOWERS)
def test_a_tower_of_openclip_says_what_it_says_there(what, clip, tmp_path):
    original = make_clip(clip, TOWERS[what], tmp_path)
    model = load_model(f"openclip:{tmp_path}")
    agree(model, original.encode_image)
    fuses(model)


def test_a_tower_alone_or_wrapped_is_known(clip, tmp_path):
    original = make_clip(clip, TOWERS["plain"], tmp_path)
    (tmp_path / "open_clip_pytorch_model.bin").unlink()
    state = original.state_dict()
    for number, part in enumerate(
        (
            {key: value for key, value in state.items() if key.startswith("visual.")},
            {f"module.{key}": value for key, value in state.items()},
            original.visual.state_dict(),
        )
    ):
        torch.save({"state_dict": part}, tmp_path / f"{number}.pt")
        agree(load_model(f"openclip:{tmp_path}", tmp_path / f"{number}.pt"), original.encode_image)
    refuse(f"openclip:{tmp_path}", "has no open_clip_model.safetensors or open_clip_pytorch_model.bin")


@pytest.mark.parametrize(
    "preprocess", [{}, dict(resize_mode="squash", mean=[0.5] * 3, std=[0.4] * 3, interpolation="bilinear")]
)
def test_images_are_prepared_as_openclip_does(preprocess, clip, tmp_path):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    make_clip(clip, TOWERS["plain"], tmp_path, **preprocess)
    expected = image_transform_v2(PreprocessCfg(size=32, **preprocess), is_train=False)
    same_preparation(load_model(f"openclip:{tmp_path}"), expected)


def same_preparation(model: Any, expected: Any) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    torch.testing.assert_close(transform(image), expected(image), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("tower", "words"),
    [
        (dict(layers=[1, 1, 1, 1]), "is a ResNet"),
        (dict(head_width=0), "its configuration cannot be understood ("),
        (dict(attentional_pool=True), "has attentional_pool=True"),
        (dict(qk_norm=True), "has qk_norm=True"),
        (dict(timm_model_name="vit_tinny"), "is built of 'vit_tinny'."),
        (dict(timm_model_name="test_vit", timm_proj="mlp"), "a projection (mlp)"),
        (dict(timm_model_name="resnet18", timm_pool="avg"), "ResNet is not a plain ViT"),
    ],
)
def test_a_tower_that_timm_cannot_be_is_refused(tower, words, tmp_path):
    config = dict(model_cfg=dict(embed_dim=9, vision_cfg=TOWER | tower))
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save({"visual.proj": torch.zeros(32, 9)}, tmp_path / "open_clip_pytorch_model.bin")
    refuse(f"openclip:{tmp_path}", words)


# --- torchvision


@pytest.fixture(scope="module")
def tv() -> Any:
    return pytest.importorskip("torchvision")


@pytest.fixture
def tiny_tv(monkeypatch) -> None:
    monkeypatch.setitem(converted.torchvision.ARCHITECTURES, "vit_b_16", (16, 2, 2, 32))


def make_tv(tv: Any, path: Path, **options: Any) -> Any:
    shape: dict[str, Any] = dict(image_size=48, patch_size=16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=128)
    original = randomize(tv.models.VisionTransformer(**shape | options))
    torch.save(original.state_dict(), path)
    return original


@pytest.mark.parametrize("options", [{}, dict(image_size=80, num_classes=7)])
def test_a_model_of_torchvision_says_what_it_says_there(options, tv, tiny_tv, tmp_path):
    original = make_tv(tv, tmp_path / "mine.pth", **options)
    model = load_model("tv:vit_b_16", tmp_path / "mine.pth")
    agree(model, original)
    fuses(model)


def test_files_from_before_torchvisions_mlp_had_its_names_are_known(tv, tiny_tv, tmp_path):
    original = make_tv(tv, tmp_path / "mine.pth")
    state = torch.load(tmp_path / "mine.pth")
    torch.save(
        {key.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for key, v in state.items()},
        tmp_path / "old.pth",
    )
    agree(load_model("tv:vit_b_16", tmp_path / "old.pth"), original)


def test_what_torchvision_publishes_is_known_by_its_hash(tv, tiny_tv, tmp_path, monkeypatch):
    """Its files are not here; the table is compared with theirs, and one of our own takes the place of a file."""
    table, sides, names = {}, {}, converted.torchvision.class_names()
    for name in CONVERTED[2][2]:
        for weights in tv.models.get_model_weights(name):
            how = weights.transforms()
            key = weights.url.rpartition("-")[2].removesuffix(".pth")
            table[key] = (name, how.resize_size[0], how.interpolation.value)
            sides[key] = how.crop_size[0]
            assert weights.meta["categories"] == names
    assert table == converted.torchvision.OFFICIAL
    assert all(np.floor(sides[key] / common.crop(sides[key], table[key][1])) == table[key][1] for key in table)

    make_tv(tv, tmp_path / "mine.pth", num_classes=1000)
    digest = hashlib.sha256((tmp_path / "mine.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(converted.torchvision.OFFICIAL, digest[:8], ("vit_b_16", 54, "bicubic"))
    model: Any = load_model("tv:vit_b_16", tmp_path / "mine.pth")
    assert model.pretrained_cfg["label_names"] == names
    preset = tv.transforms._presets.ImageClassification(
        crop_size=48, resize_size=54, interpolation=tv.transforms.InterpolationMode.BICUBIC
    )
    same_preparation(model, preset)


def test_a_model_of_torchvision_needs_its_file(tv, tiny_tv, tmp_path):
    refuse("tv:vit_b_16", "give it as --checkpoint FILE")
    refuse("tv:vit_b_61", "Did you mean 'vit_b_16'")
    refuse("tv:resnet50", "These can be converted: vit_b_16")
    torch.save({"conv_proj.weight": torch.zeros(3), "encoder.pos_embedding": torch.zeros(1, 0, 32)}, tmp_path / "a.pth")
    refuse("tv:vit_b_16", "does not fit model 'tv:vit_b_16'", tmp_path / "a.pth")
    assert load_model("tv:vit_b_16", random_weights=True).num_classes == 1000
