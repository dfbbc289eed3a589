"""The report: well-formed, self-contained, true to the manifest, safe with any name, and the same every time."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from builders import MODULES, make_factors, save_model, tiny_transformer, write_lora
from safetensors.torch import load_file, save_file

from lorafuse_common.dialects.comfy import COMFY
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.manifest import MANIFEST_NAME, Manifest, TensorChange, read_manifest
from lorafuse_fuse.commands import fuse_command
from lorafuse_fuse.findings import advice, edited_tensors, findings_of, open_fused
from lorafuse_fuse.html_report import report_html
from lorafuse_fuse.page.heatmap import exact, gain_scale, percent, position_of, ratio_scale
from lorafuse_fuse.page.style import STYLE
from lorafuse_fuse.report import describe_result

Run = Callable[..., tuple[int, str, str]]
VOID = {"meta", "wbr"}


class Page(HTMLParser):
    """A page that was read strictly: every element closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest
    return manifest


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_model(tmp_path / "base")


@pytest.fixture
def faint(tmp_path: Path) -> Path:
    """A LoRA so small that bf16 takes most of it in some modules."""
    factors = make_factors(size=0.02)
    smaller = {module: (down, up * (0.05 if module == MODULES[1] else 1)) for module, (down, up) in factors.items()}
    return write_lora(tmp_path / "faint.safetensors", smaller, LIGHTNING, 2.0)


@pytest.fixture
def page(run: Run, tmp_path: Path, base: Path, faint: Path) -> Path:
    code, _, err = run("fuse", base, "--lora", faint, "--out", tmp_path / "out", "--report", tmp_path / "page.html")
    assert code == 0, err
    assert f"report {tmp_path / 'page.html'}" in err
    return tmp_path / "page.html"


def test_well_formed_and_self_contained(page: Path) -> None:
    found = read(page)
    assert found.tags[0] == "html"
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & set(found.tags)
    names = {name for name, _ in found.attributes}
    assert not {name for name in names if name in ("href", "src", "srcset", "xlink:href") or name.startswith("on")}
    assert not re.search(r"url\(|@import|https?:|@font-face", page.read_text())
    used = {name for key, value in found.attributes if key == "class" for name in (value or "").split()}
    assert used - set(re.findall(r"\.([a-z]\w*)", STYLE)) <= {"plain"}


def test_the_page_and_the_manifest_agree(tmp_path: Path, page: Path) -> None:
    """Every changed tensor is in both pictures and in the table, with the manifest's own figures."""
    manifest, found = manifest_of(tmp_path / "out"), read(page)
    figures = re.compile(r"(.+): delta/weight (.+?), gain (.+), loss (.+), weight (.+), delta (.+)")
    for change in manifest.changes:
        shown = [
            match for text in found.texts["title"] if (match := figures.fullmatch(text)) and match[1] == change.name
        ]
        assert len(shown) >= 2
        for match in shown:
            assert [float(text) for text in match.groups()[2:]] == [
                change.gain, change.loss, change.weight_rms, change.delta_rms,
            ]  # fmt: skip
            assert float(match[2].removesuffix(" %")) == pytest.approx(
                100 * change.delta_rms / change.weight_rms, rel=5e-3
            )
        rows = [row for row in found.texts["tr"] if row.startswith(change.name)]
        assert rows
        assert f"{change.gain:g}{change.loss:g}" in rows[0]
    values = found.texts["b"]
    assert values[:2] == ["5 / 5", "5"]
    weak = [change for change in manifest.changes if change.gain < 0.95]
    assert 0 < len(weak) < 5
    assert values[4] == str(len(weak))
    assert f"in {len(weak)} of 5 tensors" in found.texts["p"][1]
    assert manifest.fused_sha256 in found.texts["main"][0]
    for record in (*manifest.base, *manifest.outputs):
        assert any(record.path in row and record.sha256 in row for row in found.texts["tr"])


def test_same_inputs_same_page(run: Run, tmp_path: Path, base: Path, faint: Path, page: Path) -> None:
    """From another place, into another folder, now or later; and it tells nothing of where it was made."""
    (tmp_path / "deep" / "down").mkdir(parents=True)
    moved, again = tmp_path / "deep" / "down" / "base", tmp_path / "deep" / "other.html"
    base.rename(moved)
    code, _, err = run("fuse", moved, "--lora", faint, "--out", tmp_path / "deep" / "x", "--report", again)
    assert code == 0, err
    assert again.read_bytes() == page.read_bytes()
    assert str(tmp_path) not in page.read_text()
    later = tmp_path / "later.html"
    assert run("report", tmp_path / "out", "--out", later)[0] == 0
    assert later.read_bytes() == page.read_bytes()
    page.unlink()
    code, _, err = run("fuse", moved, "--lora", faint, "--out", tmp_path / "deep" / "x", "--report", page)
    assert code == 0
    assert "up to date" in err
    assert page.read_bytes() == again.read_bytes()


def test_the_report_is_no_part_of_the_checkpoint(run: Run, tmp_path: Path, base: Path, faint: Path, page: Path) -> None:
    assert run("fuse", base, "--lora", faint, "--out", tmp_path / "plain")[0] == 0
    assert (tmp_path / "plain" / MANIFEST_NAME).read_bytes() == (tmp_path / "out" / MANIFEST_NAME).read_bytes()
    for place in (tmp_path / "out" / "x.html", base / "x.html", base / "sub" / "x.html", faint, tmp_path / "out"):
        before = place.read_bytes() if place.is_file() else None
        code, _, err = run("fuse", base, "--lora", faint, "--out", tmp_path / "new", "--report", place, "--force")
        assert code == 1, place
        assert not (tmp_path / "new").exists(), place
        assert (place.read_bytes() if place.is_file() else None) == before
    code, _, err = run("report", tmp_path / "out", "--out", tmp_path / "out" / "y.html")
    assert code == 1
    assert "would go along with that" in err
    assert page.exists()


def test_what_is_replaced(run: Run, tmp_path: Path, page: Path) -> None:
    """A report, but nothing else without --force; and nothing is left beside it."""
    out = tmp_path / "out"
    page.write_text(page.read_text() + "<!-- stale -->")
    assert run("report", out, "--out", page)[0] == 0
    assert "stale" not in page.read_text()
    other = tmp_path / "thesis.html"
    other.write_text("<!doctype html><title>my thesis</title>")
    code, _, err = run("report", out, "--out", other)
    assert code == 1
    assert "is no report of lorafuse" in err
    assert "thesis" in other.read_text()
    assert run("report", out, "--out", other, "--force")[0] == 0
    assert other.read_bytes() == page.read_bytes()
    assert run("report", out, "--out", tmp_path)[0] == 1
    assert run("report", tmp_path / "base", "--out", page)[0] == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_hostile_names(run: Run, tmp_path: Path) -> None:
    """Names of tensors and files are text, whatever they spell; control characters are shown, not sent."""
    evil = '"><svg onload=alert(1)>.0.</style><script>&amp;\x1b[31m\u202e'
    weight = torch.randn(8, 8).bfloat16()
    save_file({f"{evil}.weight": weight, "plain.weight": weight.clone()}, tmp_path / "base.safetensors")
    name = "<img src=x onerror=alert(2)> & 'co'.safetensors"
    save_file({f"{evil}.lora_A.weight": torch.randn(2, 8), f"{evil}.lora_B.weight": torch.randn(8, 2)}, tmp_path / name)
    command = ("fuse", tmp_path / "base.safetensors", "--lora", tmp_path / name, "--out", tmp_path / "out")
    code, _, err = run(*command, "--report", tmp_path / "page.html")
    assert code == 0, err
    assert "\x1b" not in err
    text, found = (tmp_path / "page.html").read_text(), read(tmp_path / "page.html")
    assert not {"script", "img"} & set(found.tags)
    assert found.tags.count("style") == 1
    assert not {key for key, _ in found.attributes if key.startswith("on")}
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<img src=x onerror=alert(2)> & 'co'" in found.texts["h1"][0]
    assert any('"><svg onload=alert(1)>.0.</style><script>&amp;\\x1b[31m\\u202e' in row for row in found.texts["tr"])
    shown = next(text for text in found.texts["pre"] if text.startswith("lorafuse fuse"))
    assert shlex.split(shown.replace("\\\n", ""))[4] == name


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--dtype", "float32"),
        ("--rounding", "stochastic", "--seed", "7", "--schedule", "1,0.9,0.75,0.5"),
        ("--alpha", "style.safetensors=1.25", "--allow", "NO_SUCH_MODULE"),
    ],
    ids=" ".join,
)
def test_the_command_shown_gives_the_same_again(
    run: Run, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    write_lora(tmp_path / "fast.safetensors", make_factors(), LIGHTNING, 2.0, {"author": "x"})
    tensors = load_file(write_lora(tmp_path / "style.safetensors", make_factors(MODULES[:2], 3, 2), COMFY))
    if "--allow" in options:
        stem = "diffusion_model.nowhere.to_q"
        tensors |= {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "style.safetensors")
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.html"
    loras = ("--lora", "fast.safetensors", "--lora", "style.safetensors:-0.30000000000000004")
    code, _, err = run("fuse", base, *loras, *options, "--out", "out", "--report", page)
    assert code == 0, err
    shown = next(text for text in read(page).texts["pre"] if text.startswith("lorafuse fuse"))
    words = shlex.split(shown.replace("\\\n", "").replace("BASE", str(base)).replace("FUSED", "again"))
    code, _, err = run(*words[1:])
    assert code == 0, err
    assert (tmp_path / "again" / MANIFEST_NAME).read_bytes() == (tmp_path / "out" / MANIFEST_NAME).read_bytes()


def test_components_in_the_command_shown(tmp_path: Path, page: Path) -> None:
    manifest = manifest_of(tmp_path / "out")
    lora = manifest.loras[0]
    second = replace(manifest, component="transformer_2", loras=(replace(lora, component="transformer_2"),))
    assert "--lora faint.safetensors \\\n  --component transformer_2" in fuse_command(second)
    both = replace(manifest, loras=(replace(lora, component="transformer"), replace(lora, component="transformer_2")))
    assert "--lora faint.safetensors@transformer \\\n  --lora faint.safetensors@transformer_2" in fuse_command(both)


def test_what_was_not_applied(run: Run, tmp_path: Path, base: Path) -> None:
    """Problems that were let pass, what is rightly left out, and what is unusual, each with its words."""
    lora = write_lora(tmp_path / "odd.safetensors", make_factors(), COMFY, 100.0)
    stem = "diffusion_model.nowhere.to_q"
    extra = {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(4, 2)}
    te = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    extra |= {f"{te}.lora_down.weight": torch.ones(2, 4), f"{te}.lora_up.weight": torch.zeros(4, 2)}
    save_file(load_file(lora) | extra, lora)
    command = ("fuse", base, "--lora", lora, "--out", tmp_path / "out", "--allow", "NO_SUCH_MODULE")
    code, _, err = run(*command, "--report", tmp_path / "page.html")
    assert code == 0, err
    items = read(tmp_path / "page.html").texts["li"]
    assert "1 modules that this model does not have left out (NO_SUCH_MODULE)" in items
    assert any(item.startswith("1 rightly left out: untrained modules of the text_encoder") for item in items)
    assert any("scale of 25 is unusually large" in item for item in items)
    values = read(tmp_path / "page.html").texts["b"]
    assert values[0] == "5 / 6"


def test_advice(tmp_path: Path, page: Path) -> None:
    """What helps depends on how the tensors are stored, on the strengths and on the chain."""
    out = tmp_path / "out"
    manifest = manifest_of(out)
    edited = edited_tensors(manifest, open_fused(out, manifest))
    assert {ref.dtype for ref in edited} == {"BF16"}
    found = [its.what for its in advice(manifest, edited)]
    assert found == ["--dtype float32", "Fuse further LoRAs in the same command", "A higher strength"]
    more = sum(2 * ref.numel for ref in edited)
    assert f"{more / 1e6:.1f} MB more" in advice(manifest, edited)[0].why
    assert found == re.findall(
        r"(--dtype float32|Fuse further[^:]+command|A higher strength)", " ".join(read(page).texts["li"])
    )
    fp8 = tuple(replace(ref, dtype="F8_E4M3") for ref in edited)
    assert advice(manifest, fp8)[0].what == "Fuse into the bf16 checkpoint of this model"
    wide = tuple(replace(ref, dtype="F32") for ref in edited)
    assert "--dtype float32" not in {its.what for its in advice(manifest, wide)}
    low = replace(manifest, loras=(replace(manifest.loras[0], strength=0.5),))
    assert advice(low, edited)[-1].what == "A higher strength for faint.safetensors"
    fine = replace(manifest, changes=tuple(replace(change, gain=0.96) for change in manifest.changes))
    assert advice(fine, edited) == ()
    assert "What to do" not in report_html(fine, {})


def test_chains_and_schedules_are_told(run: Run, tmp_path: Path, base: Path, faint: Path) -> None:
    style = write_lora(tmp_path / "style.safetensors", make_factors(), COMFY)
    assert run("fuse", base, "--lora", faint, "--out", tmp_path / "one", "--schedule", "1,0.75,0.5")[0] == 0
    page = tmp_path / "page.html"
    code, _, err = run(
        "fuse", tmp_path / "one", "--lora", f"{style}:0.001", "--out", tmp_path / "two", "--report", page
    )
    assert code == 0, err
    found = read(page)
    assert any("faint.safetensors" in text and text.startswith("as ") for text in found.texts["dd"])
    assert "Few-step schedule" in found.texts["h2"]
    assert "3 steps from noise (1) to picture (0)" in found.texts["text"]
    assert {"1", "0.75", "0.5", "0"} <= set(found.texts["title"])
    assert any("into the original base in one command" in item for item in found.texts["li"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("transformer_blocks.12.attn.to_q.weight", ("transformer_blocks", 12, "attn.to_q")),
        ("model.double_blocks.0.img_attn.qkv.bias", ("model.double_blocks", 0, "img_attn.qkv.bias")),
        ("blocks.3.ffn.0.weight", ("blocks", 3, "ffn.0")),
        ("0.weight", ("", 0, "0")),
        ("proj_out.weight", ("", 0, "proj_out")),
        ("time_embedding.2.weight", ("", 0, "time_embedding.2")),
    ],
)  # fmt: skip
def test_positions(name: str, expected: tuple[str, int, str]) -> None:
    assert position_of(TensorChange(name, None, 1, 1, 0, 1))[1:] == expected


def test_colours() -> None:
    """Each figure has the colour that the legend says, at the borders too; both themes have all colours."""
    gain = gain_scale()
    assert [gain.shade(g) for g in (1.0, 0.99, 0.97, 0.95, 0.9499, 0.9, 0.8, 0.5, 0.1, -1.0, 1.2)] == [
        "g0", "g0", "g1", "g2", "w0", "w0", "w1", "w2", "w3", "w3", "over",
    ]  # fmt: skip
    changes = [TensorChange("x", None, 1.0, ratio, 0, 1) for ratio in (0.001, 0.01, 0.1, 0.0)]
    ratio = ratio_scale([0.001, 0.01, 0.1])
    assert [ratio.shade(ratio.of(change)) for change in changes] == ["s0", "s3", "s6", "none"]
    assert ratio.legend[0] == ("s0", "0.1 %")
    assert ratio_scale([0.01]).shade(0.01) == "s0"
    assert ratio_scale([]).of(TensorChange("x", None, 0.0, 0.01, 0, 1)) is None
    light, dark = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[:2]
    assert set(re.findall(r"(--\w+):", light)) == set(re.findall(r"(--\w+):", dark))
    assert percent(0.0135) == "1.35 %"
    assert (
        exact(TensorChange("x", None, 0.0, 0.5, 0.25, 1)) == "x: delta/weight -, gain 1, loss 0.25, weight 0, delta 0.5"
    )


def test_a_fuse_without_changes_has_a_page(tmp_path: Path, page: Path) -> None:
    manifest = replace(manifest_of(tmp_path / "out"), changes=(), loras=(), family=None, layout=None)
    found = Page(report_html(manifest, {}))
    assert found.texts["h1"] == ["A model of no known family"]
    assert "No tensor was changed." in found.texts["p"]


def test_the_result_in_words(run: Run, tmp_path: Path, page: Path, base: Path, faint: Path) -> None:
    """One line that greps well, and what to do beside what went wrong; the same figures as on the page."""
    manifest = manifest_of(tmp_path / "out")
    found = findings_of(manifest)
    text = describe_result(manifest, 61.04)
    line = text.splitlines()[0]
    assert re.fullmatch(
        r"lorafuse: fused 5/5 modules of 1 LoRA into 5 tensors, gain median \d\.\d{3}, \d tensors below 0\.95, "
        r"\d+\.\d MB, 61\.0 s",
        line,
    )
    assert f"gain median {found.gain:.3f}, {len(found.weak)} tensors below 0.95" in line
    assert read(page).texts["b"][3] == f"{found.gain:.3f}"
    least = min(manifest.changes, key=lambda change: change.gain)
    assert f"{len(found.weak)} tensors kept less than 95 % of their delta" in text
    assert f"(least: {least.gain:.2g} in {least.name})" in text
    code, out, err = run("fuse", base, "--lora", faint, "--out", tmp_path / "again", "--json")
    assert code == 0
    assert "--dtype float32: stores the changed tensors without that loss" in err
    assert err.isprintable() or all(char.isprintable() or char == "\n" for char in err)
    gains = sorted(change["gain"] for change in json.loads(out)["changes"])
    assert f"gain median {gains[2]:.3f}" in err


def test_sizes_are_those_of_the_fused_transformers(run: Run, tmp_path: Path) -> None:
    root = tmp_path / "pipeline"
    save_model(root / "transformer")
    save_model(root / "transformer_2")
    (root / "model_index.json").write_text("{}")
    lora = write_lora(tmp_path / "x.safetensors", make_factors(), LIGHTNING)
    assert run("fuse", root, "--lora", lora, "--out", tmp_path / "out")[0] == 0
    nbytes = findings_of(manifest_of(tmp_path / "out")).nbytes
    assert nbytes == (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert nbytes > sum(2 * param.numel() for param in tiny_transformer().parameters())


def test_several_loras_have_a_picture_each(tmp_path: Path, run: Run) -> None:
    """With the figures of each alone; one LoRA has none, for the sum is its own."""
    base = save_model(tmp_path / "base")
    one = write_lora(tmp_path / "one.safetensors", make_factors(), LIGHTNING, 2.0)
    two = write_lora(tmp_path / "two.safetensors", make_factors(MODULES[:2], seed=2), LIGHTNING, 2.0)
    heading = "LoRA by LoRA"
    for loras, shown in (((one,), 0), ((one, two), 1)):
        out = tmp_path / f"out{len(loras)}"
        code, _, err = run("fuse", base, *(f"--lora={path}" for path in loras), "--out", out)
        assert code == 0, err
        manifest = read_manifest(out)
        assert manifest
        text = report_html(manifest, open_fused(out, manifest))
        assert text.count(heading) == shown
        if shown:
            part = text[text.index(heading) :]
            assert part.index("one.safetensors") < part.index("two.safetensors")
            assert "5 tensors, median delta/weight" in part
            assert "2 tensors, median delta/weight" in part
        Page(text)
