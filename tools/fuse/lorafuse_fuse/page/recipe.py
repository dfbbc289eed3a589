"""The head of the report: verdict, most important numbers, and a card each for base, LoRAs and result."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from lorafuse_common.checkpoint import Checkpoint, Form
from lorafuse_common.families import FAMILIES
from lorafuse_common.manifest import FusedLora, Manifest, Parent, Role
from lorafuse_common.tensorfile import TensorRef
from lorafuse_fuse.choices import ProblemKind
from lorafuse_fuse.commands import base_text, number
from lorafuse_fuse.findings import WEAK_GAIN, Findings, components_of
from lorafuse_fuse.progress import size_text

from .heatmap import percent
from .markup import Markup, element, joined

_REASONS = {
    ProblemKind.UNREAD_KEY: "keys whose suffix is not known",
    ProblemKind.DUPLICATE_KEY: "keys that give a factor twice",
    ProblemKind.DUPLICATE_MODULE: "modules that change rows that another changes",
    ProblemKind.OTHER_COMPONENT: "modules of another component",
    ProblemKind.NO_SUCH_MODULE: "modules that this model does not have",
    ProblemKind.AMBIGUOUS_MODULE: "modules whose names could be two of this model",
    ProblemKind.INCOMPLETE_MODULE: "modules of which factors are missing",
    ProblemKind.UNKNOWN_ALGEBRA: "modules of a kind that cannot be fused",
    ProblemKind.SHAPE_MISMATCH: "modules of other shapes",
    ProblemKind.UNEDITABLE_DTYPE: "modules for weights that cannot be edited",
    ProblemKind.SCALE_CONFLICT: "modules with two scales",
    ProblemKind.NOT_FINITE: "modules that hold NaN or Inf",
    ProblemKind.ALREADY_FUSED: "files that are fused already",
}


def title_of(manifest: Manifest) -> str:
    """`Qwen-Image + lightning + style at 0.8`."""
    return " + ".join([_family(manifest), *(f"{_short(lora)}{_at(lora.strength)}" for lora in manifest.loras)])


def _family(manifest: Manifest) -> str:
    titles = [family.title for family in FAMILIES if family.name == manifest.family]
    return titles[0] if titles else "A model of no known family"


def _short(lora: FusedLora) -> str:
    return lora.name.removesuffix(".safetensors")


def _at(strength: float) -> str:
    return "" if strength == 1 else f" at {number(strength)}"


def hero(manifest: Manifest, findings: Findings, fused: Mapping[str | None, Checkpoint], title: str) -> Markup:
    """The title, the verdict and the most important numbers."""
    forms = {base.form for base in fused.values()}
    facts = ["fused checkpoint", *([f"{manifest.layout} layout"] if manifest.layout else [])]
    facts += [] if forms <= {Form.MODEL} and len(manifest.outputs) == 1 else sorted(form.value for form in forms)
    tiles = [
        _tile(f"{findings.applied} / {findings.modules}", "modules fused", warn=findings.applied < findings.modules),
        _tile(str(len(manifest.changes)), "tensors changed"),
        _tile(percent(findings.ratio) if findings.ratio is not None else "-", "delta/weight, median"),
        _tile(f"{findings.gain:.3f}" if findings.gain is not None else "-", "gain, median"),
        _tile(str(len(findings.weak)), f"tensors with a gain below {WEAK_GAIN:g}", warn=bool(findings.weak)),
        _tile(size_text(findings.nbytes), "of weights"),
    ]
    return element(
        "header",
        element("h1", title),
        element("p", ", ".join(facts), class_="soft"),
        element("p", _verdict(manifest, findings), class_="verdict"),
        element("div", *tiles, class_="tiles"),
        element("p", "identity ", element("span", manifest.fused_sha256, class_="mono"), class_="soft"),
    )


def _tile(value: str, label: str, *, warn: bool = False) -> Markup:
    return element("div", element("b", value), element("span", label), class_="tile warn" if warn else "tile")


def _verdict(manifest: Manifest, findings: Findings) -> str:
    if not manifest.changes:
        return "No tensor was changed."
    if not findings.weak:
        least = min(manifest.changes, key=lambda change: change.gain)
        count = len(manifest.changes)
        return f"Everything arrived: the weakest of {count} tensors kept {_share(least.gain)} of its delta."
    worst = findings.weak[0]
    share = len(findings.weak) / len(manifest.changes)
    how = "Most of it did not arrive" if share > 0.5 else "Not all of it arrived"
    return (
        f"{how}: rounding took more than 5 % of the delta in {len(findings.weak)} of {len(manifest.changes)} tensors, "
        f"and left {_share(worst.gain)} in the weakest. What to do is said below."
    )


def _share(gain: float) -> str:
    return f"{100 * max(gain, 0):.3g} %"


def _list(entries: Sequence[tuple[str, str]]) -> Markup:
    return element("dl", *(joined([element("dt", name), element("dd", text)]) for name, text in entries if text))


def recipe(manifest: Manifest, fused: Mapping[str | None, Checkpoint], edited: Collection[TensorRef]) -> Markup:
    """The base, the LoRAs, and how the result is stored."""
    base = [
        ("model", _family(manifest)),
        ("layout", manifest.layout or ""),
        ("transformer", ", ".join(component for component in components_of(manifest) if component)),
        ("on the hub", manifest.origin.uri if manifest.origin else ""),
        ("files", f"{len(manifest.base)}, {size_text(sum(record.size for record in manifest.base))}"),
        ("was fused", _lineage(manifest.parent)),
    ]
    dtypes = sorted({ref.dtype for ref in edited})
    total = sum(len(base.tensors) for base in fused.values())
    stored = [
        (
            "changed",
            f"{len(manifest.changes)}{f' of {total}' if total else ''} tensors; the rest is the base, byte for byte",
        ),
        ("stored as", ", ".join(dtypes) + (" (--dtype)" if manifest.dtype else ", as before" if dtypes else "")),
        ("rounded", "to the nearest" if manifest.seed is None else f"stochastically, seed {manifest.seed}"),
        ("let pass", ", ".join(manifest.allowed)),
        ("role", "scaffold: dropped at inference" if manifest.role is Role.SCAFFOLD else ""),
    ]
    name = base_text(manifest)
    several = len(components_of(manifest)) > 1
    cards = [
        _card("base", _family(manifest) if name == "BASE" else name, _list(base)),
        *(_lora(lora, with_component=several) for lora in manifest.loras),
        _card("result", "Fused checkpoint", _list(stored)),
    ]
    return element("section", element("h2", "Recipe"), element("div", *cards, class_="cards"))


def _card(role: str, title: str, *content: str) -> Markup:
    return element("div", element("span", role, class_="role"), element("h3", title), *content, class_="card")


def _lineage(parent: Parent | None) -> str:
    found: list[str] = []
    while parent:
        names = ", ".join(f"{lora.name}{_at(lora.strength)}" for lora in parent.loras)
        found.append(f"from {parent.fused_sha256[:12]} with {names}" if not found else f"before that with {names}")
        parent = parent.parent
    return "; ".join(found).replace("from ", "as ", 1)


def _lora(lora: FusedLora, *, with_component: bool) -> Markup:
    facts = [
        ("strength", number(lora.strength)),
        ("scale", lora.scale or "-"),
        ("alpha", f"{number(lora.alpha)} (--alpha)" if lora.alpha else ""),
        ("spelling", lora.dialect),
        ("into", lora.component or "" if with_component else ""),
        ("modules", f"{lora.applied} of {lora.modules} fused"),
        ("on the hub", lora.origin.uri if lora.origin else ""),
        ("size", size_text(lora.size)),
    ]
    share = 100 * lora.applied / lora.modules if lora.modules else 100
    kinds = {kind.value: text for kind, text in _REASONS.items()}
    left = [
        element("li", f"{count} {kinds[reason]} left out ({reason})", class_="warn")
        if reason in kinds
        else element("li", f"{count} rightly left out: {reason}")
        for reason, count in lora.ignored.items()
    ]
    left += [element("li", note, class_="warn") for note in lora.notes]
    bar = element("span", element("i", style=f"width:{share:.1f}%"), class_="bar")
    remarks = element("ul", *left, class_="plain") if left else Markup("")
    return _card("LoRA", _short(lora), bar, _list(facts), remarks)
