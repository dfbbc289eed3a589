"""The registry of architectures; a new one is a data file here and an entry in `FAMILIES`."""

from collections.abc import Iterable

from lorafuse_common.naming import Family, pattern_of

from .auraflow import AURAFLOW
from .chroma import CHROMA
from .cosmos import COSMOS
from .flux import FLUX
from .flux2 import FLUX2
from .hidream import HIDREAM
from .hunyuan_video import HUNYUAN_VIDEO
from .ideogram4 import IDEOGRAM4
from .krea2 import KREA2
from .ltx2 import LTX2
from .ltx_video import LTX_VIDEO
from .lumina2 import LUMINA2
from .mochi import MOCHI
from .qwen_image import QWEN_IMAGE
from .qwen_image21 import QWEN_IMAGE21
from .sana import SANA
from .sd3 import SD3
from .wan import WAN
from .z_image import Z_IMAGE

FAMILIES: tuple[Family, ...] = (
    FLUX,
    FLUX2,
    QWEN_IMAGE,
    WAN,
    Z_IMAGE,
    SD3,
    HUNYUAN_VIDEO,
    LTX_VIDEO,
    CHROMA,
    LUMINA2,
    COSMOS,
    KREA2,
    MOCHI,
    LTX2,
    SANA,
    QWEN_IMAGE21,
    HIDREAM,
    AURAFLOW,
    IDEOGRAM4,
)


def family_of_class(class_name: str) -> Family | None:
    """The family whose transformer class diffusers calls `class_name`."""
    return next((family for family in FAMILIES if class_name in family.transformer_classes), None)


def family_of_suffixes(suffixes: Iterable[str]) -> Family | None:
    """The family in which the most of `suffixes` end a module's name (for hints: "these are Wan names").

    None where no family knows any of them, or two know equally many.
    """
    wanted = {f"_{pattern_of(suffix)}" for suffix in suffixes}
    scores = {
        family.name: max(
            sum(any(f"_{pattern_of(module)}".endswith(want) for module in layout.modules) for want in wanted)
            for layout in family.layouts
        )
        for family in FAMILIES
    }
    best = max(scores.values())
    found = [family for family in FAMILIES if scores[family.name] == best]
    return found[0] if best and len(found) == 1 else None
