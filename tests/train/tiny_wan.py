"""Complete random Wan pipelines small enough to train in a test, made offline, and videos to train them on."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image, ImageDraw
from train import tiny, tiny_text
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, UMT5EncoderModel

UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
"""The real one, for 480p."""
KINDS: dict[str, dict[str, Any]] = {
    "t2v": {},
    "t2v a14b": {"boundary": 0.875},
    "i2v 2.1": {"image": True, "clip": True},
    "i2v a14b": {"image": True, "boundary": 0.9},
    "ti2v 5b": {"expand": True},
    "ti2v 5b i2v": {"image": True, "expand": True},
}
CHANNELS = {False: 4, True: 6}


def vae(*, patched: bool = False) -> Any:
    """4x reduction in space and time: of 2.1, or 8x in space with the patches and shortcuts of 2.2's."""
    channels = CHANNELS[patched]
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0, 0.4, 0.1][:channels],
        latents_std=[1.5, 0.5, 2.0, 1.0, 0.8, 1.2][:channels],
        is_residual=patched,
        in_channels=12 if patched else 3,
        out_channels=12 if patched else 3,
        patch_size=2 if patched else None,
        scale_factor_temporal=4,
        scale_factor_spatial=8 if patched else 4,
    ).eval()


def transformer(channels: int, *, told: bool = False, clip: bool = False) -> Any:
    """2 blocks of 2 heads; `told` the first frame by more channels, or also by CLIP."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2 * channels + 4 if told else channels,
        out_channels=channels,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        image_dim=16 if clip else None,
        added_kv_proj_dim=24 if clip else None,
    ).eval()


def eyes() -> dict[str, Any]:
    """A CLIP of 3 layers, so that its last but one is neither first nor last."""
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": CLIPImageProcessor(**sizes)}


def pipeline(
    *,
    image: bool = False,
    clip: bool = False,
    boundary: float | None = None,
    expand: bool = False,
    unipc: bool = False,
) -> Any:
    """A random pipeline whose sides are multiples of 16 pixels; weights fixed by a seed."""
    told = image and not expand
    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = tiny_text.t5_tokenizer()
        parts = {
            "tokenizer": words,
            "text_encoder": tiny_text.t5(words, 16, UMT5EncoderModel),
            "vae": vae(patched=expand),
            "scheduler": UniPCMultistepScheduler(**UNIPC) if unipc else FlowMatchEulerDiscreteScheduler(shift=3.0),
            "transformer": transformer(CHANNELS[expand], told=told, clip=clip),
            "transformer_2": transformer(CHANNELS[expand], told=told) if boundary else None,
            "boundary_ratio": boundary,
            "expand_timesteps": expand,
        }
        cls = WanImageToVideoPipeline if image else WanPipeline
        return cls(**parts, **(eyes() if clip else {}))


def save_pipeline(folder: Path, **options: Any) -> Path:
    """`pipeline(**options)` written to `folder`."""
    return tiny.save(pipeline(**options), folder)


def save_lightning(path: Path) -> Path:
    """A random LoRA for `pipeline`."""
    return tiny.save_lora(
        path, [f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn1.to_q", "attn2.to_v")], width=24
    )


def frames(count: int, size: tuple[int, int] = (32, 32), number: int = 0) -> list[Image.Image]:
    """A disc that moves to the right over pictures of a (width, height)."""
    pictures = []
    for index in range(count):
        picture = Image.new("RGB", size, "navy")
        x = 2 + index * (size[0] - 16) // max(count - 1, 1)
        ImageDraw.Draw(picture).ellipse((x, 6, x + 12, 18), fill=("red", "blue", "green")[number % 3])
        pictures.append(picture)
    return pictures


def save_video(path: Path, pictures: Sequence[Image.Image], rate: int = 16, codec: str = "libx264") -> Path:
    """The pictures as a video file, close to lossless."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuv444p" if codec == "libx264" else "yuv420p"
        stream.options = {"crf": "1"} if codec == "libx264" else {}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
        container.mux(stream.encode())
    return path


def save_folder(folder: Path, pictures: Sequence[Image.Image]) -> Path:
    """The pictures as a folder, numbered without leading zeros."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"frame_{number}.png")
    return folder


def save_dataset(folder: Path, lengths: Sequence[int] = (9, 9, 5, 9), size: tuple[int, int] = (32, 32)) -> Path:
    """Videos of so many frames, the second a folder of frames, with a `metadata.csv`."""
    folder.mkdir(parents=True)
    rows = []
    for number, length in enumerate(lengths):
        pictures = frames(length, size, number)
        if number == 1:
            path = save_folder(folder / "second", pictures)
        else:
            path = save_video(folder / f"{number}.mp4", pictures)
        rows.append((path.name, "a red circle" if number % 2 else "ink sketch of a blue circle on a navy background"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("video", "prompt"), *rows])
    return folder
