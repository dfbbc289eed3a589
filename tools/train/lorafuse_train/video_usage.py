"""Lines of Python for pipelines that draw videos, and for those that take no noise levels."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from lorafuse_common.checkpoint import read_json
from lorafuse_train.samples.drawn_prompts import choose_shape
from lorafuse_train.samples.film import USUAL_RATE

if TYPE_CHECKING:
    from lorafuse_train.plan import Plan


def pipeline_class(plan: Plan) -> str:
    """The name of what loads the pipeline.

    Its own class where it is given a transformer, for `DiffusionPipeline` takes no notice of one that is optional, as
    Wan's are; and for TI2V-5B, whose folder names the class for text, the one that takes the first frame it was told.
    """
    base = plan.base
    if plan.recipe.frame_step and not plan.recipe.controls[0] and _is_told(plan):
        return "WanImageToVideoPipeline"
    return "DiffusionPipeline" if base.pipeline == base.folder else _class_name(base.pipeline)


def _is_told(plan: Plan) -> bool:
    return any(sample.controls for sample in plan.samples)


def _class_name(pipeline: Path) -> str:
    return str((read_json(pipeline / "model_index.json") or {}).get("_class_name"))


def takes_sigmas(pipeline: Path) -> bool:
    """Whether a call of the pipeline may name the noise levels; Wan's pipelines ask their scheduler only."""
    import diffusers

    cls = getattr(diffusers, _class_name(pipeline), None)
    return cls is None or "sigmas" in inspect.signature(cls.__call__).parameters


def fixed_sigmas(sigmas: str) -> list[str]:
    """A scheduler that visits these noise levels whatever it is asked for; `sigmas` is the argument as text."""
    return [
        "set_timesteps = pipe.scheduler.set_timesteps  # this pipeline's call takes no sigmas",
        f"pipe.scheduler.set_timesteps = lambda *_, device=None: set_timesteps({sigmas}, device=device)",
    ]


def video_lines(call: str, plan: Plan) -> list[str]:
    """The call, with what a video needs, and where its frames go."""
    rate = plan.config.frame_rate or USUAL_RATE
    call += f', num_frames={choose_shape(plan.samples)[0]}, output_type="pil"'
    lines = []
    if _is_told(plan):
        lines = ["from diffusers.utils import load_image", 'first = load_image("first_frame.png")']
        call += ", image=first"
    return [
        *lines,
        f"frames = pipe({call}).frames[0]",
        f'frames[0].save("video.webp", save_all=True, append_images=frames[1:], duration={round(1000 / rate)})',
    ]
