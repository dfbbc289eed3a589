"""Through which weights the training loss runs: the fused ones, or those without what was fused for few steps.

Plain flow matching on a few-step base turns it back into an ordinary one. Where the loss runs through the original
weights, the LoRA learns what it would have learnt there, and the few-step ability stays in what was fused. The
original weights are the fused ones with the fused LoRAs taken off, or those of another checkpoint, swapped in. Of
several fused LoRAs only those that brought the few steps need to go: the new LoRA is used together with the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.errors import ConfigError
from lorafuse_common.hashing import sha256_of
from lorafuse_common.manifest import FusedLora, Manifest, Role, find_lora
from lorafuse_common.tensorfile import read_tensor
from lorafuse_train.base import Base, original_transformer
from lorafuse_train.few_step.frozen_lora import FrozenLora, LoraSource, find_modules, joined, load_frozen, read_factors
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.config_few_step import AUTO, FUSED, ORIGINAL, WITHOUT
from lorafuse_train.samples.original_rows import original_on_host


@dataclass(frozen=True, slots=True)
class Objective:
    """Which weights, decided and checked before any are loaded."""

    base: str = FUSED
    """FUSED, ORIGINAL, or WITHOUT and the names of the LoRAs that are taken off."""
    reason: str = ""
    taken_off: tuple[LoraSource, ...] = ()
    """The fused LoRAs, at minus their strength."""
    original: Path | None = None
    """The transformer whose weights are swapped in, where LoRAs cannot be taken off."""
    adapter: LoraSource | None = None
    """Of `--train_adapter`."""

    @property
    def leaves_some(self) -> bool:
        """Whether other fused LoRAs stay on."""
        return self.base.startswith(WITHOUT)

    @property
    def identity(self) -> dict[str, Any]:
        """What a continued training must have in common."""
        adapter = [self.adapter.sha256, self.adapter.strength] if self.adapter else None
        return {"objective_base": self.base, "weights_swapped": self.original is not None, "train_adapter": adapter}

    def beside_bytes(self, base: Base, sizes: Mapping[str, int]) -> int:
        """Memory besides the base's own: frozen LoRAs and swapped tensors; `sizes`: name -> bytes of the base's."""
        frozen: int = sum(source.numel for source in (*self.taken_off, *((self.adapter,) if self.adapter else ())))
        changed = {change.name for change in base.manifest.changes} if base.manifest and self.original else set()
        swapped = sum(size for name, size in sizes.items() if name in changed)
        return frozen * int(base.dtype.itemsize) + swapped


def is_few_step(manifest: Manifest | None) -> bool:
    """Whether a fused base is to draw in few steps when the new LoRA is used."""
    return manifest is not None and manifest.schedule is not None and manifest.role is Role.DEPLOY


def came_with_a_lora(manifest: Manifest) -> bool:
    """Whether what was fused made a base draw in few steps; what the user says of a schedule, is taken for that."""
    stated = manifest.schedule is not None and manifest.schedule.source.startswith("--schedule")
    return stated or any(_made_few_step(manifest, lora.name) for _, loras in manifest.lineage for lora in loras)


def _made_few_step(manifest: Manifest, name: str) -> bool:
    """Whether it was the LoRA of this name; older manifests say so only where the schedule came from it."""
    schedule = manifest.schedule
    if schedule is None:
        return False
    return name in schedule.loras or schedule.source == name or schedule.source.startswith(f"{name} (")


def plan_objective(config: TrainConfig, base: Base) -> Objective:
    """Make `--objective_base auto` definite, and look up the LoRAs that this takes.

    Raises:
        ConfigError: the original weights cannot be had, or `--train_adapter` does not fit; says why and what to do.
    """
    checkpoint = open_checkpoint(base.transformer)
    objective = _objective(config, base, checkpoint)
    if config.train_adapter_file is None:
        return objective
    path, strength = config.train_adapter_file
    try:
        return replace(objective, adapter=find_modules(path, sha256_of(path), strength, checkpoint))
    except (ConfigError, OSError) as error:
        raise ConfigError(f"--train_adapter {path}: cannot be added to the base ({error})") from error


def _objective(config: TrainConfig, base: Base, checkpoint: Checkpoint) -> Objective:
    manifest, asked = base.manifest, config.objective_base
    if asked == FUSED:
        return Objective(FUSED, "as asked")
    if asked == AUTO and not is_few_step(manifest):
        if manifest and manifest.role is Role.SCAFFOLD:
            return Objective(FUSED, "because what was fused is a scaffold")
        return Objective(FUSED, "because the base is none for few steps")
    if asked == AUTO and manifest and not came_with_a_lora(manifest):
        return Objective(FUSED, "because the base drew in few steps before the fuse already")
    if manifest is None:
        raise ConfigError(f"--objective_base {asked}: {base.folder} has no lorafuse.json, so nothing was fused into it")
    reason = "because the base is for few steps" if asked == AUTO else "as asked"
    names = _names_off(config, base, manifest)
    faults: list[str] = []
    sources = _fused_sources(config, base, manifest, checkpoint, names, faults)
    if not faults:
        return Objective(f"{WITHOUT}{','.join(names)}" if names else ORIGINAL, reason, taken_off=sources)
    if config.use_dora:  # which divides by the length of the weights' rows, and they would be those of the fused ones
        faults.append("and a DoRA's lengths are those of the fused weights, so that others cannot be swapped in")
    elif config.original_model and not config.names_off:
        return Objective(ORIGINAL, reason, original=original_transformer(config.original_model, base.component))
    raise ConfigError(
        f"--objective_base {asked}: the training loss is to run through the weights before the fuse, {reason}, but the "
        "fused LoRAs cannot be taken off:\n"
        + "\n".join(f"  {fault}" for fault in faults)
        + "\nGive the checkpoint before the fuse as --original_model, or the missing LoRA files as --lora_fused; "
        "or --objective_base fused, which trains the few-step ability away."
    )


def _names_off(config: TrainConfig, base: Base, manifest: Manifest) -> tuple[str, ...]:
    """Which LoRAs alone are to be taken off, by name; none: all of them.

    Raises:
        ConfigError: the user names one that was not fused.
    """
    ours: dict[str, set[str]] = {}
    for lora in _loras(base, manifest):
        ours.setdefault(lora.name, set()).add(lora.sha256)
    if missing := [name for name in config.names_off if name not in ours]:
        raise ConfigError(
            f"--objective_base {config.objective_base}: {', '.join(missing)} was not fused into {base.folder}; "
            f"expected some of {', '.join(ours)}"
        )
    if config.objective_base != AUTO:
        return config.names_off
    brought = tuple(name for name, files in ours.items() if _made_few_step(manifest, name) and len(files) == 1)
    return brought if len(brought) < len(ours) else ()


def _loras(base: Base, manifest: Manifest) -> list[FusedLora]:
    """Those fused into this transformer, the last fuse's first."""
    component = base.component if manifest.component else None
    return [lora for _, loras in manifest.lineage for lora in loras if lora.component in (None, component)]


def _fused_sources(
    config: TrainConfig,
    base: Base,
    manifest: Manifest,
    checkpoint: Checkpoint,
    names: Sequence[str],
    faults: list[str],
) -> tuple[LoraSource, ...]:
    """The LoRAs in the base of these names, or all, at minus their strength; `faults` gets why one cannot be taken
    off."""
    given = {sha256_of(path): path for path in config.lora_fused}
    sources = []
    for lora in _loras(base, manifest):
        if names and lora.name not in names:
            continue
        path = given.get(lora.sha256) or find_lora(lora, base.folder)
        if path is None:
            faults.append(f"{lora.name}: its file is not kept in {base.folder}, nor where it was")
            continue
        try:
            sources.append(find_modules(path, lora.sha256, -lora.strength, checkpoint, alpha=lora.alpha))
        except ConfigError as error:
            faults.append(str(error))
    if not names and not faults and (strange := _changed_by_others(base, manifest, sources)):
        faults.append(f"{len(strange)} tensors were changed by no weight of these LoRAs (first: {min(strange)})")
    return tuple(sources)


def _changed_by_others(base: Base, manifest: Manifest, sources: Sequence[LoraSource]) -> set[str]:
    """The tensors that the last fuse changed and none of its LoRAs has as a weight."""
    component = base.component if manifest.component else None
    last = {lora.sha256 for lora in manifest.loras}
    covered = {f"{module}.weight" for its in sources if its.sha256 in last for module in its.modules}
    return {change.name for change in manifest.changes if change.component == component} - covered


@dataclass(frozen=True, slots=True)
class OriginalWeights:
    """The tensors that a fuse changed, as they were."""

    pairs: Sequence[tuple[nn.Parameter, Tensor]]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Within it, the model has these weights; pointers change hands, and nothing is copied."""
        fused = [parameter.data for parameter, _ in self.pairs]
        for parameter, original in self.pairs:
            parameter.data = original
        try:
            yield
        finally:
            for (parameter, _), data in zip(self.pairs, fused, strict=True):
                parameter.data = data

    @property
    def nbytes(self) -> int:
        """What they take besides the fused ones."""
        return sum(original.nbytes for _, original in self.pairs)


@dataclass(frozen=True, slots=True)
class ObjectiveBase:
    """The weights that the training loss runs through, ready to use."""

    fused: FrozenLora | None = None
    """What was fused, at minus its strength."""
    original: OriginalWeights | None = None
    adapter: FrozenLora | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it, which must hold the backward pass too, the model computes with these weights."""
        with ExitStack() as stack:
            for added in (self.fused, self.adapter):
                if added:
                    stack.enter_context(added.added(1.0))
            if self.original:
                stack.enter_context(self.original.swapped_in())
            yield


def load_objective(objective: Objective, transformer: Any, dtype: torch.dtype, device: torch.device) -> ObjectiveBase:
    """Read what the objective takes, and put it on the transformer; before the new LoRA is attached."""
    fused = load_frozen(objective.taken_off, dtype, device) if objective.taken_off else None
    adapter = load_frozen([objective.adapter], dtype, device) if objective.adapter else None
    for added in (fused, adapter):
        if added:
            added.attach(transformer)
    original = original_weights(objective.original, transformer) if objective.original else None
    return ObjectiveBase(fused, original, adapter)


def original_weights(folder: Path, transformer: Any) -> OriginalWeights:
    """The tensors of the checkpoint in `folder` that differ from the transformer's, in its precision, on its device.

    Raises:
        ConfigError: it is not what was fused into.
    """
    host = original_on_host(folder, transformer)
    return OriginalWeights([(parameter, original.to(parameter.device)) for parameter, original in host.pairs])


@torch.no_grad()
def leftover(sources: Sequence[LoraSource], fused: Checkpoint, original: Checkpoint) -> float:
    """|W' - D - W| / |D| over all changed weights, fp32: what rounding W' = W + D left when D is taken off again."""
    error = changed = 0.0
    for module, (a, b) in joined([read_factors(source) for source in sources]).items():
        name = f"{module}.weight"
        before, after = (read_tensor(each.tensors[name]).float() for each in (original, fused))
        minus_delta = (b @ a).view_as(after)
        error += float((after + minus_delta - before).square().sum())
        changed += float(minus_delta.square().sum())
    return math.sqrt(error / changed) if changed else 0.0


def recorded_leftover(manifest: Manifest, fused: Checkpoint) -> float:
    """The same, by what `lorafuse.json` recorded of every tensor that the last fuse changed."""
    sizes = {
        change.name: fused.tensors[change.name].numel for change in manifest.changes if change.name in fused.tensors
    }
    known = [change for change in manifest.changes if change.name in sizes]
    error = sum(sizes[change.name] * (change.loss * change.delta_rms) ** 2 for change in known)
    changed = sum(sizes[change.name] * change.delta_rms**2 for change in known)
    return math.sqrt(error / changed) if changed else 0.0
