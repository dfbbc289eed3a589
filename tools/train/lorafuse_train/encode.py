"""Filling the cache: only what is missing, one model after the other, each loaded only if it is needed."""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorafuse_common.errors import DatasetError, OutputError

from .cache import Cache, intact, load, store
from .console import only_errors, progress, say
from .data import Sample
from .pictures import open_picture, to_pixels
from .plan import Plan
from .recipes.recipe import Encoded, Recipe
from .weights import folder_sha256


@dataclass(frozen=True, slots=True)
class Encodings:
    """Read access to a filled cache."""

    cache: Cache

    def latents(self, sample: Sample) -> Tensor:
        """x0 (C, h, w) of a picture, fp32."""
        return load(self.cache.latents(sample.sha256, sample.size))["x0"]

    def caption(self, text: str) -> Encoded:
        """The embeddings of a caption or a validation prompt."""
        return load(self.cache.text(text))


def open_cache(plan: Plan) -> Cache:
    """The cache for this dataset and these encoders; hashes the encoders, which is slow only the first time."""
    base, recipe = plan.base, plan.recipe
    say("identifying VAE and text encoder")
    text = "".join(folder_sha256(base.pipeline / part, base.known_sha256) for part in recipe.text_parts)
    vae = folder_sha256(base.pipeline / "vae", base.known_sha256)
    return Cache(plan.config.cache, vae, text, f"{recipe.family} {recipe.version}")


def fill_cache(cache: Cache, plan: Plan, prompts: Iterable[str], device: torch.device) -> None:
    """Encode every picture and caption of the dataset, and every one of `prompts`, that the cache does not hold."""
    samples, recipe, pipeline = plan.samples, plan.recipe, plan.base.pipeline
    _make_writable(cache.root)
    pictures = {cache.latents(sample.sha256, sample.size): sample for sample in samples}
    texts = {cache.text(caption): caption for caption in (*(sample.caption for sample in samples), *prompts)}
    total = len(pictures) + len(texts)
    missing = {path for path in progress((*pictures, *texts), total, "reading the cache") if not intact(path)}
    say(f"cache: {total - len(missing)} of {total} entries are there ({cache.root})")
    _encode_pictures(recipe, pipeline, {p: s for p, s in pictures.items() if p in missing}, device)
    _encode_texts(recipe, pipeline, {p: t for p, t in texts.items() if p in missing}, device)


def _make_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{root}: cannot be created ({error.strerror}); choose another --cache_dir") from error
    if not os.access(root, os.W_OK):
        raise OutputError(f"{root}: may not be written; choose another --cache_dir")


def _encode_pictures(recipe: Recipe, pipeline: Path, missing: dict[Path, Sample], device: torch.device) -> None:
    if not missing:
        return
    say(f"loading the VAE to encode {len(missing)} pictures")
    vae = recipe.load_vae(pipeline, device)
    for path, sample in progress(missing.items(), len(missing), "encoding pictures"):
        raw = sample.path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != sample.sha256:
            raise DatasetError(f"{sample.path}: was changed while this training prepared; start it again")
        store(path, {"x0": recipe.encode_image(vae, to_pixels(open_picture(raw), sample.size))})
    del vae
    free(device)


def _encode_texts(recipe: Recipe, pipeline: Path, missing: dict[Path, str], device: torch.device) -> None:
    if not missing:
        return
    say(f"loading the text encoder to encode {len(missing)} texts")
    encoder = recipe.load_text_encoder(pipeline, device)
    cut = 0
    for path, text in progress(missing.items(), len(missing), "encoding texts"):
        with only_errors():
            encoded = recipe.encode_text(encoder, text)
        cut += recipe.is_cut(encoded)
        store(path, encoded)
    if cut:
        say(f"{cut} texts are so long that this family reads only their beginning, here as in its pipeline")
    del encoder
    free(device)


def free(device: torch.device) -> None:
    """Give back the memory of a model that was just dropped."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
