"""One LoRA file: its keys sorted into modules with their factors and alpha, and looked up in a base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .algebras import UNSUPPORTED, Shape
from .crossing import Namespace
from .dialects import DIALECTS, Dialect, flatten, split_key
from .errors import CheckpointError, LoraFileError, NotALoraError
from .families import FAMILIES
from .naming import Family, Layout, Parts, candidates, narrowed
from .scale import ScaleSources, read_scale_sources
from .tensorfile import TensorFile, TensorRef, is_scalar, is_zero, read_header, read_scalar

_COMPONENTS = {
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_te": "text_encoder",
    "text_encoder_3": "text_encoder_3",
    "text_encoder_2": "text_encoder_2",
    "text_encoder": "text_encoder",
    "base_model.model.text_encoder": "text_encoder",
    "lora_llm_adapter": "text_conditioner",
    "llm_adapter": "text_conditioner",
    "diffusion_model.llm_adapter": "text_conditioner",
    "text_conditioner": "text_conditioner",
    "conditioner.": "text_encoder",
    "connectors.": "connectors",
    "text_embedding_projection.": "connectors",
    "transformer_2.": "transformer_2",
    "transformer_ref.": "transformer_ref",
    "bundle_emb.": "textual inversion",
}
"""How stems begin that belong to another component of a pipeline, and which."""

_MULTIPLIED = ("down", "up", "mid", "diff", "lokr_", "hada_")
"""How roles begin of which one that is all zero makes the delta zero."""


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
    def shapes(self) -> dict[str, Shape]:
        """Role -> shape."""
        return {role: ref.shape for role, ref in self.factors.items()}

    def is_untrained(self) -> bool:
        """Whether its delta is zero, as a factor is that the others are multiplied with; reads them."""
        return is_zero_product({role: is_zero(ref) for role, ref in self.factors.items()})


def is_zero_product(zeros: Mapping[str, bool]) -> bool:
    """Whether a delta is zero, from role -> whether that factor is all zero."""
    if "magnitude" in zeros:
        return False
    return any(zero for role, zero in zeros.items() if role.startswith(_MULTIPLIED)) or all(zeros.values())


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA file whose every key is in a module, or in `unread` or `duplicates`."""

    source: TensorFile
    modules: tuple[LoraModule, ...]
    unread: tuple[str, ...]
    """Keys whose suffix is not known."""
    duplicates: tuple[str, ...]
    """Keys that give a module a role it already has."""
    scale_sources: ScaleSources

    @property
    def path(self) -> Path:
        """The file."""
        return self.source.path


def read_lora(path: Path, component: str | None = None) -> LoraFile:
    """Read a LoRA's header, its alphas and its adapter configuration; no factor is read.

    `component` is the transformer that it is read for, where a pipeline has several.

    Raises:
        NotALoraError: it holds no LoRA factor.
        LoraFileError: it is missing, no safetensors file, or its scale information is broken.
    """
    try:
        source = read_header(path)
    except CheckpointError as error:
        raise LoraFileError(str(error)) from error
    scale_sources = read_scale_sources(path, source.metadata, component or "transformer")
    stems: dict[tuple[str, str], dict[str, TensorRef]] = {}
    unread, duplicates = [], []
    for key, ref in source.tensors.items():
        parted = split_key(key) or scale_sources.split_saved(key)
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
    modules = tuple(_module(path, key, stems) for key in stems)
    return LoraFile(source, modules, tuple(unread), tuple(duplicates), scale_sources)


def _module(path: Path, key: tuple[str, str], stems: Mapping[tuple[str, str], Mapping[str, TensorRef]]) -> LoraModule:
    stem, parameter = key
    roles = stems[key]
    if "up_bias" in roles:  # scaled as the weight is, so it needs the weight's alpha and rank
        weight = stems.get((stem, "weight"), {})
        roles = {**roles, **{role: weight[role] for role in ("alpha", "down") if role in weight}}
    alpha = roles.get("alpha")
    if alpha is not None and not is_scalar(alpha):
        raise LoraFileError(f"{path}: {alpha.name} should be one number, is {alpha.dtype} {list(alpha.shape)}")
    # A `reshape_weight` says to which shape a weight is widened; A and B have that shape anyway.
    factors = {role: ref for role, ref in roles.items() if role not in ("alpha", "reshape_weight")}
    return LoraModule(stem, parameter, factors, None if alpha is None else read_scalar(alpha))


class Target(NamedTuple):
    """A module as its layout names it, and what its rows are."""

    module: str
    parts: Parts


@dataclass(frozen=True, slots=True)
class Match:
    """Which of a base's modules a LoRA's stems mean."""

    dialect: Dialect
    """The one that spells the most of them."""
    layout: str | None
    """The layout of most of the LoRA's names."""
    targets: Mapping[str, Target]
    """By stem; stems that no module answers to are absent."""
    ambiguous: Mapping[str, str] = field(default_factory=dict)
    """Stem -> the two modules that answer equally well."""


class _Answer(NamedTuple):
    dialect: Dialect
    namespace: Namespace
    target: Target


def match_lora(lora: LoraFile, namespaces: Sequence[Namespace], component: str | None = None) -> Match:
    """Look every stem up in every dialect and layout; each takes the answer of the pair in which the most are found.

    Pairs that find equally many are told apart by the suffixes the file uses; the base's own layout comes first.
    A stem to which only another pair answers takes that. `component` is the pipeline's folder that is looked at.
    """
    stems = {
        module.stem: _own_name(module.stem, component)
        for module in lora.modules
        if owner_of(module.stem, lora, component) != "transformer"
    }
    answers = _answers(stems, namespaces)
    counts = Counter((a.dialect.name, a.namespace.layout) for found in answers.values() for a in found)
    styles = {dialect.name: _style(lora, dialect) for dialect in DIALECTS}

    def standing(answer: _Answer) -> tuple[int, tuple[int, int]]:
        return counts[answer.dialect.name, answer.namespace.layout], styles[answer.dialect.name]

    everything = [answer for found in answers.values() for answer in found]
    if not everything:
        return Match(guess_dialect(lora), None, {})
    targets, ambiguous = {}, {}
    for stem, found in answers.items():
        best = max(found, key=standing)
        targets[stem] = best.target
        rivals = [a for a in found if standing(a)[0] == standing(best)[0] and a.target.parts != best.target.parts]
        if rivals:
            told = [f"{a.dialect.name}'s {a.target.module}" for a in (best, rivals[0])]
            ambiguous[stem] = f"{' or '.join(told)}, and as many modules speak for the one as for the other"
    top = max(everything, key=standing)
    return Match(top.dialect, top.namespace.layout, targets, ambiguous)


def _answers(stems: Mapping[str, str], namespaces: Sequence[Namespace]) -> dict[str, list[_Answer]]:
    """Every stem that some dialect spells in some namespace -> all its meanings; `stems` maps to what is looked up."""
    tables = [(namespace, *_tables(namespace)) for namespace in namespaces]
    answers: dict[str, list[_Answer]] = {}
    for dialect in DIALECTS:
        tails = [(stem, tail) for stem, own in stems.items() for tail in dialect.tails(own)]
        for namespace, dotted, flat in tables:
            table = flat if dialect.flat else dotted
            for stem, tail in tails:
                if target := table.get(tail):
                    answers.setdefault(stem, []).append(_Answer(dialect, namespace, target))
    return answers


def _tables(namespace: Namespace) -> tuple[dict[str, Target | None], dict[str, Target | None]]:
    """The namespace's modules by name, and by name with underscores (None where two modules flatten alike)."""
    dotted: dict[str, Target | None] = {m: Target(m, its) for m, its in namespace.modules.items()}
    flat: dict[str, Target | None] = {}
    for module, target in dotted.items():
        flat[flatten(module)] = None if flatten(module) in flat else target
    return dotted, flat


def _style(lora: LoraFile, dialect: Dialect) -> tuple[int, int]:
    """Stems with the dialect's prefix (a prefix that none has counts against it), and keys with its endings."""
    prefixes = tuple(filter(None, dialect.prefixes))
    stems = sum(module.stem.startswith(prefixes) for module in lora.modules) if "" not in dialect.prefixes else 0
    endings = (*dialect.roles.values(), *dialect.endings)
    score = sum(key.endswith(endings) for key in lora.source.tensors)
    return (stems or (0 if "" in dialect.prefixes else -1)), score


def guess_dialect(lora: LoraFile) -> Dialect:
    """The dialect by prefix and suffixes alone, for a LoRA whose base is not at hand; the longest prefix wins ties."""
    return max(DIALECTS, key=lambda dialect: (*_style(lora, dialect), len(dialect.prefixes[0])))


def guess_families(lora: LoraFile, *, by_size: bool = True) -> tuple[tuple[Family, Layout], ...]:
    """The families whose module names the LoRA uses, all that explain equally many.

    Families that share their names are told apart, where possible, by the width of the LoRA's factors and the number
    of its blocks; not `by_size`, those that only the names allow are all given.
    """
    dialect = guess_dialect(lora)
    ours = [module.stem for module in lora.modules if component_of(module.stem) is None]
    names = {tail for stem in ours for tail in dialect.tails(stem)}
    tied = candidates(names, FAMILIES)
    return narrowed(tied, common_width(lora), 1 + last_block(ours)) if by_size else tied


def last_block(names: Iterable[str]) -> int:
    """The highest number between the words of some names."""
    return max((int(n) for name in names for n in re.findall(r"(?<=[a-z][._])\d+(?=[._][a-z])", name)), default=0)


def component_of(stem: str) -> str | None:
    """The other component of a pipeline that a stem says it belongs to; None where it says nothing."""
    return next((component for prefix, component in _COMPONENTS.items() if stem.startswith(prefix)), None)


def owner_of(stem: str, lora: LoraFile, component: str | None) -> str | None:
    """The other component that a stem belongs to, while `component` is looked at; None where it may be this one's.

    diffusers writes the LoRAs of both of Wan 2.2's experts into one file, as `transformer.` and `transformer_2.`.
    """
    if component not in (None, "transformer"):
        if stem.startswith(f"{component}."):
            return None
        if stem.startswith("transformer.") and any(m.stem.startswith(f"{component}.") for m in lora.modules):
            return "transformer"
    return component_of(stem)


def _own_name(stem: str, component: str | None) -> str:
    """A stem as it would be for a pipeline's only transformer, without torch.compile's wrapper."""
    stem = stem.replace("_orig_mod.", "")
    if component not in (None, "transformer") and stem.startswith(f"{component}."):
        return f"transformer.{stem.removeprefix(f'{component}.')}"
    return stem


def common_width(lora: LoraFile) -> int | None:
    """The commonest input width of the LoRA's A factors, in practice the model's hidden width."""
    downs = [module.factors["down"] for module in lora.modules if "down" in module.factors]
    widths = Counter(down.shape[1] for down in downs if len(down.shape) >= 2)
    return widths.most_common(1)[0][0] if widths else None
