"""The commands that write LoRAs from fused checkpoints: export and extract."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafuse_common.errors import ConfigError

from .asking import lora_request
from .choices import STORED_AS, Device, Dtype, LoraRequest
from .options import ComponentOption, DeviceOption, JsonOption, ReplaceOption
from .progress import size_text
from .terminal import facts_printed, say

if TYPE_CHECKING:
    from lorafuse_common.manifest import Manifest

    from .export import Exported
    from .lora_out import Target


class For(StrEnum):
    """The checkpoint that an exported LoRA is for."""

    ORIGINAL = "original"


class VectorsChoice(StrEnum):
    """What becomes of changed norms and biases."""

    AUTO = "auto"
    DIFF = "diff"
    SKIP = "skip"


DialectOption = Annotated[
    str, typer.Option(metavar="DIALECT", help="diffusers (default), comfyui, kohya, peft, or another of convert's.")
]
OutFileOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The .safetensors file to write.")]
StoredOption = Annotated[
    Dtype,
    typer.Option(
        help="What the factors are stored as. keep: that of the LoRAs, float32 where a scale has to be exact."
    ),
]
VectorsOption = Annotated[
    VectorsChoice,
    typer.Option(
        help="Changed norms and biases: diff writes them as .diff and .diff_b, skip leaves them out; auto: diff, or an "
        "error where DIALECT's readers know none."
    ),
]
MismatchOption = Annotated[
    bool,
    typer.Option("--allow-base-mismatch", help="Go on where a LoRA or --base is of another checkpoint than recorded."),
]


def export_command(
    new: Annotated[
        str, typer.Argument(metavar="NEW_LORA[:STRENGTH]", help="The LoRA that was trained on the fused checkpoint.")
    ],
    fused: Annotated[Path, typer.Option(metavar="DIR", help="The fused checkpoint that it was trained on.")],
    out: OutFileOption,
    to_use_with: Annotated[For, typer.Option("--for", help="original: the base that the first LoRA was fused into.")]
    = For.ORIGINAL,
    lora: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A fused LoRA that is not kept in DIR; known by its sha256. Repeatable."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Compress each layer to this rank by SVD and print the error. Default: ranks add up."),
    ] = None,
    to: DialectOption = "diffusers",
    base: Annotated[
        Path | None, typer.Option(metavar="BASE", help="The original base, to print the error against the fused model.")
    ] = None,
    component: ComponentOption = None,
    dtype: StoredOption = Dtype.KEEP,
    vectors: VectorsOption = VectorsChoice.AUTO,
    allow_base_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
    force: ReplaceOption = False,
) -> None:  # fmt: skip
    """Write one LoRA for the original base that holds the fused LoRAs and NEW_LORA."""
    with facts_printed(as_json=as_json) as facts:
        facts["for"] = to_use_with.value
        target = _target(out, to, dtype, vectors, force=force)
        facts |= _export(new, fused, target, lora or [], rank, base, component, allowed=allow_base_mismatch)


def _target(out: Path, to: str, dtype: Dtype, vectors: VectorsChoice, *, force: bool) -> Target:
    from .convert import dialect_named
    from .lora_out import Target, Vectors

    return Target(out, dialect_named(to), STORED_AS[dtype], Vectors(vectors.value), force)


def _export(
    new: str,
    fused: Path,
    target: Target,
    given: list[Path],
    rank: int | None,
    base: Path | None,
    component: str | None,
    *,
    allowed: bool,
) -> dict[str, Any]:
    from lorafuse_common.checkpoint import open_checkpoint

    from .export import export, ingredients, lora_file, require_trained_on
    from .export_check import compare, describe_comparison, require_original
    from .verify import recorded

    folder, manifest = recorded(fused)
    asked = lora_request(new)
    request = LoraRequest(lora_file(asked.path), asked.strength)
    chosen = component or manifest.component
    found, dropped = ingredients(folder, manifest, chosen, given)
    if note := require_trained_on(request.path, folder, manifest, allowed=allowed):
        say(note)
    if dropped:
        names = ", ".join(lora.name for lora in dropped)
        say(f"role scaffold: {names} was there for the training only, and is not in the result")
        if base:
            say(f"not compared with {folder}, which holds the scaffold")
    if not found:
        raise ConfigError(
            f"{request.path}: is for the original base as it is, as {folder} holds nothing that stays at inference; "
            f"use it there. For another dialect: lorafuse convert {request.path} --to DIALECT --out FILE"
        )
    original = open_checkpoint(base, chosen) if base else None
    if original:
        require_original(original, manifest, allowed=allowed)
    result = export(folder, manifest, request, found, target, component=chosen, rank=rank)
    for line in _describe_export(result, manifest, request, rank):
        say(line)
    facts: dict[str, Any] = {
        "out": str(result.out),
        "bytes": result.nbytes,
        "layers": [asdict(x) for x in result.layers],
        "skipped": result.skipped,
    }
    if original and not dropped:
        comparison = compare(folder, original, target.out, request, chosen)
        for line in describe_comparison(comparison):
            say(line)
        facts["error_against_fused"] = comparison.relative
        facts["errors"] = [asdict(layer) for layer in comparison.layers]
    return facts


def _describe_export(result: Exported, manifest: Manifest, new: LoraRequest, rank: int | None) -> list[str]:
    from .lora_out import describe_skipped

    names = [f"{lora.name} x {lora.strength:g}" for lora in result.loras]
    ranks = [layer.rank for layer in result.layers if layer.rank] or [0]
    span = f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
    lines = [
        f"export {' + '.join([*names, f'{new.path.name} x {new.strength:g}'])}",
        f"{len(result.layers)} tensors, {span}, {size_text(result.nbytes)}: {result.out}",
        *describe_skipped(result.skipped),
    ]
    if rank:
        lines.append(f"{'ranks':>6} {'kept':>5} {'error':>9}  layer (error: what compression took, of the whole delta)")
        lines += [
            f"{layer.ranks or 'full':>6} {layer.rank:>5} {layer.error or 0:9.2%}  {layer.module}"
            for layer in result.layers
            if layer.rank
        ]
    others = {lora.component for _, loras in manifest.lineage for lora in loras} - {None, manifest.component}
    if others:
        lines.append(f"note: {', '.join(sorted(map(str, others)))} has LoRAs of its own: export it with --component")
    return lines


def extract_command(
    fused: Annotated[
        Path, typer.Argument(metavar="FUSED", help="A checkpoint: file, model folder or pipeline folder.")
    ],
    base: Annotated[
        Path, typer.Option(metavar="BASE", help="The checkpoint of the same architecture to compare with.")
    ],
    rank: Annotated[int, typer.Option(min=1, help="The highest rank of a layer.")],
    out: OutFileOption,
    energy: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="No more ranks than reach this share of a layer's squared difference. Default: all."
        ),
    ] = 1.0,
    to: DialectOption = "diffusers",
    component: ComponentOption = None,
    dtype: StoredOption = Dtype.KEEP,
    vectors: VectorsOption = VectorsChoice.AUTO,
    device: DeviceOption = Device.CPU,
    as_json: JsonOption = False,
    force: ReplaceOption = False,
) -> None:
    """Write the difference of two checkpoints as a LoRA for BASE."""
    from lorafuse_common.checkpoint import open_checkpoint

    from .execute import check_device
    from .extract import describe_extraction, extract

    with facts_printed(as_json=as_json) as facts:
        target = _target(out, to, dtype, vectors, force=force)
        check_device(device)
        ours = _component_for(fused, component)
        checkpoints = (open_checkpoint(fused, ours), open_checkpoint(base, _component_for(base, component)))
        result = extract(*checkpoints, target, rank=rank, energy=energy, device=device)
        facts |= asdict(result) | {"error": result.error, "out": str(out)}
        for line in describe_extraction(result):
            say(line)
        say(f"{out}: {size_text(result.nbytes)}")


def _component_for(path: Path, component: str | None) -> str | None:
    """A component can only be chosen in a pipeline; the other checkpoint may be a bare transformer."""
    return component if (path / "model_index.json").is_file() else None
