"""The foot of the report: tensors and files in tables, and the commands to go on with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lorafuse_common.checkpoint import Checkpoint, Form
from lorafuse_common.manifest import Manifest, TensorChange
from lorafuse_common.tensorfile import TensorRef
from lorafuse_fuse.commands import fuse_command, verify_command
from lorafuse_fuse.findings import Advice, ratio_of
from lorafuse_fuse.progress import size_text

from .charts import survival_chart
from .heatmap import Group, Scale, percent
from .markup import Markup, dotted, element, joined

_WEAKEST_SHOWN = 12


def single_tensors(component: str | None, group: Group, ratio: Scale, gain: Scale) -> Markup:
    """The tensors that are in no list of blocks."""
    rows = [
        element(
            "tr",
            element("td", dotted(change.name), class_="name mono"),
            *(
                element("td", element("i", class_=scale.shade(scale.of(change))), text, class_="number")
                for scale, text in ((ratio, _percent(change)), (gain, f"{change.gain:g}"))
            ),
        )
        for row in group.values()
        for change in row.values()
    ]
    heading = f"Outside of blocks{f' ({component})' if component else ''}"
    table = element("div", _table(("tensor", "delta/weight", "gain"), rows), class_="narrow")
    return joined([element("h3", heading), table])


def _percent(change: TensorChange) -> str:
    ratio = ratio_of(change)
    return "-" if ratio is None else percent(ratio)


def _table(heads: Sequence[str], rows: Sequence[str]) -> Markup:
    cells = [element("th", head, class_="number" if i else None) for i, head in enumerate(heads)]
    table = element("table", element("thead", element("tr", *cells)), element("tbody", *rows))
    return element("div", table, class_="scroll")


def weakest(manifest: Manifest, remedies: Sequence[Advice]) -> Markup:
    """The tensors with the least gain, and what to do; and all tensors, folded away."""
    changes = sorted(manifest.changes, key=lambda change: (change.gain, change.name))
    if not changes:
        return Markup("")
    parts: list[str] = []
    if remedies:
        steps = element("ol", *(element("li", element("b", its.what), f": {its.why}.") for its in remedies))
        parts += [
            element("h2", "What to do about the weakest"),
            element("div", element("div", steps), _survival(manifest), class_="maps"),
            _changes(changes[:_WEAKEST_SHOWN]),
        ]
    everything = element("details", element("summary", f"All {len(changes)} tensors, weakest first"), _changes(changes))
    return element("section", *parts, everything)


def _survival(manifest: Manifest) -> Markup:
    if not any(change.weight_rms and change.delta_rms for change in manifest.changes):
        return Markup("")
    caption = element(
        "figcaption", element("span", "the smaller a delta, the more of it rounding takes", class_="name")
    )
    return element("figure", caption, survival_chart(manifest.changes))


def _changes(changes: Sequence[TensorChange]) -> Markup:
    several = len({change.component for change in changes}) > 1
    rows = [
        element(
            "tr",
            element("td", dotted(f"{f'{change.component} / ' if several else ''}{change.name}"), class_="name mono"),
            *(
                element("td", text, class_="number")
                for text in (
                    f"{change.gain:g}", f"{change.loss:g}", _percent(change), f"{change.delta_rms:g}",
                    f"{change.weight_rms:g}",
                )
            ),
        )
        for change in changes
    ]  # fmt: skip
    return _table(("tensor", "gain", "loss", "delta/weight", "delta", "weight"), rows)


def after(manifest: Manifest, fused: Mapping[str | None, Checkpoint], edited: Collection[TensorRef]) -> Markup:
    """How to go on, how to check it, how to make it again."""
    train = "lorafuse-train train --fused_model FUSED --dataset_base_path DIR --output_path DIR"
    plain_fp8 = ["--plain-fp8"] if _has_plain_fp8(manifest, fused) else []
    return element(
        "section",
        element("h2", "Use it"),
        element("p", "FUSED is the folder that this page is about. Train a LoRA on it:"),
        element("pre", train),
        *_loading(manifest, fused, edited),
        element("h2", "Check it, make it again"),
        element("p", "Hash every file, and add base and LoRAs up again in float64:"),
        element("pre", verify_command(manifest)),
        element("p", "The same checkpoint from the same files, byte for byte:"),
        element("pre", fuse_command(manifest, plain_fp8)),
    )


def _loading(manifest: Manifest, fused: Mapping[str | None, Checkpoint], edited: Collection[TensorRef]) -> list[Markup]:
    base = next(iter(fused.values()), None)
    if base is None:
        return []
    if base.form is Form.MODEL and len(manifest.outputs) == 1:
        name = manifest.outputs[0].path
        where = " wherever the base's file went, such as ComfyUI's models/diffusion_models."
        return [element("p", "Or load ", element("code", f"FUSED/{name}"), where)]
    is_wide = any(ref.dtype == "F32" for ref in edited)
    dtype = (
        "torch.float32"
        if is_wide
        else "torch.float16"
        if {ref.dtype for ref in edited} == {"F16"}
        else "torch.bfloat16"
    )
    kind = "DiffusionPipeline" if base.form is Form.PIPELINE else base.class_name or "AutoModel"
    lines = [
        "import torch",
        f"from diffusers import {kind}",
        "",
        f'model = {kind}.from_pretrained("FUSED", dtype={dtype})',
    ]
    note = "Loading it as bfloat16 would round away what float32 keeps." if is_wide else ""
    return [element("p", f"Or load it with diffusers. {note}"), element("pre", "\n".join(lines))]


def _has_plain_fp8(manifest: Manifest, fused: Mapping[str | None, Checkpoint]) -> bool:
    from lorafuse_common.quantised import FP8_DTYPES, scale_of

    for change in manifest.changes:
        base = fused.get(change.component)
        ref = base.tensors.get(change.name) if base else None
        if base and ref and ref.dtype in FP8_DTYPES and scale_of(ref, change.name, base.tensors) is None:
            return True
    return False


def files(manifest: Manifest) -> Markup:
    """The hashes of everything that went in and came out."""

    def rows(entries: Sequence[tuple[str, str, int]]) -> list[Markup]:
        return [
            element("tr", element("td", path, class_="name"), element("td", digest, class_="mono"),
                    element("td", size_text(size), class_="number"))
            for path, digest, size in entries
        ]  # fmt: skip

    parts = [
        ("LoRAs", [(lora.name, lora.sha256, lora.size) for lora in manifest.loras]),
        ("base", [(record.path, record.sha256, record.size) for record in manifest.base]),
        ("fused", [(record.path, record.sha256, record.size) for record in manifest.outputs]),
    ]
    tables = [
        joined([element("h3", name), _table(("file", "sha256", "size"), rows(entries))]) for name, entries in parts
    ]
    summary = element("summary", f"{sum(len(entries) for _, entries in parts)} files with their sha256")
    return element("section", element("h2", "Files"), element("details", summary, *tables))
