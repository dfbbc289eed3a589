"""The few-step LoRAs and models that are known by name, and how each is sampled.

A name is recognised, never guessed: what is found is said with the place it was found in, and `--schedule` overrides
it. Patterns are for names in lower case with single hyphens: `Qwen_Image.Lightning` is `qwen-image-lightning`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from .sigmas import SCHEDULER, TOKENS, depends_on_size, dynamic_sigmas, klein_mu, scheduler_sigmas


class Kind(StrEnum):
    """What a recognised file is."""

    FEW_STEP_LORA = "few-step LoRA"
    FEW_STEP_BASE = "few-step model"
    DEDISTILL = "de-distill adapter"


def _static(shift: float) -> dict[str, object]:
    return {"_class_name": SCHEDULER, "shift": shift, "use_dynamic_shifting": False}


QWEN_LIGHTNING: Mapping[str, object] = {
    "_class_name": SCHEDULER,
    "base_image_seq_len": 256,
    "base_shift": math.log(3),
    "max_image_seq_len": 8192,
    "max_shift": math.log(3),
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
"""exp(log 3) is a shift of 3 at every size (Qwen-Image-Lightning, `generate_with_diffusers.py`)."""
FLUX_DEV: Mapping[str, object] = {
    "_class_name": SCHEDULER,
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
"""FLUX.1-dev's own, which its few-step LoRAs keep."""
FLUX2: Mapping[str, object] = {"_class_name": SCHEDULER, "shift": 3.0, "use_dynamic_shifting": True}


@dataclass(frozen=True, slots=True)
class FewStep:
    """One published LoRA or model, or several of one name."""

    title: str
    kind: Kind
    family: str
    pattern: str
    """Searched for in a normal name; its group `steps` says how many, where that differs."""
    source: str
    """Where its schedule is written down."""
    steps: int = 0
    """0 where the name says it."""
    scheduler: Mapping[str, object] = field(default_factory=dict)
    guidance_scale: float = 1.0
    """Of classifier-free guidance, or embedded where the model has an embedder for it."""
    strength: float = 1.0
    """What its makers fuse it at."""

    def sigmas(self, steps: int) -> tuple[float, ...]:
        """The noise levels, at 1024x1024 where they depend on the size."""
        if self.family == "flux2":
            return dynamic_sigmas(math.exp(klein_mu(TOKENS, steps)), steps)
        return scheduler_sigmas(self.scheduler, steps, asks=self.family != "sd3")

    @property
    def depends_on_size(self) -> bool:
        """Whether pictures of another size want other noise levels."""
        return self.family == "flux2" or depends_on_size(self.scheduler)


LIGHTNING = "github.com/ModelTC/Qwen-Image-Lightning, README and generate_with_diffusers.py"
HYPER = "huggingface.co/ByteDance/Hyper-SD"

KNOWN: tuple[FewStep, ...] = (
    FewStep(
        "Qwen-Image-Edit-Lightning", Kind.FEW_STEP_LORA, "qwen_image",
        r"qwen-image-edit(-\d{4})?(-[a-z0-9]+)*?-lightning-(?P<steps>[48])-?steps?\b", LIGHTNING,
        scheduler=QWEN_LIGHTNING,
    ),
    FewStep(
        "Qwen-Image-Lightning", Kind.FEW_STEP_LORA, "qwen_image",
        r"qwen-image(?!-edit)(-[a-z0-9]+)*?-lightning-(?P<steps>[48])-?steps?\b", LIGHTNING,
        scheduler=QWEN_LIGHTNING,
    ),
    FewStep(
        "Wan2.2-Lightning", Kind.FEW_STEP_LORA, "wan",
        r"wan-?2-?2\b[a-z0-9/-]*(lightning|lightx2v|4-?steps?-lora)",
        "github.com/ModelTC/Wan2.2-Lightning, wan/configs and wan/utils/fm_solvers_euler.py",
        steps=4, scheduler=_static(5.0),
    ),
    FewStep(
        "lightx2v's step-distilled Wan 2.1", Kind.FEW_STEP_LORA, "wan",
        r"lightx2v[a-z0-9/-]*step-?distill|step-?distill[a-z0-9/-]*lightx2v",
        "lightx2v-en.readthedocs.io, method_tutorials/step_distill: steps 1000, 750, 500, 250 and shift 5",
        steps=4, scheduler=_static(5.0),
    ),
    FewStep(
        "Hyper-FLUX.1-dev", Kind.FEW_STEP_LORA, "flux",
        r"hyper-flux-?1-?dev-(?P<steps>8|16)-?steps?\b", HYPER,
        scheduler=FLUX_DEV, guidance_scale=3.5, strength=0.125,
    ),
    FewStep(
        "FLUX.1-Turbo-Alpha", Kind.FEW_STEP_LORA, "flux",
        r"flux-?1-(dev-)?turbo-alpha", "huggingface.co/alimama-creative/FLUX.1-Turbo-Alpha",
        steps=8, scheduler=FLUX_DEV, guidance_scale=3.5,
    ),
    FewStep(
        "FLUX.1-schnell", Kind.FEW_STEP_BASE, "flux",
        r"flux-?1-schnell", "huggingface.co/black-forest-labs/FLUX.1-schnell",
        steps=4, scheduler=_static(1.0),
    ),
    FewStep(
        "FLUX.2 klein, distilled", Kind.FEW_STEP_BASE, "flux2",
        r"flux-?2-klein-(4|9)b|is-distilled", "huggingface.co/black-forest-labs/FLUX.2-klein-4B",
        steps=4, scheduler=FLUX2,
    ),
    FewStep(
        "Z-Image-Turbo", Kind.FEW_STEP_BASE, "z_image",
        r"z-?image-turbo", "huggingface.co/Tongyi-MAI/Z-Image-Turbo",
        steps=8, scheduler=_static(3.0),
    ),
    FewStep(
        "Stable Diffusion 3.5 Large Turbo", Kind.FEW_STEP_BASE, "sd3",
        r"(stable-diffusion-|sd)3-5-large-turbo", "huggingface.co/stabilityai/stable-diffusion-3.5-large-turbo",
        steps=4, scheduler=_static(3.0),
    ),
    FewStep(
        "ostris' training adapter for Z-Image-Turbo", Kind.DEDISTILL, "z_image",
        r"z-?image-turbo-training-adapter", "huggingface.co/ostris/zimage_turbo_training_adapter",
    ),
    FewStep(
        "ostris' training adapter for FLUX.1-schnell", Kind.DEDISTILL, "flux",
        r"flux-?1-schnell-training-adapter", "huggingface.co/ostris/FLUX.1-schnell-training-adapter",
    ),
)  # fmt: skip

LOOKS_FEW_STEP = (
    r"\b(lightning|hyper|turbo|lcm|dmd\d?|causvid|accvid|fastwan|schnell|(step-?)?distill\w*|\d+-?steps?)\b"
)
"""Words in the names of few-step LoRAs."""
UNDISTILLED = r"(de|un)-?distill"
"""What the names of few-step models have in them that were brought back to many steps."""
LONGEST_NAME = 300


@dataclass(frozen=True, slots=True)
class Recognised:
    """What a name was recognised as."""

    known: FewStep
    steps: int
    where: str
    """`its file name`, `its header's modelspec.title`."""


def normal_name(text: str) -> str:
    """A name in lower case with single hyphens between its words; folders stay apart."""
    return re.sub(r"[\s_.\-]+", "-", text[:LONGEST_NAME].lower())


def recognise(names: Mapping[str, str], family: str | None, kinds: tuple[Kind, ...]) -> tuple[Recognised, ...]:
    """The known files that some names mean, each once; `names` maps where a name was found to the name.

    More than one answer with different schedules means that the names contradict each other.
    """
    found: list[Recognised] = []
    for (where, name), known in itertools.product(names.items(), KNOWN):
        if known.kind in kinds and family in (None, known.family):
            normal = normal_name(name)
            match = re.search(known.pattern, normal)
            if not match or (known.kind is Kind.FEW_STEP_BASE and re.search(UNDISTILLED, normal)):
                continue
            steps = int(match.groupdict().get("steps") or known.steps)
            if all((its.known, its.steps) != (known, steps) for its in found):
                found.append(Recognised(known, steps, where))
    return tuple(found)


def looks_few_step(names: Mapping[str, str], family: str | None) -> tuple[str, str] | None:
    """Where a name says that it may be a few-step LoRA, and with which word; None where none does."""
    for where, name in names.items():
        for match in re.finditer(LOOKS_FEW_STEP, normal_name(name)):
            if family != "z_image" or match[0] != "turbo":  # styles for Z-Image-Turbo bear its name
                return where, match[0]
    return None
