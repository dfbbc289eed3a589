"""A planned conversion carried out: tensors under a dialect's keys, what it says of their scales, and the files."""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from lorafuse_common.algebras import Shape, algebra_of
from lorafuse_common.crossing import target_shape
from lorafuse_common.dialects import DOWN_UP_ROLES, AlphaStyle, Dialect
from lorafuse_common.dialects.comfy import COMFY
from lorafuse_common.errors import ConvertError, LoraFileError, OutputError
from lorafuse_common.hashing import stat_identity
from lorafuse_common.scale import ADAPTER_CONFIG, METADATA_KEY, lasting_metadata

from .factors import Stored, joined, joined_rows, renamed, reshaped
from .plan import LOW_RANK_ONLY, VECTOR, Conversion, Output
from .rows import has_column_magnitude, weight_shape
from .writer import Write, publish_files, write_tensors

NO_DELTA = "parts without a delta"


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    path: Path
    modules: int
    left_out: Mapping[str, int]
    """Reason -> modules that are not written for it."""
    nbytes: int
    up_to_date: bool
    """Whether it was there already, byte for byte."""


class Scaling(NamedTuple):
    """What PEFT has to know of a module."""

    rank: int
    scale: float


def write_conversion(conversion: Conversion, out: Path, *, force: bool = False) -> Converted:
    """Write the file and, for PEFT, its configuration beside it; both appear whole or not at all.

    Raises:
        OutputError: `out` may not be written there.
        LoraFileError: the LoRA changed while it was read.
        ConvertError: two modules get the same key.
    """
    lora, to = conversion.lora, conversion.to
    check_out(conversion, out)
    tensors, scalings, left_out = respelled(conversion)
    roles = {role for output in conversion.outputs for role in _roles(output)}
    metadata = lasting_metadata(lora.source.metadata) | {"format": "pt"}
    files: dict[Path, Write] = {}
    if to.alpha is AlphaStyle.CONFIG:
        text = json.dumps(adapter_config(scalings, roles), indent=2, sort_keys=True) + "\n"
        files[out.parent / ADAPTER_CONFIG] = lambda file: _write(file, text)
    elif to.suffix("magnitude") == VECTOR and len({scaling.rank for scaling in scalings.values()}) > 1:
        # Older diffusers takes the first module's rank for every module's alpha.
        settings = adapter_config(scalings, roles)
        metadata[METADATA_KEY] = json.dumps({to.prefixes[0] + k: v for k, v in settings.items()}, sort_keys=True)
    files[out] = lambda file: write_tensors(file, tensors, metadata)

    def check() -> None:
        if stat_identity(lora.path) != lora.source.identity:
            raise LoraFileError(f"{lora.path}: changed while being read; nothing was written. Convert again.")

    is_new = publish_files(files, replace=force, check=check)
    counts = Counter(conversion.left_out) + Counter({NO_DELTA: left_out})
    modules = len({output.module for output in conversion.outputs}) - left_out
    return Converted(out, modules, dict(counts), out.stat().st_size, up_to_date=not is_new)


def _roles(output: Output) -> set[str]:
    modules = [s.module for s in output.slices if s.module]
    return {output.bias_role} if output.bias_role else {role for module in modules for role in module.factors}


def _write(file: IO[bytes], text: str) -> None:
    file.write(text.encode())


def check_out(conversion: Conversion, out: Path) -> None:
    """Refuse an output that would touch an input, or whose scale a configuration would falsify.

    Raises:
        OutputError: it says why.
    """
    base = conversion.vocabulary.base
    inputs = [conversion.lora.path, *(file.path for file in (base.files if base else ()))]
    if out.suffix != ".safetensors":
        raise OutputError(f"--out {out}: expected the name of a .safetensors file")
    if out.is_dir():
        raise OutputError(f"--out {out}: is a folder; expected the name of a .safetensors file")
    for path in inputs:
        if out.resolve() == path.resolve() or (out.exists() and out.samefile(path)):
            raise OutputError(f"--out {out}: is the input {path}, which is never changed")
    beside = out.parent / ADAPTER_CONFIG
    if conversion.to.alpha is not AlphaStyle.CONFIG:
        if beside.exists():
            raise OutputError(
                f"--out {out}: would lie beside an {ADAPTER_CONFIG}, which states the scale of another LoRA, "
                "and be read with it. Choose another folder."
            )
        return
    others = sorted(path.name for path in out.parent.glob("*.safetensors") if path.name != out.name)
    if others:
        raise OutputError(
            f"--out {out}: its {ADAPTER_CONFIG} would be taken for that of {others[0]}, which lies there too. "
            f"Give it a folder of its own: {out.parent / out.stem / 'adapter_model.safetensors'}"
        )


def respelled(conversion: Conversion) -> tuple[dict[str, Stored], dict[str, Scaling], int]:
    """All tensors by key, what PEFT has to know of each module, and how many modules turned out to have no delta.

    Raises:
        ConvertError: two modules get the same key.
    """
    tensors: dict[str, Stored] = {}
    scalings: dict[str, Scaling] = {}
    left_out = 0
    for module in dict.fromkeys(output.module for output in conversion.outputs):
        outputs = [output for output in conversion.outputs if output.module == module]
        found = _factors(outputs)
        left_out += not found
        for output, factors in found:
            named, rank = _named(conversion, output, factors)
            if clash := next((key for key in named if key in tensors), None):
                raise ConvertError(f"{conversion.lora.path}: two of its modules are {clash} in {conversion.to.name}")
            tensors |= named
            if rank and output.parameter == "weight":
                scalings[module] = Scaling(rank, output.scale)
    return tensors, scalings, left_out


def _factors(outputs: Sequence[Output]) -> list[tuple[Output, dict[str, Stored]]]:
    """The factors of one module's weight and bias, without those that turn out to have no delta."""
    found = [(output, _made(output)) for output in outputs]
    kept = [(output, factors) for output, factors in found if factors is not None]
    if len(found) == 2 and [output.bias_role for output, _ in kept] == ["up_bias"]:  # a bias of B needs its B
        kept.insert(0, (outputs[0], joined(outputs[0].slices, keeps=True) or {}))
    return kept


def _made(output: Output) -> dict[str, Stored] | None:
    if output.bias_role:
        rows = joined_rows(output.slices, is_whole=output.is_whole)
        return None if rows is None else {output.bias_role: rows}
    module = output.slices[0].module
    return renamed(module, output.slices[0].factor) if output.is_whole and module else joined(output.slices)


def _named(
    conversion: Conversion, output: Output, factors: Mapping[str, Stored]
) -> tuple[dict[str, Stored], int | None]:
    """One module's tensors by key, and its rank."""
    to, stem = conversion.to, conversion.to.spell(output.module)
    if output.bias_role:
        return {stem + to.suffix(role, "bias"): value for role, value in factors.items()}, None
    shapes = {role: value.shape for role, value in factors.items()}
    algebra = algebra_of(shapes)
    assert algebra, "rows of a complete module are complete"
    rank = algebra.rank(shapes)
    ours = dict(factors)
    if "magnitude" in ours and not has_column_magnitude(shapes):
        ours["magnitude"] = _as_written(ours["magnitude"], to, weight_shape(shapes))
    named = {}
    for role, value in ours.items():
        # ComfyUI looks for a core only beside down and up.
        suffix = DOWN_UP_ROLES.get(role) if "mid" in ours else None
        named[stem + (suffix or to.suffix(role))] = value
    alpha = _alpha(output, to, rank)
    if alpha is not None:
        named[stem + to.suffix("alpha")] = Stored("F32", (), struct.pack("<f", alpha))
    if wide := _widened(conversion, output, shapes):
        named[stem + to.suffix("reshape_weight")] = Stored("I64", (len(wide),), struct.pack(f"<{len(wide)}q", *wide))
    return named, rank


def _alpha(output: Output, to: Dialect, rank: int | None) -> float | None:
    """The alpha that is written beside a module, if any; rules that mean something else by it keep theirs."""
    if to.alpha in LOW_RANK_ONLY:
        return None
    if output.is_scaled and rank:
        return output.scale * rank if output.scale != 1 or to.alpha is AlphaStyle.ALWAYS else None
    module = output.slices[0].module
    return module.alpha if module and output.is_whole and not {"diff", "set_weight"} & module.factors.keys() else None


def _as_written(magnitude: Stored, to: Dialect, weight: Shape | None) -> Stored:
    """A magnitude of rows: PEFT's is `[out]`, and `[1, out, 1...]` for a convolution; the others' `[out, 1...]`."""
    is_pefts = len(magnitude.shape) < 2 or magnitude.shape[0] == 1
    if weight is None or is_pefts == (to.suffix("magnitude") == VECTOR):
        return magnitude
    ones = (1,) * (len(weight) - 2)
    if is_pefts:
        return reshaped(magnitude, (weight[0], 1, *ones))
    return reshaped(magnitude, (1, weight[0], *ones) if ones else (weight[0],))


def _widened(conversion: Conversion, output: Output, shapes: Mapping[str, Shape]) -> Shape | None:
    """What ComfyUI has to be told where a LoRA brings more input columns than the base has, or may bring more.

    It does no harm elsewhere. Without a base, files of dialects that can tell are taken at their word.
    """
    vocabulary, to, module = conversion.vocabulary, conversion.to, output.slices[0].module
    if to.alpha in LOW_RANK_ONLY or not (module and output.is_whole) or "up" not in shapes:
        return None
    shape, its = weight_shape(shapes), vocabulary.written[output.module]
    is_told = module.stem + to.suffix("reshape_weight") in conversion.lora.source.tensors
    if to is COMFY and vocabulary.family and not vocabulary.family.widenable.keys().isdisjoint(its.names):
        of_base = target_shape(its, vocabulary.places.get("weight", {}))
        is_told |= shape != of_base if of_base else conversion.read_as.alpha in (None, *LOW_RANK_ONLY)
    return shape if is_told else None


def adapter_config(scalings: Mapping[str, Scaling], roles: Collection[str]) -> dict[str, Any]:
    """What PEFT's LoraConfig has to say of modules with these ranks and scales, each `lora_alpha / r` exactly.

    Modules are named by patterns that match nothing but them: PEFT takes plain names for the ends of names.
    """
    rank = Counter(scaling.rank for scaling in scalings.values()).most_common(1)[0][0]
    alphas = {module: scaling.scale * scaling.rank for module, scaling in scalings.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {f"^{module}": s.rank for module, s in scalings.items() if s.rank != rank},
        "alpha_pattern": {f"^{module}": _plain(a) for module, a in alphas.items() if a != alpha},
        "target_modules": "|".join(re.escape(module) for module in sorted(scalings)),
        "use_dora": "magnitude" in roles,
        "inference_mode": True,
        **({"lora_bias": True} if "up_bias" in roles else {}),  # which older versions do not know
    }


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number
