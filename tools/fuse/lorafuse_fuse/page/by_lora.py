"""The report on several LoRAs: how large the delta of each is, alone, beside the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

from lorafuse_common.manifest import Manifest, TensorChange

from .heatmap import grouped, heat_map, percent, ratio_scale
from .markup import Markup, element, joined


def lora_by_lora(manifest: Manifest) -> Markup:
    """A picture for each LoRA, all with the same colours for the same delta/weight; nothing where there is only one."""
    if not any(change.lora_rms for change in manifest.changes):
        return Markup("")
    scale = ratio_scale([ratio for change in manifest.changes for ratio in _ratios(change).values()])
    text = "Each LoRA's delta alone, at its strength, in the same colours: where two are large they may be at odds."
    parts = [element("h2", "LoRA by LoRA"), element("p", text, class_="soft")]
    for index, lora in enumerate(manifest.loras):
        ratios = {change.name: _ratios(change)[index] for change in manifest.changes if index in _ratios(change)}
        if not ratios:
            continue
        middle = percent(median(ratios.values()))
        count = f" strength {lora.strength:g}, {len(ratios)} tensors, median delta/weight {middle}"
        parts.append(element("h3", lora.name, element("span", count, class_="soft")))
        mine = [c for c in manifest.changes if c.component == lora.component and c.name in ratios]
        maps = [
            heat_map(group, scale._replace(title=name, of=_of(index)))
            for (_, name), group in grouped(mine).items()
            if name
        ]
        parts.append(element("div", *maps, class_="maps") if maps else _rest(mine, ratios))
    return element("section", *parts)


def _rest(changes: list[TensorChange], ratios: Mapping[str, float]) -> Markup:
    """Of a model that has no blocks."""
    return joined([element("p", f"{change.name}: {percent(ratios[change.name])}") for change in changes])


def _ratios(change: TensorChange) -> dict[int, float]:
    """delta/weight of each LoRA that changes a tensor, by its place."""
    if not change.weight_rms:
        return {}
    return {index: rms / change.weight_rms for index, rms in enumerate(change.lora_rms) if rms}


def _of(index: int) -> Callable[[TensorChange], float | None]:
    return lambda change: _ratios(change).get(index)
