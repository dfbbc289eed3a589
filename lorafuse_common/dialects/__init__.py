"""The registry of LoRA spellings; a new one is a file here and an entry in `DIALECTS`."""

from .comfy import COMFY
from .dialect import Dialect, Key, split_key
from .diffsynth import DIFFSYNTH
from .diffusers import DIFFUSERS
from .kohya import KOHYA
from .lightning import LIGHTNING
from .lycoris import LYCORIS
from .onetrainer import ONETRAINER
from .original import ORIGINAL
from .peft import PEFT
from .videox import VIDEOX

DIALECTS: tuple[Dialect, ...] = (
    DIFFUSERS,
    COMFY,
    PEFT,
    KOHYA,
    VIDEOX,
    ONETRAINER,
    LYCORIS,
    LIGHTNING,
    DIFFSYNTH,
    ORIGINAL,
)

__all__ = ["DIALECTS", "Dialect", "Key", "split_key"]
