"""`lorafuse inspect`: what a file or folder is, in words and as JSON."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafuse_common.algebras import UNSUPPORTED, algebra_of
from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.errors import NotALoraError
from lorafuse_common.lora import LoraFile, LoraModule, component_of, guess_dialect, guess_families, read_lora
from lorafuse_common.manifest import read_manifest, weights_sha256
from lorafuse_common.quantised import packed_format
from lorafuse_common.scale import ScaleConflictError, resolve_scale
from lorafuse_common.tensorfile import TensorRef

from .lineage import lineage_tree
from .provenance import provenance


def inspect_path(path: Path, component: str | None = None) -> dict[str, Any]:
    """Facts about a LoRA file, a checkpoint or a fused checkpoint, read from headers.

    Raises:
        LorafuseError: it is none of them.
    """
    if path.is_file():
        with contextlib.suppress(NotALoraError):  # then it is a checkpoint
            return _lora_facts(read_lora(path))
    facts = _checkpoint_facts(open_checkpoint(path, component))
    manifest = read_manifest(path) if path.is_dir() else None
    if manifest:
        raw = asdict(manifest)
        facts |= {"kind": "fused checkpoint", "fused_sha256": manifest.fused_sha256}
        facts |= {name: raw[name] for name in ("role", "loras", "schedule", "allowed", "parent")}
        facts["base_sha256"] = weights_sha256(manifest.base, manifest.component)
        facts["origin"] = manifest.origin.uri if manifest.origin else None
    return facts


def _dtypes(tensors: Mapping[str, TensorRef]) -> dict[str, int]:
    return dict(Counter(ref.dtype for ref in tensors.values()).most_common())


def _checkpoint_facts(base: Checkpoint) -> dict[str, Any]:
    return {
        "kind": "checkpoint",
        "path": str(base.root),
        "form": base.form.value,
        "component": base.component,
        "family": base.family.name if base.family else None,
        "layout": base.layout.name if base.layout else None,
        "class_name": base.class_name,
        "prefix": base.prefix,
        "files": len(base.files),
        "tensors": len(base.tensors),
        "dtypes": _dtypes(base.tensors),
        "packed": packed_format(base.tensors),
        "parameters": sum(ref.numel for ref in base.tensors.values()),
        "bytes": base.nbytes,
    }


def _lora_facts(lora: LoraFile) -> dict[str, Any]:
    families = guess_families(lora)
    ours = [module for module in lora.modules if component_of(module.stem) is None]
    others = {module.stem: component_of(module.stem) for module in lora.modules}
    return {
        "kind": "lora",
        "path": str(lora.path),
        "dialect": guess_dialect(lora).name,
        "family": sorted({family.name for family, _ in families}),
        "layout": sorted({layout.name for _, layout in families}),
        "algebra": dict(Counter(_algebra_name(module, lora) for module in ours)),
        "modules": len({module.stem for module in ours}),
        "other_components": dict(Counter(component for component in others.values() if component)),
        "ranks": dict(Counter(str(rank) for module in ours if (rank := _rank(module)))),
        "scales": dict(Counter(_scale(lora, module) for module in ours if algebra_of(module.shapes))),
        "unread_keys": len(lora.unread),
        "dtypes": _dtypes(lora.source.tensors),
        "parameters": sum(ref.numel for ref in lora.source.tensors.values()),
        "bytes": lora.source.size,
        **provenance(lora.source.metadata),
        "metadata": dict(lora.source.metadata),
    }


def _algebra_name(module: LoraModule, lora: LoraFile) -> str:
    algebra = algebra_of(module.shapes)
    config = lora.scale_sources.config
    if config and config.unfusable:
        return f"cannot be fused: {config.unfusable}"
    foreign = sorted({UNSUPPORTED[role] for role in module.factors if role in UNSUPPORTED})
    return algebra.name if algebra else " and ".join(foreign) or "incomplete"


def _rank(module: LoraModule) -> int | None:
    algebra = algebra_of(module.shapes)
    return algebra.rank(module.shapes) if algebra else None


def _scale(lora: LoraFile, module: LoraModule) -> str:
    name = (guess_dialect(lora).tails(module.stem) or (module.stem,))[0]
    try:
        scale, source = resolve_scale(name, _rank(module), module.alpha, lora.scale_sources)
    except ScaleConflictError as error:
        return f"conflict: {error}"
    return f"{source} = {scale:g}"


def describe_facts(facts: Mapping[str, Any]) -> str:
    """The facts as aligned lines; long values are shortened."""
    lines = []
    for name, value in facts.items():
        if name == "loras":
            lines += ["lineage", *(f"  {line}" for line in lineage_tree(facts))]
        elif name == "schedule" and value:
            lines.append(f"{name:16} {_schedule_text(value)}")
        elif name != "parent" and value not in (None, "", {}, [], ()):
            text = ", ".join(f"{k} ({v})" for k, v in value.items()) if isinstance(value, Mapping) else _text(value)
            lines.append(f"{name.replace('_', ' '):16} {text if len(text) <= 400 else text[:400] + ' ...'}")
    return "\n".join(lines)


def _schedule_text(schedule: Mapping[str, Any]) -> str:
    levels = ", ".join(f"{sigma:.4g}" for sigma in schedule["sigmas"])
    guidance = f"guidance {schedule['guidance_scale']:g}"
    return f"{len(schedule['sigmas'])} steps at {levels}, {guidance}, from {schedule['source']}"


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
