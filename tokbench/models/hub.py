"""The Hugging Face Hub: whether it answers, and what to tell the user when it does not."""

from __future__ import annotations

from pathlib import Path

import timm
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from tokbench.errors import UserError, shortened
from tokbench.models.bundled import BUNDLED

# The base error of the HTTP library behind the hub's client, which changed with its versions.
HubError: type[Exception] = HfHubHTTPError.__bases__[0]
_TIMEOUT_S = 10


def hub_files(name: str) -> tuple[str, list[str]]:
    """The hub repository of a timm model ("" if it has none) and what its weights file may be called there."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return "", []
    return cfg.hf_hub_id, [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]


def require_hub(repo: str, files: list[str]) -> None:
    """Ask the hub once. Its own client keeps trying for the better part of a minute when there is no network."""
    repo, _, tag = repo.partition("@")
    revision = tag or None
    if any(isinstance(try_to_load_from_cache(repo, file, revision=revision), str) for file in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo, files[0], revision=revision), timeout=_TIMEOUT_S)
    except EntryNotFoundError:
        return  # the hub answers and has the repository, with weights under another name


def fetch(repo: str, file: str) -> Path | None:
    """A file of a hub repository "OWNER/NAME" or "OWNER/NAME@REVISION", downloaded once; None if it has no such file.

    Raises HubError or OSError if the hub does not answer.
    """
    name, _, tag = repo.partition("@")
    revision = tag or None
    cached = try_to_load_from_cache(name, file, revision=revision)
    if cached is not None:
        return Path(cached) if isinstance(cached, str) else None  # else it is known that there is none
    require_hub(repo, [file])
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except EntryNotFoundError:
        return None


def cannot_download(name: str, repo: str, error: Exception, way_out: str = "") -> UserError:
    """What to tell when the hub does not answer; `way_out`: what to do without network, by default --checkpoint."""
    page = f"https://huggingface.co/{repo.partition('@')[0]}" if repo else "its home page"
    way_out = way_out or (
        "fetch its weights file from PAGE elsewhere and give it as --checkpoint FILE (.safetensors, .pth, .pt or .bin)"
    )
    return UserError(
        f"cannot download the weights of model {name!r} ({shortened(error)}). Without network: "
        f"{way_out.replace('PAGE', page)}, or use --model {BUNDLED}."
    )
