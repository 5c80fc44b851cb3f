"""Models of other libraries: what the original says and what the converted one says, on tiny random models."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tokbench
from tokbench.errors import UserError
from tokbench.models import converted, load_model
from tokbench.models.converted import CONVERTED, hugging_face

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
    torch.save({"state_dict": {f"model.{key}": value for key, value in finer.state_dict().items()}}, tmp_path / "f.ckpt")
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
    "shortest edge, of old": ("CLIPImageProcessor", dict(size=36, crop_size=32, image_std=[0.5, 0.4, 0.3])),
    "SigLIP's": ("SiglipImageProcessor", dict(size=dict(height=32, width=32), resample=3)),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_images_are_prepared_as_transformers_does(kind, hf, tmp_path):
    make(hf, "ViTForImageClassification", tmp_path)
    name, settings = PROCESSORS[kind]
    processor(tmp_path, image_processor_type=name, **settings)
    theirs = getattr(hf, name + "Pil", None) or getattr(hf, name)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    expected = theirs(**settings)(image, return_tensors="pt")["pixel_values"][0]
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(load_model(f"hf:{tmp_path}")), is_training=False
    )
    torch.testing.assert_close(transform(image), expected, rtol=0, atol=1e-5)
