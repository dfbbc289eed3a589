"""One LoRA file: its keys sorted into modules with their factors and alpha, and looked up in a base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .algebras import UNSUPPORTED
from .crossing import Namespace
from .dialects import DIALECTS, Dialect, split_key
from .errors import CheckpointError, LoraFileError, NotALoraError
from .families import FAMILIES
from .naming import Family, Layout, Parts, candidates
from .scale import AdapterConfig, read_adapter_config
from .tensorfile import TensorFile, TensorRef, is_scalar, read_header, read_scalar

OTHER_COMPONENT_PREFIXES = (
    "lora_te", "text_encoder", "base_model.model.text_encoder", "lora_llm_adapter", "llm_adapter",
    "diffusion_model.llm_adapter", "text_conditioner", "conditioner.", "connectors.", "text_embedding_projection.",
    "transformer_2.", "transformer_ref.",
)  # fmt: skip
"""How stems begin that belong to a text encoder or to another transformer of the pipeline."""


@dataclass(frozen=True, slots=True)
class LoraModule:
    """What a LoRA file holds for the weight or the bias of one module."""

    stem: str
    """The module as the file spells it."""
    parameter: str
    """`weight` or `bias`."""
    factors: Mapping[str, TensorRef]
    """Role -> tensor, without alpha."""
    alpha: float | None

    @property
    def roles(self) -> frozenset[str]:
        """The roles present, alpha included."""
        return frozenset(self.factors) | ({"alpha"} if self.alpha is not None else frozenset())


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA file whose every key is in a module, or in `unread` or `duplicates`."""

    source: TensorFile
    modules: tuple[LoraModule, ...]
    unread: tuple[str, ...]
    """Keys whose suffix is not known."""
    duplicates: tuple[str, ...]
    """Keys that give a module a role it already has."""
    config: AdapterConfig | None

    @property
    def path(self) -> Path:
        """The file."""
        return self.source.path


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA's header, its alphas and its adapter configuration; no factor is read.

    Raises:
        NotALoraError: it holds no LoRA factor.
        LoraFileError: it is missing, no safetensors file, or its scale information is broken.
    """
    if path.is_dir():
        raise LoraFileError(f"{path}: is a folder; give the LoRA's .safetensors file{_files_in(path)}")
    try:
        source = read_header(path)
    except CheckpointError as error:
        raise LoraFileError(str(error)) from error
    stems: dict[tuple[str, str], dict[str, TensorRef]] = {}
    unread, duplicates = [], []
    for key, ref in source.tensors.items():
        parted = split_key(key)
        if parted is None:
            unread.append(key)
            continue
        roles = stems.setdefault((parted.stem, parted.parameter), {})
        if parted.role in roles and parted.role not in UNSUPPORTED:
            duplicates.append(key)
        roles.setdefault(parted.role, ref)
    if not any(set(roles) - {"alpha"} for roles in stems.values()):
        raise NotALoraError(
            f"{path}: is no LoRA: none of its {len(source.tensors)} tensors is a LoRA factor"
            f"{f' (first: {unread[0]})' if unread else ''}. A full checkpoint belongs in BASE."
        )
    modules = tuple(_module(path, stem, parameter, roles) for (stem, parameter), roles in stems.items())
    config = read_adapter_config(path, source.metadata)
    return LoraFile(source, modules, tuple(unread), tuple(duplicates), config)


def _files_in(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    return f" in it: {', '.join(names[:3])}" if names else ""


def _module(path: Path, stem: str, parameter: str, roles: Mapping[str, TensorRef]) -> LoraModule:
    alpha = roles.get("alpha")
    if alpha is not None and not is_scalar(alpha):
        raise LoraFileError(f"{path}: {alpha.name} should be one number, is {alpha.dtype} {list(alpha.shape)}")
    factors = {role: ref for role, ref in roles.items() if role != "alpha"}
    return LoraModule(stem, parameter, factors, None if alpha is None else read_scalar(alpha))


@dataclass(frozen=True, slots=True)
class Match:
    """Which of a base's modules a LoRA's stems mean."""

    dialect: Dialect
    layout: str | None
    """The layout of the LoRA's names."""
    targets: Mapping[str, Target]
    """By stem; stems that no module answers to are absent."""


class Target(NamedTuple):
    """A module as its layout names it, and what its rows are."""

    module: str
    parts: Parts


def match_lora(lora: LoraFile, namespaces: Sequence[Namespace]) -> Match:
    """Spell every module of every layout in every dialect, and take the pair in which the most stems are found.

    Pairs that find the same modules are told apart by the suffixes the file uses; the base's own layout comes first.

    Raises:
        LoraFileError: two pairs find equally many but different modules.
    """
    stems = {module.stem for module in lora.modules}
    found = []
    for dialect in DIALECTS:
        style = _style(lora, dialect)
        for namespace in namespaces:
            spelled: dict[str, list[Target]] = {}
            for module, its in namespace.modules.items():
                if (stem := dialect.spell(module)) in stems:
                    spelled.setdefault(stem, []).append(Target(module, its))
            targets = {stem: answers[0] for stem, answers in spelled.items() if len(answers) == 1}
            found.append((len(targets), style, Match(dialect, namespace.layout, targets)))
    most = max(found, key=lambda row: row[:2])
    rivals = [match for count, _, match in found if count == most[0] and _parts(match) != _parts(most[2])]
    if most[0] and rivals:
        raise LoraFileError(
            f"{lora.path}: could be {most[2].dialect.name} or {rivals[0].dialect.name}: "
            f"both find {most[0]} modules, but different ones"
        )
    return most[2]


def _parts(match: Match) -> dict[str, Parts]:
    return {stem: target.parts for stem, target in match.targets.items()}


def _style(lora: LoraFile, dialect: Dialect) -> tuple[int, int]:
    """Stems with the dialect's prefix (a prefix that none has counts against it), and keys with its endings."""
    prefix = dialect.spell("")
    stems = sum(module.stem.startswith(prefix) for module in lora.modules)
    endings = tuple(dialect.roles.values())
    return (stems or -1) if prefix else 0, sum(key.endswith(endings) for key in lora.source.tensors)


def guess_dialect(lora: LoraFile) -> Dialect:
    """The dialect by prefix and suffixes alone, for a LoRA whose base is not at hand; the longest prefix wins ties."""
    return max(DIALECTS, key=lambda dialect: (*_style(lora, dialect), len(dialect.spell(""))))


def guess_families(lora: LoraFile) -> tuple[tuple[Family, Layout], ...]:
    """The families whose module names the LoRA uses, all that explain equally many."""
    prefix = guess_dialect(lora).spell("")
    names = [module.stem.removeprefix(prefix) for module in lora.modules if not is_other_component(module.stem)]
    return candidates(names, FAMILIES)


def is_other_component(stem: str) -> bool:
    """Whether a stem belongs to a text encoder or to another transformer of the pipeline."""
    return stem.startswith(OTHER_COMPONENT_PREFIXES)


def common_width(lora: LoraFile) -> int | None:
    """The commonest input width of the LoRA's A factors, in practice the model's hidden width."""
    downs = [module.factors["down"] for module in lora.modules if "down" in module.factors]
    widths = Counter(down.shape[1] for down in downs if len(down.shape) >= 2)
    return widths.most_common(1)[0][0] if widths else None
