"""The options of the finished LoRA: its name, the dialects it is written in, and where it is pushed to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lorafuse_train.options.entry import RESULT, Entry

DIFFUSERS, COMFYUI, KOHYA, PEFT = "diffusers", "comfyui", "kohya", "peft"
DIALECTS = (DIFFUSERS, COMFYUI, KOHYA, PEFT)
_ANY = "|".join(DIALECTS)
_HUB_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]*"


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    """What is made of the LoRA once it is trained."""

    lora_name: Annotated[
        str | None,
        Entry(RESULT, "Title of the LoRA, in its header and its model card. Default: made from the base's name."),
    ] = None
    trigger_phrase: Annotated[
        str | None,
        Entry(RESULT, "Words of the captions that call what is learned; told to users by header and model card."),
    ] = None
    export: Annotated[
        tuple[str, ...],
        Entry(
            RESULT,
            (
                "Further files of the finished LoRA, such as comfyui,kohya: comfyui, kohya and peft; diffusers is "
                "always written. Repeatable. Checkpoints are converted with `lorafuse convert`."
            ),
            form=rf"\s*({_ANY})\s*(,\s*({_ANY})\s*)*",
            expected=f"some of {', '.join(DIALECTS)}",
        ),
    ] = (DIFFUSERS,)
    push_to_hub: Annotated[
        bool,
        Entry(RESULT, "Upload LoRA, model card and pictures at the end; with HF_TOKEN, or after `hf auth login`."),
    ] = False
    hub_model_id: Annotated[
        str | None,
        Entry(
            RESULT,
            "Where to: owner/name on the Hugging Face hub, or a name of your own account.",
            form=rf"({_HUB_NAME}/)?{_HUB_NAME}",
            expected="owner/name",
        ),
    ] = None
    hub_private: Annotated[bool, Entry(RESULT, "Make the repository private, where it is new.")] = False

    @property
    def dialects(self) -> tuple[str, ...]:
        """What is written, the diffusers file first."""
        asked = {name.strip() for text in self.export for name in text.split(",")}
        return (DIFFUSERS, *(name for name in DIALECTS[1:] if name in asked))
