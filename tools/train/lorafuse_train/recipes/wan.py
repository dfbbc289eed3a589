"""Wan 2.1 and 2.2: videos from text, and from a first frame that is told in three ways."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from lorafuse_common.errors import CheckpointError
from lorafuse_train.base import absent_parts
from lorafuse_train.weights import stored_dtype

from .recipe import Condition, ControlPicture, Encoded, Guidance, Latent, Shape, Size
from .wan_latents import PATCH, WanLatents, encode_first, first_frame_mask

LONGEST_PROMPT = 512
"""Tokens that the pipelines keep by default, and pad to."""
FIRST, IMAGE = "first", "image_embeds"
"""Of a condition: latents of the first frame, and what CLIP says of it."""


class Wan(WanLatents):
    """The recipe of Wan 2.1 and 2.2, text to video; TI2V-5B also from a first frame, where the dataset has one.

    How a model is told the first frame shows in its config.json: 16 more channels for its latents and 4 for a mask
    (2.1 and 2.2 A14B), for 2.1 CLIP's embeddings as well; or not at all (2.2 TI2V-5B), whose first latent frame is then
    given in place of a noisy one, at noise level 0.
    """

    family = name = "wan"
    pipelines: tuple[str, ...] = ("WanPipeline",)
    version = 1
    text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")
    optional_parts: tuple[str, ...] = ()
    controls = (0, 1)
    first_frame_control = False
    text_sees_controls = False

    def control_size(self, pipeline: Path, picture: Size, target: Size, max_pixels: int) -> Size:
        """The video's own.

        Raises:
            CheckpointError: the model cannot be told a first frame.
        """
        if not expands_timesteps(pipeline):
            raise CheckpointError(
                f"{pipeline}: is for text to video, and the dataset has control pictures; train an image-to-video "
                "model (WanImageToVideoPipeline, or Wan 2.2 TI2V-5B) or leave their column out of --data_file_keys"
            )
        return target

    def encode_controls(self, vae: Any, controls: Sequence[ControlPicture], shape: Shape) -> Encoded:
        """`first`: latents (C, 1, h, w) of TI2V-5B's first frame."""
        return {FIRST: encode_first(vae, controls[0], 1)} if controls else {}

    def load_text_encoder(self, pipeline: Path, device: torch.device) -> Any:
        """The family's pipeline with nothing but tokenizer and text encoder, so that it cleans and cuts as it does."""
        return WanPipeline(**_text_parts(pipeline, device), vae=None, scheduler=None)

    @torch.no_grad()
    def encode_text(self, encoder: Any, caption: str, controls: Sequence[ControlPicture] = ()) -> Encoded:
        """`embeds` (L, D) of the caption's own tokens, in the encoder's precision."""
        masks: list[Tensor] = []
        hook = encoder.text_encoder.register_forward_pre_hook(lambda _, arguments: masks.append(arguments[1]))
        embeds, _ = encoder.encode_prompt(
            caption,
            do_classifier_free_guidance=False,
            max_sequence_length=LONGEST_PROMPT,
            device=encoder.text_encoder.device,
        )
        hook.remove()
        return {"embeds": embeds[0, : int(masks[0].sum())].cpu()}

    def is_cut(self, encoded: Encoded) -> bool:
        """Tokens at the limit."""
        return len(encoded["embeds"]) >= LONGEST_PROMPT

    def collate(self, captions: Sequence[Encoded]) -> Condition:
        """`embeds` (B, 512, D): zeros after the caption, which no Wan masks, and what there is of a first frame."""
        embeds = [
            nn.functional.pad(caption["embeds"], (0, 0, 0, LONGEST_PROMPT - len(caption["embeds"])))
            for caption in captions
        ]
        more = [name for name in (FIRST, IMAGE) if name in captions[0]]
        return {
            "embeds": torch.stack(embeds),
            **{name: torch.stack([caption[name] for caption in captions]) for name in more},
        }

    def predict(self, transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The model's timestep is 1000 sigma in fp32, and its output is `eps - x0` already.

        Where TI2V-5B is given the first latent frame c, that of v is (x - c) / sigma: whatever x is, Euler steps
        end at c with it; and as c is x0 there, training has no error in it.
        """
        stored = transformer.patch_embedding.weight  # not `transformer.dtype`, which a fp32 LoRA changes
        to = {"device": stored.device, "dtype": stored.dtype}
        x, sigma = x.to(stored.device), sigma.to(stored.device)
        first, image, given = condition.get(FIRST), condition.get(IMAGE), None
        seen, timestep = x, 1000 * sigma
        if first is not None:
            first = first.to(x)
            if transformer.config.in_channels > x.shape[1]:
                seen = torch.cat([x, first_frame_mask(first), first], 1)
            else:
                given = first[:, :, :1]
                seen, timestep = torch.cat([given, x[:, :, 1:]], 2), _timestep_of_tokens(timestep, x)
        predicted: Tensor = transformer(
            hidden_states=seen.to(stored.dtype),
            timestep=timestep,
            encoder_hidden_states=condition["embeds"].to(**to),
            encoder_hidden_states_image=None if image is None else image.to(**to),
            return_dict=False,
        )[0].float()
        if given is None:
            return predicted
        return torch.cat([(x[:, :, :1] - given) / sigma.view(-1, 1, 1, 1, 1), predicted[:, :, 1:]], 2)

    def guidance(self, pipeline: Path, config: Mapping[str, Any]) -> Guidance:
        """By two predictions."""
        return Guidance.CFG

    def default_guidance(self, pipeline: Path, config: Mapping[str, Any]) -> float:
        """What the model cards draw with: 4 for A14B, 5 for the others."""
        return 4.0 if DiffusionPipeline.load_config(pipeline).get("boundary_ratio") is not None else 5.0

    def guidance_arguments(self, scale: float) -> str:
        """The negative prompt is empty where none is given, which a blank is to the pipelines too; 1 is their off."""
        return f"guidance_scale={scale:g}"

    def sigmas(self, pipeline: Path, steps: int, latent: Latent) -> tuple[float, ...]:
        """The scheduler's own; for `UniPCMultistepScheduler` the levels at which its steps of higher order begin."""
        scheduler = load_scheduler(pipeline)
        scheduler.set_timesteps(steps)
        return tuple(float(sigma) for sigma in scheduler.sigmas[:-1])

    def shift(self, pipeline: Path, latent: Latent) -> float:
        """The scheduler's, the same for all sizes; by convention 3 for 480p and 5 for 720p."""
        config = load_scheduler(pipeline).config
        return float(config.get("flow_shift", config.get("shift", 1.0)))


class WanImage(Wan):
    """The recipe of Wan 2.1 and 2.2, image to video."""

    name = "wan_i2v"
    pipelines = ("WanImageToVideoPipeline",)
    text_parts = ("text_encoder", "tokenizer", "image_encoder", "image_processor")
    optional_parts = ("image_encoder", "image_processor")
    """Only 2.1 has them."""
    controls = (1, 1)
    first_frame_control = True
    text_sees_controls = True

    def control_size(self, pipeline: Path, picture: Size, target: Size, max_pixels: int) -> Size:
        """The video's own.

        Raises:
            CheckpointError: the model is to be told a last frame, too.
        """
        if WanTransformer3DModel.load_config(pipeline / "transformer").get("pos_embed_seq_len") is not None:
            raise CheckpointError(
                f"{pipeline}: draws what lies between a first and a last frame, which is not trained here; expected an "
                "image-to-video model"
            )
        return target

    def encode_controls(self, vae: Any, controls: Sequence[ControlPicture], shape: Shape) -> Encoded:
        """`first`: latents (C, f, h, w) of the first frame and then nothing; TI2V-5B reads the first of them only."""
        return {FIRST: encode_first(vae, controls[0], shape[0])}

    def load_text_encoder(self, pipeline: Path, device: torch.device) -> Any:
        """The family's pipeline with what reads the caption and, in 2.1, what looks at the first frame."""
        from transformers import CLIPImageProcessor, CLIPVisionModel

        eyes: dict[str, Any] = {}
        if not absent_parts(pipeline, self):
            clip = CLIPVisionModel.from_pretrained(
                pipeline / "image_encoder", dtype=stored_dtype(pipeline / "image_encoder")
            )
            eyes["image_encoder"] = clip.to(device).eval()
            eyes["image_processor"] = CLIPImageProcessor.from_pretrained(pipeline / "image_processor")
        return WanImageToVideoPipeline(**_text_parts(pipeline, device), **eyes, vae=None, scheduler=None)

    @torch.no_grad()
    def encode_text(self, encoder: Any, caption: str, controls: Sequence[ControlPicture] = ()) -> Encoded:
        """`embeds` (L, D), and in 2.1 CLIP's `image_embeds` (257, 1280) of the first frame, in its own size."""
        found = super().encode_text(encoder, caption)
        if encoder.image_encoder is None or not controls:
            return found
        seen = encoder.encode_image(controls[0].picture, encoder.image_encoder.device)
        return {**found, IMAGE: seen[0].cpu()}


def expands_timesteps(pipeline: Path) -> bool:
    """Whether the pipeline gives its first frame at noise level 0, as TI2V-5B's does."""
    return bool(DiffusionPipeline.load_config(pipeline).get("expand_timesteps", False))


def load_scheduler(pipeline: Path) -> Any:
    """The scheduler of the pipeline, of whichever class it is.

    Raises:
        CheckpointError: it does not walk along the straight line between noise and video.
    """
    folder = pipeline / "scheduler"
    name = str(json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8")).get("_class_name"))
    cls = getattr(diffusers, name, None)
    config = cls.load_config(folder) if cls else {}
    is_flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
    if cls is None or not is_flow or config.get("use_dynamic_shifting", False):
        raise CheckpointError(
            f"{folder}: is a {name} without flow matching, or one that shifts by size; expected "
            "UniPCMultistepScheduler with use_flow_sigmas, or FlowMatchEulerDiscreteScheduler"
        )
    return cls.from_pretrained(folder)


def _text_parts(pipeline: Path, device: torch.device) -> dict[str, Any]:
    from transformers import AutoTokenizer, UMT5EncoderModel

    folder = pipeline / "text_encoder"
    encoder = UMT5EncoderModel.from_pretrained(folder, dtype=stored_dtype(folder))
    return {
        "text_encoder": encoder.to(device).eval(),
        "tokenizer": AutoTokenizer.from_pretrained(pipeline / "tokenizer"),
    }


def _timestep_of_tokens(timestep: Tensor, x: Tensor) -> Tensor:
    """(B, tokens) for timesteps (B,): 0 in the first latent frame of x (B, C, f, h, w)."""
    frames, height, width = x.shape[2], x.shape[3] // PATCH, x.shape[4] // PATCH
    tokens = timestep[:, None, None].repeat(1, frames, height * width)
    tokens[:, 0] = 0
    return tokens.flatten(1)
