"""The commands that make the checkpoint that a LoRA is for, as its manifest tells them; for the model card."""

from __future__ import annotations

import shlex

from lorafuse_common.manifest import FusedLora, Manifest, Role


def target_sha256(manifest: Manifest) -> str | None:
    """Identity of the fused checkpoint that a new LoRA is for; None where that is the original model."""
    if manifest.role is Role.DEPLOY:
        return manifest.fused_sha256
    return manifest.parent.fused_sha256 if manifest.parent else None


def fuse_commands(manifest: Manifest) -> list[str]:
    """The commands that make the checkpoint that a new LoRA is for, the first fuse of its lineage first."""
    is_whole = manifest.role is Role.DEPLOY  # a scaffold is taken down again
    lineage = list(reversed(manifest.lineage if is_whole else manifest.lineage[1:]))
    found, base = [], "models/base"
    if manifest.parent is None and manifest.origin:
        base = f"{manifest.origin.repo}@{manifest.origin.revision}"
    for number, (role, loras) in enumerate(lineage, 1):
        is_last = number == len(lineage)
        out = "models/fused" if is_last else f"models/fused-{number}"
        words = ["lorafuse", "fuse", base, *(word for lora in loras for word in _lora_words(lora))]
        words += ["--role", role.value] if role is not Role.DEPLOY else []
        if is_last and is_whole:
            words += _last_words(manifest)
        found.append(shlex.join([*words, "--out", out]))
        base = out
    return found


def _lora_words(lora: FusedLora) -> list[str]:
    name = lora.origin.uri if lora.origin else lora.name
    at = f"@{lora.component}" if lora.component not in (None, "transformer") else ""
    strength = f":{lora.strength!r}" if lora.strength != 1 or lora.origin else ""
    alpha = [] if lora.alpha is None else ["--alpha", f"{name}={lora.alpha!r}"]
    return ["--lora", f"{name}{strength}{at}", *alpha]


def _last_words(manifest: Manifest) -> list[str]:
    words = [word for kind in manifest.allowed for word in ("--allow", kind)]
    dtypes = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    words += ["--dtype", dtypes.get(manifest.dtype, manifest.dtype)] if manifest.dtype else []
    words += ["--rounding", "stochastic", "--seed", str(manifest.seed)] if manifest.seed is not None else []
    if manifest.schedule:
        words += ["--schedule", ",".join(f"{sigma!r}" for sigma in manifest.schedule.sigmas)]
    return words
