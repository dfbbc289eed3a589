"""The frozen base: which folder, which family, what was fused into it, and its weights when their time has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorafuse_common.checkpoint import DEFAULT_COMPONENT, Form, open_checkpoint, read_json
from lorafuse_common.errors import CheckpointError, ConfigError, ManifestError
from lorafuse_common.families import FAMILIES, family_of_class
from lorafuse_common.hashing import sha256_of
from lorafuse_common.manifest import (
    MANIFEST_NAME,
    FileRecord,
    FusedLora,
    Manifest,
    Parent,
    Role,
    read_manifest,
    verify_manifest,
    weights_sha256,
)
from lorafuse_common.naming import Family
from lorafuse_common.tensorfile import TensorFile
from lorafuse_train.experts import Expert, find_expert
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.weights import stored_dtype

if TYPE_CHECKING:
    from lorafuse_train.recipes.recipe import Recipe

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
PARTS = ("vae", "scheduler")
"""Folders of the pipeline that every recipe needs, besides its `text_parts`."""


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint to train on, checked but not loaded."""

    folder: Path
    """As the user gave it."""
    transformer: Path
    """The folder with the transformer's config.json and weights."""
    pipeline: Path
    """The pipeline folder with VAE, text encoder, tokenizer and scheduler."""
    family: Family
    config: Mapping[str, Any]
    """The transformer's config.json."""
    dtype: torch.dtype
    """Of the weights once loaded."""
    manifest: Manifest | None
    fused_sha256: str
    """Identity of the transformer's weights; goes into the LoRA."""
    component: str = DEFAULT_COMPONENT
    """The transformer's name in the pipeline."""
    expert: Expert | None = None
    """Which of two experts it is; None where the pipeline has one transformer."""

    @property
    def is_scaffold(self) -> bool:
        """Whether what was fused is there for the training only, and the new LoRA is for the original base."""
        return self.manifest is not None and self.manifest.role is Role.SCAFFOLD

    @property
    def known_sha256(self) -> Mapping[Path, str]:
        """Hashes that the manifest already holds, by file."""
        return {self.folder / record.path: record.sha256 for record in self.manifest.outputs} if self.manifest else {}


def open_base(config: TrainConfig) -> Base:
    """Check `--fused_model` against its manifest and find the folders that belong to it.

    Raises:
        CheckpointError: it, or its pipeline, is not what a training needs.
        ManifestError: no manifest, a broken one, or files that differ from it.
        ConfigError: `--lora_fused` names a LoRA that was not fused.
    """
    folder = config.fused_model
    manifest = _manifest(config)
    component = config.component or (manifest.component if manifest else None)
    is_pipeline = (folder / "model_index.json").is_file()
    checkpoint = open_checkpoint(folder, component if is_pipeline else None)
    if checkpoint.form is Form.FILE:
        raise CheckpointError(
            f"{folder}: is a single file; training needs the model's config.json, so fuse a folder "
            "(`lorafuse fuse MODEL_FOLDER --lora FILE --out DIR`) and give that"
        )
    _check_fused(config, manifest)
    transformer = folder / checkpoint.component if checkpoint.component else folder
    model_config = read_json(transformer / "config.json")
    if model_config is None or "_class_name" not in model_config:
        raise CheckpointError(f"{transformer}: no config.json with a _class_name; expected a diffusers model folder")
    dtype = DTYPES.get(config.base_dtype) or trainable_dtype(stored_dtype(transformer))
    records = manifest.outputs if manifest else _hash_weights(checkpoint.files)
    pipeline = _pipeline(config, checkpoint.form)
    return Base(
        folder,
        transformer,
        pipeline,
        _family(folder, manifest, str(model_config["_class_name"])),
        model_config,
        dtype,
        manifest,
        weights_sha256(records, component if manifest and is_pipeline else None),
        component or DEFAULT_COMPONENT,
        find_expert(pipeline, component or DEFAULT_COMPONENT),
    )


def trainable_dtype(stored: torch.dtype) -> torch.dtype:
    """What weights so stored are trained in: gradients of a mean over a picture are too small for fp16's range."""
    return torch.bfloat16 if stored is torch.float16 else stored


def _hash_weights(files: tuple[TensorFile, ...]) -> tuple[FileRecord, ...]:
    return tuple(FileRecord(file.path.name, sha256_of(file.path), file.size) for file in files)


def _manifest(config: TrainConfig) -> Manifest | None:
    folder = config.fused_model
    manifest = read_manifest(folder) if folder.is_dir() else None
    if manifest is None and not config.allow_unfused_base and folder.is_dir():
        raise ManifestError(
            f"{folder}: has no {MANIFEST_NAME}, so nothing was fused here. Fuse first: "
            f"`lorafuse fuse {folder} --lora FILE --out DIR` and --fused_model DIR; "
            "or give --allow_unfused_base to train on it as it is."
        )
    if manifest is not None:
        verify_manifest(folder, manifest, hashes=config.verify)
    return manifest


def _check_fused(config: TrainConfig, manifest: Manifest | None) -> None:
    """`--lora_fused` does not fuse; it makes sure that it was done."""
    fused = fused_loras(manifest) if manifest else ()
    faults = []
    for path in config.lora_fused:
        if not path.is_file():
            faults.append(f"{path}: no such file")
        elif sha256_of(path) not in {lora.sha256 for lora in fused}:
            names = ", ".join(lora.name for lora in fused) or "nothing"
            faults.append(
                f"{path}: is not fused into {config.fused_model} (fused: {names}). "
                f"Run `lorafuse fuse BASE --lora {path} --out DIR` and train with --fused_model DIR"
            )
    if faults:
        raise ConfigError("--lora_fused:\n" + "\n".join(f"  {fault}" for fault in faults))


def fused_loras(manifest: Manifest) -> tuple[FusedLora, ...]:
    """Every LoRA in a checkpoint: the ones fused last, then those its base already held."""
    found: tuple[FusedLora, ...] = manifest.loras
    parent: Parent | None = manifest.parent
    while parent is not None:
        found, parent = (*found, *parent.loras), parent.parent
    return found


def _family(folder: Path, manifest: Manifest | None, class_name: str) -> Family:
    named = manifest.family if manifest else None
    family = next((family for family in FAMILIES if family.name == named), None) or family_of_class(class_name)
    if family is None or class_name not in family.transformer_classes:
        known = ", ".join(family.title for family in FAMILIES)
        raise CheckpointError(f"{folder}: its transformer is a {class_name}, of none of the known families: {known}")
    return family


def _pipeline(config: TrainConfig, form: Form) -> Path:
    pipeline = config.pretrained_model_name_or_path
    if form is Form.PIPELINE:
        if pipeline is not None:
            raise ConfigError(
                f"--pretrained_model_name_or_path {pipeline}: {config.fused_model} is a whole pipeline; leave it out"
            )
        return config.fused_model
    if pipeline is None:
        raise CheckpointError(
            f"{config.fused_model}: is a bare transformer; give --pretrained_model_name_or_path PIPELINE_FOLDER, "
            "from which VAE and text encoder are taken"
        )
    if read_json(pipeline / "model_index.json") is None:
        raise CheckpointError(f"--pretrained_model_name_or_path {pipeline}: no model_index.json; not a pipeline folder")
    return pipeline


def check_parts(base: Base, recipe: Recipe, original: Path | None) -> None:
    """Make sure, before hours of work, that every folder needed later is there.

    Raises:
        CheckpointError: listing every missing folder, and an `original` of another architecture.
    """
    absent = absent_parts(base.pipeline, recipe)
    faults = [
        f"{base.pipeline}: no folder {part!r}, which this family needs"
        for part in (*PARTS, *recipe.text_parts)
        if part not in absent and not (base.pipeline / part).is_dir()
    ]
    if original is not None:
        found = (read_json(original_transformer(original, base.component) / "config.json") or {}).get("_class_name")
        if found != base.config["_class_name"]:
            faults.append(f"--original_model {original}: has a {found}, expected a {base.config['_class_name']}")
    if faults:
        raise CheckpointError("\n".join(faults))


def absent_parts(pipeline: Path, recipe: Recipe) -> tuple[str, ...]:
    """The optional parts that the pipeline is without; diffusers loads it only if told None for each."""
    index = read_json(pipeline / "model_index.json") or {}
    return tuple(part for part in recipe.optional_parts if index.get(part, [None, None]) == [None, None])


def original_transformer(folder: Path, component: str = DEFAULT_COMPONENT) -> Path:
    """The transformer's folder of `--original_model`, which may be a pipeline or the transformer itself."""
    return folder / component if (folder / "model_index.json").is_file() else folder


def load_transformer(base: Base, folder: Path, device: torch.device) -> Any:
    """The frozen transformer of `folder`, in the base's precision, on `device`."""
    import diffusers

    transformer = getattr(diffusers, base.config["_class_name"]).from_pretrained(folder, dtype=base.dtype)
    return transformer.requires_grad_(False).to(device)
