"""Complete random pipelines that edit pictures, small enough to train in a test, and pairs of pictures for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline, FluxKontextPipeline, QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from train import tiny, tiny_flux
from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lorafuse_train.recipes.qwen_image_edit import StillProcessor

PREFIX = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
AREA = 32 * 64
"""What takes the place of 1024 x 1024."""
KINDS = ("edit", "plus", "2511", "kontext")


def pipeline(kind: str = "edit") -> Any:
    """A random pipeline of 4x reduction; weights fixed by a seed."""
    if kind == "kontext":
        return FluxKontextPipeline(**_parts(tiny_flux.pipeline()))
    words = tiny.tokenizer(PREFIX, 64)
    made = tiny.pipeline(words=words, zero_cond_t=kind == "2511")
    made_by = QwenImageEditPipeline if kind == "edit" else QwenImageEditPlusPipeline
    return made_by(**_parts(made), processor=StillProcessor(Qwen2VLImageProcessorPil(), words))


def _parts(made: Any) -> dict[str, Any]:
    return {name: part for name, part in made.components.items() if part is not None}


def save_pipeline(folder: Path, kind: str = "edit") -> Path:
    """`pipeline(kind)` written to `folder` as published ones are."""
    tiny.save(pipeline(kind), folder)
    index = json.loads((folder / "model_index.json").read_text())
    if "processor" in index:
        index["processor"] = ["transformers", "Qwen2VLProcessor"]
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def load_pipeline(folder: Path) -> Any:
    """The pipeline of a folder as diffusers loads it."""
    with pytest.MonkeyPatch.context() as patch:
        without_videos(patch)
        return DiffusionPipeline.from_pretrained(folder)


def without_videos(patch: pytest.MonkeyPatch) -> None:
    """Let diffusers load the processor that a model_index.json names without torchvision, which is for videos only."""
    patch.setattr(Qwen2VLProcessor, "from_pretrained", StillProcessor.from_pretrained)


def save_lightning(path: Path) -> Path:
    """A random LoRA for the Qwen kinds."""
    return tiny.save_lightning(path)


def shrink_pipelines(patch: pytest.MonkeyPatch) -> None:
    """Let diffusers' pipelines scale control pictures to `AREA`, where they would to 1024 x 1024."""
    whole = pipeline_qwenimage_edit.calculate_dimensions
    patch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: whole(AREA, ratio))
    patch.setattr(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", AREA)
    scale = (AREA / 1024**2) ** 0.5
    known = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    small = [(int(w * scale) // 8 * 8, int(h * scale) // 8 * 8) for w, h in known]
    patch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", small)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth random colours, so that scaling matters."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save_pairs(folder: Path, targets: Sequence[tuple[int, int]], controls: Sequence[Sequence[tuple[int, int]]]) -> Path:
    """Pictures and their control pictures of the given (width, height), named by a `metadata.jsonl`."""
    for name in ("after", "before"):
        (folder / name).mkdir(parents=True)
    lines = []
    for number, (target, shown) in enumerate(zip(targets, controls, strict=True)):
        picture(number, *target).save(folder / "after" / f"{number}.png")
        names = []
        for index, size in enumerate(shown):
            names.append(f"before/{number}-{index}.png")
            picture(100 * (index + 1) + number, *size).save(folder / names[-1])
        row = {"image": f"after/{number}.png", "prompt": f"make it {('red', 'blue')[number % 2]}", "edit_image": names}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder
