"""The likeliest reason why a LoRA does not fit a base, in one sentence."""

from __future__ import annotations

from collections import Counter

from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.lora import LoraFile, common_width, guess_families, last_block


def likely_cause(lora: LoraFile, base: Checkpoint) -> str | None:
    """Compare the LoRA's names and widths with the base's; None where they tell nothing."""
    tied = [family for family, _ in guess_families(lora, by_size=False)]
    if tied and base.family and base.family not in tied:
        titles = sorted({family.title for family, _ in guess_families(lora)})
        return f"this LoRA's modules are {' or '.join(titles)} names; the base is {base.title}"
    width, base_width = common_width(lora), _base_width(base)
    if width and base_width and width != base_width:
        sizes = {size.width: size.title for size in base.family.sizes} if base.family else {}
        theirs = f"the {sizes[width]} model" if width in sizes else f"a model of width {width}"
        ours = sizes.get(base_width, f"of width {base_width}")
        return f"this LoRA's shapes are of {theirs}; the base is {ours}"
    block, last = last_block(module.stem for module in lora.modules), last_block(base.modules)
    if block > last:
        return f"this LoRA names block {block}; the base's last is {last}, so it is of a larger model"
    return None


def _base_width(base: Checkpoint) -> int | None:
    widths = Counter(ref.shape[1] for ref in base.modules.values() if len(ref.shape) == 2)
    return widths.most_common(1)[0][0] if widths else None
