"""Latents and text embeddings on disk, each under the hash of everything it was computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from lorafuse_train.atomic import write_atomically
from lorafuse_train.dataset.data import Prompt, Sample

LATENTS, CONTROLS, TEXT = "latents", "controls", "text"
LAYOUT = 1
"""Raised when the files below `root` change their form."""


@dataclass(frozen=True, slots=True)
class Cache:
    """A store whose keys are content: nothing in it can be stale, and trainings of one dataset share it."""

    root: Path
    vae_sha256: str
    """Of the VAE's files."""
    text_sha256: str
    """Of the text encoder's and the tokenizer's files."""
    recipe: str
    """Name and version of the recipe that encodes."""
    text_sees_controls: bool = False
    """`Recipe.text_sees_controls`."""

    def latents(self, sample: Sample) -> Path:
        """Where the latents of a picture or video lie."""
        frames = [list(sample.excerpt)] if sample.excerpt else []
        return self._path(LATENTS, self.vae_sha256, sample.sha256, list(sample.size), *frames)

    def controls(self, prompt: Prompt) -> Path:
        """Where the latents of control pictures lie, which may depend on the shape of what is drawn."""
        return self._path(CONTROLS, self.vae_sha256, _shown(prompt), list(prompt.shape))

    def text(self, prompt: Prompt) -> Path:
        """Where the embeddings of a caption lie, with its controls where the text encoder sees them."""
        shown = [_shown(prompt)] if self.text_sees_controls and prompt.controls else []
        return self._path(TEXT, self.text_sha256, prompt.caption, *shown)

    def _path(self, kind: str, *origin: object) -> Path:
        key = hashlib.sha256(json.dumps([LAYOUT, kind, self.recipe, *origin]).encode()).hexdigest()
        return self.root / kind / key[:2] / f"{key}.safetensors"


def _shown(prompt: Prompt) -> list[list[object]]:
    return [[control.sha256, list(control.size), control.is_video] for control in prompt.controls]


def store(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one entry with a digest of its content."""
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = _digest(plain)
    write_atomically(path, lambda file: save_file(plain, file, {"sha256": digest}))


def load(path: Path) -> dict[str, Tensor]:
    """Read one entry that `intact` has found good."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping, has no __iter__


def intact(path: Path) -> bool:
    """Whether an entry is there and holds what was written; a damaged one is as good as absent."""
    try:
        with safe_open(path, "pt") as file:
            said = (file.metadata() or {}).get("sha256")
        return said == _digest(load(path))
    except (OSError, SafetensorError):
        return False


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(tensors))).hexdigest()
