"""Filling the cache: only what is missing, one model after the other, each loaded only if it is needed."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from lorafuse_common.errors import DatasetError, OutputError
from lorafuse_train.console import only_errors, progress, say
from lorafuse_train.dataset.data import Control, Prompt, Sample
from lorafuse_train.dataset.picture_faults import quiet_pillow
from lorafuse_train.dataset.pictures import open_picture, to_picture, to_pixels
from lorafuse_train.encoding.cache import Cache, intact, load, store
from lorafuse_train.encoding.claims import shared
from lorafuse_train.plan import Plan
from lorafuse_train.recipes.recipe import ControlPicture, Encoded, Recipe
from lorafuse_train.weights import folder_sha256


@dataclass(frozen=True, slots=True)
class Encodings:
    """Read access to a filled cache."""

    cache: Cache

    def latents(self, sample: Sample) -> Tensor:
        """x0 (C, h, w) of a picture, or (C, f, h, w) where the family draws videos, fp32."""
        return load(self.cache.latents(sample))["x0"]

    def condition(self, prompt: Prompt) -> Encoded:
        """All that the encoders say of a sample's or a validation prompt's caption and controls."""
        text = load(self.cache.text(prompt))
        return {**text, **load(self.cache.controls(prompt))} if prompt.controls else text

    def caption(self, text: str) -> Encoded:
        """The embeddings of a caption without controls."""
        return self.condition(Prompt(text))


def open_cache(plan: Plan) -> Cache:
    """The cache for this dataset and these encoders; hashes the encoders, which is slow only the first time."""
    base, recipe = plan.base, plan.recipe
    say("identifying VAE and text encoder")
    text = "".join(folder_sha256(base.pipeline / part, base.known_sha256) for part in recipe.text_parts)
    vae = folder_sha256(base.pipeline / "vae", base.known_sha256)
    return Cache(plan.config.cache, vae, text, f"{recipe.name} {recipe.version}", recipe.text_sees_controls)


@dataclass(frozen=True, slots=True)
class Needed:
    """The entries that a training reads, with what each is made of."""

    pictures: Mapping[Path, Sample]
    controls: Mapping[Path, Prompt]
    texts: Mapping[Path, Prompt]

    @property
    def paths(self) -> tuple[Path, ...]:
        """All of them."""
        return (*self.pictures, *self.controls, *self.texts)


def needed_entries(cache: Cache, plan: Plan, prompts: Iterable[Prompt]) -> Needed:
    """Those of the samples that are trained on or held out, and of other prompts."""
    samples = (*plan.samples, *plan.held_out)
    told = [*(sample.prompt for sample in samples), *prompts]
    return Needed(
        {cache.latents(sample): sample for sample in samples},
        {cache.controls(prompt): prompt for prompt in told if prompt.controls},
        {cache.text(prompt): prompt for prompt in told},
    )


class Filled(NamedTuple):
    """How the entries of a cache came to be there."""

    there: int
    """Before."""
    made: int
    """By this process."""
    others: int
    """By other processes at the same time."""


def fill_cache(cache: Cache, plan: Plan, prompts: Iterable[Prompt], device: torch.device) -> Filled:
    """Encode every picture, caption and control of the dataset and of `prompts` that the cache does not hold.

    Any number of processes may do so at once; each returns when all entries are there.

    Raises:
        OutputError: the cache cannot be written.
        DatasetError: a file was changed since it was checked.
    """
    recipe, pipeline = plan.recipe, plan.base.pipeline
    _make_writable(cache.root)
    needed = needed_entries(cache, plan, prompts)
    total = len(needed.paths)
    missing = {path for path in progress(needed.paths, total, "reading the cache") if not intact(path)}
    say(f"cache: {total - len(missing)} of {total} entries are there ({cache.root})")
    seen = {p: partial(encoded_picture, recipe, sample) for p, sample in needed.pictures.items() if p in missing}
    shown = {p: partial(encoded_controls, recipe, prompt) for p, prompt in needed.controls.items() if p in missing}
    told = {p: partial(encoded_text, recipe, prompt) for p, prompt in needed.texts.items() if p in missing}
    also = f" and {len(shown)} sets of control pictures" if shown else ""
    vae = _Model(f"the VAE to encode {len(seen)} pictures{also}", partial(recipe.load_vae, pipeline, device))
    made = _encode(cache, vae, seen, "pictures") + _encode(cache, vae, shown, "control pictures")
    del vae
    free(device)
    what = f"the text encoder to encode {len(told)} texts"
    encoder = _Model(what, partial(recipe.load_text_encoder, pipeline, device))
    cut: list[str] = []

    def note_cut(path: Path, text: Encoded) -> None:
        if recipe.is_cut(text):
            cut.append(needed.texts[path].caption)

    made += _encode(cache, encoder, told, "texts", note_cut)
    del encoder
    free(device)
    if cut:
        names = ", ".join(repr(f"{caption[:40]}...") for caption in cut[:3])
        say(
            f"{len(cut)} texts are so long that this family reads only their beginning, here as in its pipeline: "
            f"{names}{' and others' if len(cut) > 3 else ''}"
        )
    return Filled(total - len(missing), made, len(missing) - made)


class _Model:
    """A model that is loaded when it is first needed."""

    def __init__(self, what: str, load: Callable[[], Any]) -> None:
        self._what, self._load, self._model = what, load, None

    def __call__(self) -> Any:
        if self._model is None:
            say(f"loading {self._what}")
            self._model = self._load()
        return self._model


def _encode(
    cache: Cache,
    model: _Model,
    missing: Mapping[Path, Callable[[Any], Encoded]],
    what: str,
    look: Callable[[Path, Encoded], object] = lambda path, encoded: None,
) -> int:
    """Make those of the missing entries that no other process makes; how many they were."""
    made = 0
    for path, encode in progress(shared(cache.root, missing, intact, what), len(missing), f"encoding {what}"):
        with quiet_pillow():
            encoded = encode(model())
        look(path, encoded)
        try:
            store(path, encoded)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"{path}: cannot be written ({error}); what was written before is complete") from error
        made += 1
    return made


def encoded_picture(recipe: Recipe, sample: Sample, vae: Any) -> Encoded:
    """`x0` of a sample."""
    pixels = _pixels(sample)
    # A family that draws videos takes a picture for one of a single frame.
    return {"x0": recipe.encode_image(vae, pixels if recipe.frame_step else pixels[:, 0])}


def encoded_controls(recipe: Recipe, prompt: Prompt, vae: Any) -> Encoded:
    """What the VAE says of a prompt's control pictures."""
    return recipe.encode_controls(vae, control_pictures(prompt), prompt.shape)


def encoded_text(recipe: Recipe, prompt: Prompt, encoder: Any) -> Encoded:
    """What the text encoder says of a caption, and of its controls where it sees them."""
    seen = control_pictures(prompt) if recipe.text_sees_controls else ()
    with only_errors():
        return recipe.encode_text(encoder, prompt.caption, seen)


def _make_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{root}: cannot be created ({error.strerror}); choose another --cache_dir") from error
    if not os.access(root, os.W_OK):
        raise OutputError(f"{root}: may not be written; choose another --cache_dir")


def _pixels(sample: Sample) -> Tensor:
    """(3, F, H, W) in -1..1, fp32."""
    if sample.excerpt is None:
        return to_pixels(open_picture(_unchanged(sample.path, sample.sha256)), sample.size)[:, None]
    return _video(sample.path, sample.sha256, sample.size, *sample.excerpt)


def control_pictures(prompt: Prompt) -> tuple[ControlPicture, ...]:
    """The control pictures of a prompt, decoded.

    Raises:
        DatasetError: one is not what it was when the dataset was checked.
    """
    return tuple(ControlPicture(_picture(control), control.size) for control in prompt.controls)


def _picture(control: Control) -> Image.Image:
    if control.is_video:
        return to_picture(_video(control.path, control.sha256, control.size, 1, None)[:, 0])
    return open_picture(_unchanged(control.path, control.sha256))


def _unchanged(path: Path, sha256: str) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read any more ({error.strerror})") from error
    if hashlib.sha256(raw).hexdigest() != sha256:
        raise DatasetError(f"{path}: was changed while this training prepared; start it again")
    return raw


def _video(path: Path, sha256: str, size: tuple[int, int], frames: int, rate: float | None) -> Tensor:
    from lorafuse_train.dataset.video import video_pixels, video_sha256  # only videos need its libraries

    if video_sha256(path) != sha256:
        raise DatasetError(f"{path}: was changed while this training prepared; start it again")
    return video_pixels(path, frames, rate, size)


def free(device: torch.device) -> None:
    """Give back the memory of a model that was just dropped."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
