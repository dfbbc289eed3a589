"""`--report FILE` and `lorafuse report`: one page about a fused checkpoint, made from its manifest and headers alone.

Self-contained and deterministic: no script, nothing loaded, no clock, host or path; same checkpoint, same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

from lorafuse_common import __version__
from lorafuse_common.checkpoint import Checkpoint
from lorafuse_common.errors import OutputError
from lorafuse_common.manifest import MANIFEST_NAME, Manifest

from .findings import advice, edited_tensors, findings_of, open_fused, ratio_of
from .page.by_lora import lora_by_lora
from .page.charts import schedule_chart
from .page.heatmap import gain_scale, grouped, heat_map, ratio_scale
from .page.markup import Markup, element
from .page.recipe import hero, recipe, title_of
from .page.style import STYLE
from .page.tables import after, files, single_tensors, weakest

GENERATOR = "lorafuse report"
_MARK = f'<meta name="generator" content="{GENERATOR}'


def check_report(path: Path, outside: Iterable[Path], *, force: bool) -> None:
    """Refuse, before the work of a fuse, a report that would replace something else or lie in a checkpoint.

    Raises:
        OutputError: so it is.
    """
    final = path.resolve()
    for place in outside:
        if place.resolve() == final or (place.resolve() in final.parents and not place.is_file()):
            what = "is an input" if place.is_file() else f"lies in {place}, and would go along with that"
            raise OutputError(f"{path}: {what}; choose another place for the report")
    if inside := next((folder for folder in final.parents if (folder / MANIFEST_NAME).is_file()), None):
        raise OutputError(f"{path}: lies in the fused checkpoint {inside.name}; choose another place for the report")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file in it for the report")
    if path.exists() and not force and not is_report(path):
        raise OutputError(f"{path}: exists and is no report of lorafuse; choose another name, or add --force")


def is_report(path: Path) -> bool:
    """Whether a file is a report that was written here."""
    try:
        with path.open("rb") as file:
            return _MARK.encode() in file.read(1000)
    except OSError:
        return False


def write_report(folder: Path, manifest: Manifest, path: Path) -> None:
    """Write the report on a fused folder; the file appears complete or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    from lorafuse_common.conversion.writer import publish_files

    text = report_html(manifest, open_fused(folder, manifest)).encode()

    def write(file: IO[bytes]) -> None:
        file.write(text)

    publish_files({path: write}, replace=True)


def report_html(manifest: Manifest, fused: Mapping[str | None, Checkpoint]) -> str:
    """The whole page."""
    findings = findings_of(manifest)
    edited = edited_tensors(manifest, fused)
    title = title_of(manifest)
    body = [
        hero(manifest, findings, fused, title),
        recipe(manifest, fused, edited),
        _arrival(manifest),
        lora_by_lora(manifest),
        weakest(manifest, advice(manifest, edited)),
        _schedule(manifest),
        after(manifest, fused, edited),
        files(manifest),
        element(
            "footer", f"Made by lorafuse {manifest.version} from lorafuse.json. The same inputs give the same page."
        ),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="generator", content=f"{GENERATOR} {__version__}"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    return f"<!doctype html>\n{element('html', head, element('body', element('main', *body)), lang='en')}\n"


def _arrival(manifest: Manifest) -> Markup:
    """The pictures."""
    if not manifest.changes:
        return Markup("")
    ratio = ratio_scale([ratio for change in manifest.changes if (ratio := ratio_of(change))])
    gain = gain_scale()
    parts: list[str] = [
        element("h2", "What arrived"),
        element(
            "p",
            "Each cell is a weight. The blue picture shows how large the sum of all deltas is beside it, the other the "
            "gain: how much of that sum was left after rounding, where 1 is all of it. Point at a cell for its figures "
            "or open the table below.",
            class_="soft",
        ),
    ]
    groups = grouped(manifest.changes)
    for (component, name), group in sorted(groups.items(), key=lambda entry: not entry[0][1]):  # single tensors last
        if not name:
            parts.append(single_tensors(component, group, ratio, gain))
            continue
        blocks = len({block for row in group.values() for block in row})
        where = f"{component} / {name}" if component and len({c.component for c in manifest.changes}) > 1 else name
        count = f" {blocks} block{'s' if blocks > 1 else ''}, {len(group)} kinds of weights"
        parts.append(element("h3", where, element("span", count, class_="soft")))
        parts.append(element("div", heat_map(group, ratio), heat_map(group, gain), class_="maps"))
    return element("section", *parts)


def _schedule(manifest: Manifest) -> Markup:
    if manifest.schedule is None:
        return Markup("")
    guidance = manifest.schedule.guidance_scale
    text = f"Learnt from {manifest.schedule.source}. " + (
        "To be sampled without guidance." if guidance == 1 else f"To be sampled with guidance {guidance:g}."
    )
    chart = schedule_chart(manifest.schedule)
    return element("section", element("h2", "Few-step schedule"), element("p", text), chart, class_="steps")
