"""The registry of LoRA spellings; a new one is a file here and an entry in `DIALECTS`."""

from .comfy import COMFY
from .dialect import DOWN_UP_ROLES, SUFFIXES, AlphaStyle, Dialect, Key, flatten, split_key
from .diffsynth import DIFFSYNTH
from .diffusers import DIFFUSERS
from .genmo import GENMO
from .kohya import KOHYA
from .lightning import LIGHTNING
from .lycoris import LYCORIS
from .onetrainer import ONETRAINER
from .original import ORIGINAL
from .peft import PEFT
from .videox import VIDEOX
from .xlabs import XLABS

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
    XLABS,
    GENMO,
)

__all__ = ["DIALECTS", "DOWN_UP_ROLES", "SUFFIXES", "AlphaStyle", "Dialect", "Key", "flatten", "split_key"]
