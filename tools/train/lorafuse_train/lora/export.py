"""The finished LoRA in other dialects: planned before the training, proven to be the same LoRA after it.

Each file is read back and its deltas B A are compared with those that were trained, in float64, module by module;
then it is given to those who would load it: `adapter_model.safetensors` to PEFT, the others to diffusers, which reads
some of them.
"""

from __future__ import annotations

import math
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_common.conversion import plan_conversion, write_conversion
from lorafuse_common.dialects import DIALECTS, Dialect
from lorafuse_common.errors import ConfigError, ConvertError, LorafuseError
from lorafuse_common.lora import LoraFile, read_lora
from lorafuse_common.publish import publish
from lorafuse_train.base import Base
from lorafuse_train.console import say
from lorafuse_train.lora.adapter import ADAPTER, FILE_NAME, PREFIX
from lorafuse_train.lora.lora_file import (
    LOADING_FAILS,
    load_arguments,
    pipeline_of,
    read_as_diffusers,
    set_metadata,
    write_blank,
)
from lorafuse_train.lora.metadata import names_of, rank_entries
from lorafuse_train.lora.ranks import module_strengths
from lorafuse_train.lora.targets import Targets
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.config_output import COMFYUI, KOHYA, PEFT
from lorafuse_train.steps.state import UNCHECKED

PLACES: Mapping[str, str] = {
    COMFYUI: "comfyui.safetensors",
    KOHYA: "kohya.safetensors",
    PEFT: "peft/adapter_model.safetensors",
}
"""Where each dialect is written, within the output folder."""
EXACT, ROUNDED = 1e-5, 0.02
"""How far a delta may be off, as a share of it: where a reader keeps fp32, and where it rounds to bf16."""


@dataclass(frozen=True, slots=True)
class Update:
    """What one module's weight is changed by: b a, and for DoRA the lengths of its rows."""

    a: Tensor
    """(r, in ...), any dtype."""
    b: Tensor
    """(out, r ...), with the scale in it."""
    magnitude: Tensor | None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """b (out, r) and a (r, in) in float64."""
        return self.b.detach().cpu().double().flatten(1), self.a.detach().cpu().double().flatten(1)


def dialect_of(name: str) -> Dialect:
    """The dialect that `--export` names."""
    return next(dialect for dialect in DIALECTS if dialect.name == name)


def plan_exports(model: nn.Module, base: Base, targets: Targets, config: TrainConfig) -> None:
    """Make sure, before the training, that every dialect asked for can hold the LoRA; `model` needs no memory.

    Raises:
        ConfigError: listing the dialects that cannot, and why.
    """
    asked = config.dialects[1:]
    if not asked:
        return
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        blank = Path(folder) / FILE_NAME
        write_blank(blank, _shapes(model, targets, config))
        lora, checkpoint = read_lora(blank), open_checkpoint(base.transformer)
        for name in asked:
            try:
                plan_conversion(lora, dialect_of(name), base=checkpoint)
            except ConvertError as error:
                faults.append(f"--export {name}: {str(error).removeprefix(f'{blank}: ')}")
    if faults:
        advice = "Add what is missing to --lora_target_modules, or leave the dialect out of --export."
        raise ConfigError("\n".join([*faults, advice]))


def _shapes(model: nn.Module, targets: Targets, config: TrainConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that the diffusers file will have."""
    found = {}
    for module, strength in module_strengths(targets, config).items():
        weight: Any = model.get_submodule(module).weight
        rows, *columns = weight.shape
        rank = strength.rank * (2 if config.starts_from_components else 1)
        ones = (1,) * (len(columns) - 1)
        found[f"{PREFIX}{module}.lora_A.weight"] = (rank, *columns)
        found[f"{PREFIX}{module}.lora_B.weight"] = (rows, rank, *ones)
        if config.use_dora:
            found[f"{PREFIX}{module}.lora_magnitude_vector"] = (1, rows, *ones) if ones else (rows,)
    return found


@dataclass(frozen=True, slots=True)
class Exporter:
    """Writes the files beside the diffusers file of one run."""

    base: Base
    config: TrainConfig
    transformer: Any
    """Its adapters are dropped and loaded anew by the checks."""
    trained: Mapping[str, Tensor]
    """What was trained, as diffusers names it."""

    def write(self, file: Path) -> None:
        """Write every dialect asked for from the diffusers `file`; none gets its name before it was checked.

        Raises:
            LorafuseError: a file is not the same LoRA; the diffusers file and those before stay.
        """
        for name in self.config.dialects[1:]:
            final = self.config.output_path / PLACES[name]
            try:
                readers = self._write(file, name, final)
            except (LorafuseError, OSError) as error:
                where = ["--base", str(self.base.transformer), "--out", str(final)]
                again = shlex.join(["lorafuse", "convert", str(file), "--to", name, *where])
                raise LorafuseError(f"--export {name}: {error}; {file} is complete: `{again}` tries again") from error
            say(f"saved {final}; {readers}")

    def _write(self, file: Path, name: str, final: Path) -> str:
        dialect = dialect_of(name)
        with tempfile.TemporaryDirectory(prefix=UNCHECKED, dir=self.config.output_path) as folder:
            staged = Path(folder) / final.name
            checkpoint = open_checkpoint(self.base.transformer)
            write_conversion(plan_conversion(read_lora(file), dialect, base=checkpoint), staged)
            self._complete_header(staged, dialect)
            readers = self._check(staged, name)
            self._publish(staged, final)
        return readers

    def _complete_header(self, file: Path, dialect: Dialect) -> None:
        lora = read_lora(file)
        code = names_of(self.base).repository if dialect.layout == "original" else "diffusers"
        metadata = {**lora.source.metadata, **rank_entries(_ranks(lora)), "modelspec.implementation": code}
        set_metadata(file, metadata)

    def _publish(self, staged: Path, final: Path) -> None:
        staged.chmod(staged.parent.parent.stat().st_mode & 0o666)
        if final.parent == self.config.output_path:
            staged.replace(final)
            return
        with publish(final.parent, replace=final.parent.exists()) as place:
            for path in staged.parent.iterdir():
                shutil.copyfile(path, place / path.name)

    def _check(self, file: Path, name: str) -> str:
        """Compare what readers make of a file with what was trained; says who reads it."""
        wanted = updates_of(self.trained)
        back, _ = read_as_diffusers(file, self.base.transformer)
        require_same(file, wanted, updates_of(back), EXACT)
        if name == PEFT:
            found, dtype = self._as_peft_loads(file.parent)
            require_same(file, wanted, found, EXACT if dtype == torch.float32 else ROUNDED)
            return "PEFT loads it, with the deltas that were trained"
        if self.config.use_dora:
            return (
                "read back, it has the deltas and magnitudes that were trained (diffusers would leave the latter out)"
            )
        loaded = self._as_diffusers_loads(file)
        if loaded is None or loaded[0].keys() != wanted.keys():
            return "read back, it has the deltas that were trained (diffusers does not read all of this spelling)"
        require_same(file, wanted, loaded[0], EXACT if loaded[1] == torch.float32 else ROUNDED)
        return "diffusers loads it too, with the deltas that were trained"

    def _as_peft_loads(self, folder: Path) -> tuple[dict[str, Update], torch.dtype]:
        self.transformer.unload_lora()
        try:
            PeftModel.from_pretrained(self.transformer, folder, adapter_name=ADAPTER)
        except LOADING_FAILS as error:
            raise LorafuseError(f"PEFT does not load it ({error})") from error
        return loaded_updates(self.transformer)

    def _as_diffusers_loads(self, file: Path) -> tuple[dict[str, Update], torch.dtype] | None:
        self.transformer.unload_lora()
        with _silence(), suppress(*LOADING_FAILS):  # a spelling that it does not know
            pipeline_of(self.transformer, self.base.pipeline).load_lora_weights(
                file.parent, weight_name=file.name, adapter_name=ADAPTER, **load_arguments(self.base.component)
            )
            return loaded_updates(self.transformer)
        return None


@contextmanager
def _silence() -> Iterator[None]:
    """Within it, diffusers and PEFT say nothing of what they do not know."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def _ranks(lora: LoraFile) -> list[int]:
    return [module.shapes["down"][0] for module in lora.modules if "down" in module.shapes]


def updates_of(tensors: Mapping[str, Tensor]) -> dict[str, Update]:
    """Module -> update, of the tensors of a diffusers file; a module that it changes by nothing has none."""
    found: dict[str, Update] = {}
    for name, a in tensors.items():
        stem, is_a, _ = name.partition(".lora_A.")
        if is_a and tensors[f"{stem}.lora_B.weight"].any():
            magnitude = tensors.get(f"{stem}.lora_magnitude_vector")
            found[stem.removeprefix(PREFIX)] = Update(a, tensors[f"{stem}.lora_B.weight"], magnitude)
    return found


def loaded_updates(transformer: Any) -> tuple[dict[str, Update], torch.dtype]:
    """Module -> update, as a reader has put it into the model, and the precision that it keeps there."""
    found, dtype = {}, torch.float32
    for name, module in transformer.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
            vectors = module.lora_magnitude_vector
            magnitude = vectors[ADAPTER].weight if ADAPTER in vectors else None
            dtype = a.dtype
            if b.any():
                found[name] = Update(a, b.detach().double() * module.scaling[ADAPTER], magnitude)
    return found, dtype


def require_same(file: Path, wanted: Mapping[str, Update], found: Mapping[str, Update], tolerance: float) -> None:
    """Compare two LoRAs by what they add to each weight.

    Raises:
        LorafuseError: they are not the same, with the module that differs most.
    """
    if wanted.keys() != found.keys():
        strange = min(wanted.keys() ^ found.keys())
        raise LorafuseError(f"{file.name}: has {len(found)} modules, {len(wanted)} were trained (first: {strange})")
    gaps = {module: update_gap(wanted[module], found[module]) for module in wanted}
    worst = max(gaps, key=lambda module: gaps[module], default=None)
    if worst is not None and not gaps[worst] <= tolerance:
        raise LorafuseError(
            f"{file.name}: {worst} is not what was trained (its delta is off by {gaps[worst]:.1%} of its length)"
        )


def update_gap(wanted: Update, found: Update) -> float:
    """|b a - b' a'| / |b a| in float64, from small matrices only; inf where shapes or kinds differ.

    Of a DoRA, the larger of that and the same of its magnitudes.
    """
    (b, a), (other_b, other_a) = wanted.factors, found.factors
    if len(b) != len(other_b) or a.shape[1] != other_a.shape[1]:
        return math.inf
    gap = _length(torch.cat([b, -other_b], 1), torch.cat([a, other_a])) / max(_length(b, a), 1e-30)
    if (wanted.magnitude is None) != (found.magnitude is None):
        return math.inf
    if wanted.magnitude is not None and found.magnitude is not None:
        m, other_m = (update.detach().cpu().double().flatten() for update in (wanted.magnitude, found.magnitude))
        gap = max(gap, float((m - other_m).norm() / m.norm())) if m.shape == other_m.shape else math.inf
    return gap


def _length(b: Tensor, a: Tensor) -> float:
    """|b a| without computing b a."""
    q, p = torch.linalg.qr(b, mode="r").R, torch.linalg.qr(a.t(), mode="r").R
    return float((q @ p.t()).norm())
