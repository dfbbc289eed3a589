"""The command as its users run it: forms in and out, refusals, repeats, JSON, and what is left on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import MODULES, make_factors, save_model, tiny_transformer, write_lora, write_sparse
from safetensors import safe_open
from safetensors.torch import load_file

from lorafuse_common import hashing
from lorafuse_common.dialects.diffsynth import DIFFSYNTH
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.errors import ConfigError
from lorafuse_common.manifest import read_manifest, verify_manifest
from lorafuse_fuse import asking, carry, edit, execute, stream
from lorafuse_fuse.choices import Components, LoraRequest

Run = Callable[..., tuple[int, str, str]]


def pipeline(root: Path) -> Path:
    """A pipeline folder as far as a fuse looks at one."""
    save_model(root / "transformer", sharded=True)
    save_model(root / "transformer_2", seed=1)
    (root / "vae").mkdir()
    (root / "vae" / "model.safetensors").write_bytes(b"v" * 1000)
    (root / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    (root / ".cache").mkdir()
    (root / ".cache" / "lock").write_text("")
    return root


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora.safetensors", make_factors(), LIGHTNING, 2.0)


def hashes(root: Path) -> dict[str, str]:
    """Of every file by name, but for the LoRAs that are kept."""
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    found = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {name: digest for name, digest in found.items() if not name.startswith("lorafuse/loras/")}


def test_pipeline_folder(run: Run, tmp_path: Path, lora: Path) -> None:
    base = pipeline(tmp_path / "base")
    before = hashes(base)
    code, out, err = run("fuse", base, "--lora", f"{lora}:0.5", "--out", tmp_path / "out")
    assert (code, out) == (0, ""), err
    after = hashes(tmp_path / "out")
    assert hashes(base) == before
    assert set(after) == set(before) - {".cache/lock"} | {"lorafuse.json"}
    weights = {name for name in before if name.startswith("transformer/") and name.endswith(".safetensors")}
    assert len(weights) > 2
    assert all(after[name] == before[name] for name in set(after) - weights - {"lorafuse.json"})
    manifest = read_manifest(tmp_path / "out")
    assert manifest
    assert (manifest.component, manifest.family) == ("transformer", "qwen_image")
    assert {record.path: record.sha256 for record in manifest.base} == {n: before[n] for n in manifest_names(before)}
    assert {record.path: record.sha256 for record in manifest.outputs} == {
        name: digest for name, digest in after.items() if name != "lorafuse.json"
    }
    assert manifest.loras[0].sha256 == hashlib.sha256(lora.read_bytes()).hexdigest()
    assert (manifest.loras[0].strength, manifest.loras[0].scale) == (0.5, "alpha/rank = 0.5")


def manifest_names(files: dict[str, str]) -> list[str]:
    return [name for name in files if not name.startswith(".")]


def test_linked_components_and_other_weights(run: Run, tmp_path: Path, lora: Path) -> None:
    """Folders behind links are carried over; unfused weights beside the fused ones are not."""
    base = pipeline(tmp_path / "base")
    (base / "vae").rename(tmp_path / "elsewhere")
    (base / "vae").symlink_to(tmp_path / "elsewhere")
    (base / "loop").symlink_to(base)
    for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"):
        (base / "transformer" / name).write_bytes(b"unfused")
    (base / "transformer" / "diffusion_pytorch_model.fp16.safetensors.index.json").write_text("{}")
    (base / "qwen.safetensors").write_bytes(b"unfused")
    code, _, err = run("fuse", base, "--lora", lora, "--out", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "out" / "vae" / "model.safetensors").read_bytes() == b"v" * 1000
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.read_bytes() == b"unfused"] == []
    assert "fp16.safetensors" in err
    assert run("fuse", base, "--lora", lora, "--out", tmp_path / "out")[0] == 0


def test_another_component(run: Run, tmp_path: Path, lora: Path) -> None:
    base = pipeline(tmp_path / "base")
    code, _, err = run("fuse", base, "--lora", lora, "--out", tmp_path / "out", "--component", "transformer_2")
    assert code == 0, err
    before, after = hashes(base), hashes(tmp_path / "out")
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"transformer_2/diffusion_pytorch_model.safetensors", "lorafuse.json"}
    code, _, err = run("fuse", base, "--lora", lora, "--out", tmp_path / "o", "--component", "unet")
    assert code == 1
    assert "['transformer', 'transformer_2', 'vae']" in err


def test_single_file_with_a_prefix(run: Run, tmp_path: Path, lora: Path) -> None:
    from safetensors.torch import save_file

    weights = {f"model.diffusion_model.{k}": v.clone() for k, v in tiny_transformer().state_dict().items()}
    save_file(weights | {"vae.x": torch.ones(3)}, tmp_path / "all in one.safetensors", metadata={"author": "me"})
    code, _, err = run("fuse", tmp_path / "all in one.safetensors", "--lora", lora, "--out", tmp_path / "out")
    assert code == 0, err
    assert "Qwen-Image, diffusers layout" in err
    fused = load_file(tmp_path / "out" / "all in one.safetensors")
    with safe_open(tmp_path / "out" / "all in one.safetensors", "pt") as opened:
        assert opened.metadata()["author"] == "me"
        assert json.loads(opened.metadata()["lorafuse"])["loras"][0]["name"] == "lora.safetensors"
    changed = {name for name, value in fused.items() if name == "vae.x" or not torch.equal(value, weights[name])}
    assert changed == {f"model.diffusion_model.{module}.weight" for module in MODULES} | {"vae.x"}
    assert torch.equal(fused["vae.x"], torch.ones(3))


def test_second_run_does_nothing_and_other_inputs_are_refused(run: Run, tmp_path: Path, lora: Path) -> None:
    base = save_model(tmp_path / "base")
    args = ("fuse", base, "--lora", lora, "--out", tmp_path / "out")
    assert run(*args)[0] == 0
    stamp = (tmp_path / "out" / "lorafuse.json").stat().st_mtime_ns
    code, out, err = run(*args, "--json")
    assert code == 0
    assert "up to date" in err
    assert json.loads(out)["up_to_date"] is True
    assert (tmp_path / "out" / "lorafuse.json").stat().st_mtime_ns == stamp
    code, _, err = run("fuse", base, "--lora", f"{lora}:0.9", "--out", tmp_path / "out")
    assert code == 1
    assert "other inputs" in err
    write_lora(lora, make_factors(seed=9), LIGHTNING, 2.0)  # same name, same size, other content
    assert run(*args)[0] == 1
    assert run(*args, "--force")[0] == 0
    assert run(*args)[0] == 0
    (tmp_path / "out" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    code, _, err = run(*args)
    assert code == 1
    assert "does not match its lorafuse.json" in err
    assert run(*args, "--force")[0] == 0
    assert run(*args)[0] == 0
    broken = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    intact = broken.read_bytes()
    broken.write_bytes(intact[:-1] + b"?")  # same size: found by its hash under --force, which mends it
    assert run(*args, "--force")[0] == 0
    assert broken.read_bytes() == intact


def test_same_inputs_same_bytes(run: Run, tmp_path: Path, lora: Path) -> None:
    base = pipeline(tmp_path / "base")
    for name in ("one", "two"):
        assert run("fuse", base, "--lora", lora, "--out", tmp_path / name)[0] == 0
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert str(tmp_path) not in (tmp_path / "one" / "lorafuse.json").read_text()


def test_outputs_that_would_touch_an_input(run: Run, tmp_path: Path, lora: Path) -> None:
    base = save_model(tmp_path / "base")
    before = hashes(base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    (tmp_path / "link").symlink_to(base)
    for out, says in {
        base: "is or lies inside the base",
        base / "fused": "is or lies inside the base",
        tmp_path / "link": "is or lies inside the base",
        tmp_path: "holds the input",
        tmp_path / "full": "is no fused checkpoint",
        tmp_path / "x.safetensors": "names a folder",
    }.items():
        for force in ((), ("--force",)):
            code, _, err = run("fuse", base, "--lora", lora, "--out", out, *force)
            assert code == 1, out
            assert says in err
    assert hashes(base) == before
    assert (tmp_path / "full" / "precious").exists()


def test_dry_run_of_a_40_gb_base(run: Run, tmp_path: Path) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for block in range(60):
        for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            shapes[f"transformer_blocks.{block}.attn.{part}.weight"] = (3072, 3072)
        for part in ("img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "txt_mlp.net.0.proj"):
            shapes[f"transformer_blocks.{block}.{part}.weight"] = (18432 if "mod" in part else 12288, 3072)
    write_sparse(tmp_path / "qwen.safetensors", shapes)
    factors = {name.removesuffix(".weight"): (torch.ones(1, i), torch.ones(o, 1)) for name, (o, i) in shapes.items()}
    write_lora(tmp_path / "l.safetensors", factors, LIGHTNING, 0.5)
    started = time.monotonic()
    code, out, _ = run(
        "fuse", tmp_path / "qwen.safetensors", "--lora", tmp_path / "l.safetensors", "--out", tmp_path / "o",
        "--dry-run", "--json",
    )  # fmt: skip
    seconds = time.monotonic() - started
    report = json.loads(out)
    assert code == 0
    assert report["output_bytes"] > 30e9
    assert (report["targets"], report["loras"][0]["modules"], report["loras"][0]["applied"]) == (720, 720, 720)
    assert report["problems"] == []
    assert report["peak_memory_bytes"] < 1 << 30
    assert seconds < 20  # a sanity bound far above the second it takes, for a busy machine
    assert not (tmp_path / "o").exists()


def test_json_lists_problems_and_fails(run: Run, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    write_lora(tmp_path / "x.safetensors", {"nowhere": (torch.ones(2, 48), torch.ones(48, 2))}, DIFFSYNTH)
    code, out, err = run("fuse", base, "--lora", tmp_path / "x.safetensors", "--out", tmp_path / "o", "--json")
    report = json.loads(out)
    assert code == 1
    assert [problem["kind"] for problem in report["problems"]] == ["NO_SUCH_MODULE", "NO_EFFECT"]
    assert report["loras"][0]["ignored"] == {"NO_SUCH_MODULE": 1}
    assert report["error"] in err
    assert "Traceback" not in err


def test_allowed_problems_are_recorded(run: Run, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    factors = {**make_factors(), "text_encoder.q": (torch.ones(2, 48), torch.ones(48, 2))}
    write_lora(tmp_path / "x.safetensors", factors, DIFFSYNTH)
    args = ("fuse", base, "--lora", tmp_path / "x.safetensors", "--out", tmp_path / "o")
    assert run(*args)[0] == 1
    code, _, err = run(*args, "--allow", "OTHER_COMPONENT")
    manifest = read_manifest(tmp_path / "o")
    assert code == 0
    assert "OTHER_COMPONENT pass" in err
    assert manifest
    assert manifest.allowed == ("OTHER_COMPONENT",)
    assert (manifest.loras[0].modules, manifest.loras[0].applied) == (len(MODULES), len(MODULES))
    assert manifest.loras[0].ignored == {"OTHER_COMPONENT": 1}


def test_large_files_of_other_components_are_linked_or_copied(
    run: Run, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = pipeline(tmp_path / "base")
    monkeypatch.setattr(carry, "SMALL_BYTES", 100)
    monkeypatch.setattr(carry, "reflink", lambda source, target: False)
    assert run("fuse", base, "--lora", lora, "--out", tmp_path / "out")[0] == 0
    linked = tmp_path / "out" / "vae" / "model.safetensors"
    assert linked.is_symlink()
    assert not linked.readlink().is_absolute()
    assert linked.read_bytes() == b"v" * 1000
    assert not (tmp_path / "out" / "model_index.json").is_symlink()
    assert run("fuse", base, "--lora", lora, "--out", tmp_path / "copy", "--components", "copy")[0] == 0
    assert not (tmp_path / "copy" / "vae" / "model.safetensors").is_symlink()
    assert hashes(tmp_path / "copy") == hashes(tmp_path / "out")


def test_reflinks_fall_back(tmp_path: Path) -> None:
    """Whatever this file system can do, the file arrives."""
    (tmp_path / "a").write_bytes(b"a" * (carry.SMALL_BYTES + 1))
    carry.carry(tmp_path / "a", tmp_path / "b", tmp_path / "b", Components.LINK)
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


@pytest.mark.parametrize(
    ("owner", "name"),
    [(execute, "_pass"), (edit.Editor, "change"), (stream.Stream, "_put"), (stream.Stream, "_finish")],
)
def test_an_error_while_writing_leaves_nothing(
    run: Run, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    """In the main thread and in those that edit, write and hash."""
    base = save_model(tmp_path / "base", sharded=True)
    before = hashes(base)
    calls, original = iter(range(100)), getattr(owner, name)

    def failing(*args: object) -> object:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(owner, name, failing)
    code, _, err = run("fuse", base, "--lora", lora, "--out", tmp_path / "out")
    assert code == 1
    assert "No space left on device" in err
    assert hashes(base) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "lora.safetensors"]


def test_too_little_space_is_seen_before(run: Run, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "free_bytes", lambda folder: 1000)
    code, _, err = run("fuse", save_model(tmp_path / "base"), "--lora", lora, "--out", tmp_path / "out")
    assert code == 1
    assert "0.0 MB free" in err


def test_an_input_that_changes_meanwhile(run: Run, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_model(tmp_path / "base")

    def touching(*args: object) -> object:
        lora.touch()
        return passing(*args)  # type: ignore[arg-type]

    passing = execute._pass
    monkeypatch.setattr(execute, "_pass", touching)
    code, _, err = run("fuse", base, "--lora", lora, "--out", tmp_path / "out")
    assert code == 1
    assert "changed while being read" in err
    assert not (tmp_path / "out").exists()


def test_chains_remember_their_parents(run: Run, tmp_path: Path, lora: Path) -> None:
    base = save_model(tmp_path / "base")
    assert run("fuse", base, "--lora", lora, "--out", tmp_path / "one", "--schedule", "1,0.5")[0] == 0
    style = write_lora(tmp_path / "style.safetensors", make_factors(seed=3), DIFFSYNTH)
    assert run("fuse", tmp_path / "one", "--lora", style, "--out", tmp_path / "two")[0] == 0
    first, second = read_manifest(tmp_path / "one"), read_manifest(tmp_path / "two")
    assert first
    assert second
    assert second.parent
    assert (second.parent.fused_sha256, second.parent.loras) == (first.fused_sha256, first.loras)
    assert second.schedule == first.schedule
    assert second.schedule
    assert second.schedule.sigmas == (1.0, 0.5)
    verify_manifest(tmp_path / "two", second, hashes=True)


def test_a_fused_base_must_be_what_its_manifest_says(run: Run, tmp_path: Path, lora: Path) -> None:
    assert run("fuse", save_model(tmp_path / "base"), "--lora", lora, "--out", tmp_path / "one")[0] == 0
    save_model(tmp_path / "other", seed=7)
    (tmp_path / "other" / "diffusion_pytorch_model.safetensors").replace(
        tmp_path / "one" / "diffusion_pytorch_model.safetensors"
    )
    code, _, err = run("fuse", tmp_path / "one", "--lora", f"{lora}:0.5", "--out", tmp_path / "two")
    assert code == 1
    assert "changed after it was fused" in err
    assert not (tmp_path / "two").exists()


def test_schedules(run: Run, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    stated = {"few_step_schedule": json.dumps({"sigmas": [1.0, 0.75], "guidance_scale": 1.0})}
    path = write_lora(tmp_path / "x.safetensors", make_factors(), LIGHTNING, 2.0, metadata=stated)
    args = ("fuse", base, "--lora", path, "--out")
    assert run(*args, tmp_path / "a")[0] == 0
    assert run(*args, tmp_path / "b", "--schedule", "none")[0] == 0
    a, b = read_manifest(tmp_path / "a"), read_manifest(tmp_path / "b")
    assert a
    assert a.schedule
    assert (a.schedule.sigmas, a.schedule.source) == ((1.0, 0.75), "x.safetensors")
    assert b
    assert b.schedule is None
    for wrong in ("0.5,1", "2,1", "abc", "", "1,0"):
        code, _, err = run(*args, tmp_path / "c", "--schedule", wrong)
        assert code == 1
        assert "is no schedule" in err


def test_strengths(tmp_path: Path) -> None:
    (tmp_path / "odd:2").write_text("")
    assert asking.parse_lora("a b/x.safetensors:-0.5") == LoraRequest(Path("a b/x.safetensors"), -0.5)
    assert asking.parse_lora("a/x.safetensors") == LoraRequest(Path("a/x.safetensors"), 1.0)
    assert asking.parse_lora(str(tmp_path / "odd:2")) == LoraRequest(tmp_path / "odd:2", 1.0)
    for wrong in ("x.safetensors:strong", "x.safetensors:nan", "x.safetensors:1e9"):
        with pytest.raises(ConfigError, match="strength"):
            asking.parse_lora(wrong)


@pytest.mark.parametrize("flag", ["--lora", "--lora_fused", "--lora-fused"])
def test_flags_of_diffsynth_users(run: Run, tmp_path: Path, lora: Path, flag: str) -> None:
    base = save_model(tmp_path / "base")
    assert run("fuse", base, flag, lora, "--out", tmp_path / "out", "--dry-run")[0] == 0


@pytest.mark.parametrize("name", ["absent", "empty", "model.ckpt"])
def test_bases_that_are_none(run: Run, tmp_path: Path, lora: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.ckpt").write_bytes(b"")
    code, out, err = run("fuse", tmp_path / name, "--lora", lora, "--out", tmp_path / "out", "--json")
    assert code == 1
    assert str(tmp_path / name) in err
    assert str(tmp_path / name) in json.loads(out)["error"]
    assert "Traceback" not in err


def test_shards_must_match_their_index(run: Run, tmp_path: Path, lora: Path) -> None:
    base = save_model(tmp_path / "base", sharded=True)
    index = base / "diffusion_pytorch_model.safetensors.index.json"
    good = json.loads(index.read_text())
    name = next(iter(good["weight_map"]))
    for wrong, says in {
        "../x.safetensors": "outside its folder",
        "absent.safetensors": "are missing",
        sorted(set(good["weight_map"].values()) - {good["weight_map"][name]})[0]: "does not agree",
    }.items():
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {name: wrong}}))
        code, _, err = run("fuse", base, "--lora", lora, "--out", tmp_path / "out")
        assert code == 1
        assert says in err


def test_inspect(run: Run, tmp_path: Path, lora: Path) -> None:
    base = save_model(tmp_path / "base")
    assert run("fuse", base, "--lora", lora, "--out", tmp_path / "out")[0] == 0
    facts = json.loads(run("inspect", lora, "--json")[1])
    assert (facts["kind"], facts["dialect"], facts["family"]) == ("lora", "lightning", ["qwen_image"])
    assert (facts["ranks"], facts["scales"]) == ({"4": len(MODULES)}, {"alpha/rank = 0.5": len(MODULES)})
    facts = json.loads(run("inspect", base, "--json")[1])
    assert (facts["kind"], facts["family"], facts["layout"]) == ("checkpoint", "qwen_image", "diffusers")
    assert facts["parameters"] == sum(p.numel() for p in tiny_transformer().parameters())
    facts = json.loads(run("inspect", tmp_path / "out", "--json")[1])
    assert (facts["kind"], facts["loras"][0]["name"]) == ("fused checkpoint", "lora.safetensors")
    code, out, _ = run("inspect", tmp_path / "out")
    assert code == 0
    assert "lora.safetensors x 1: lightning" in out
    assert run("inspect", tmp_path / "absent")[0] == 1
    (tmp_path / "adapter_config.json").write_text("{}")  # a LoRA with a broken side file is no checkpoint
    code, _, err = run("inspect", lora)
    assert code == 1
    assert "adapter_config.json is no LoRA configuration" in err


def test_a_repeat_hashes_nothing_again(run: Run, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_RACY_NS", -(10**18))
    base = pipeline(tmp_path / "base")
    assert run("fuse", base, "--lora", lora, "--out", tmp_path / "out")[0] == 0
    monkeypatch.setattr(hashlib, "sha256", None)
    assert run("fuse", base, "--lora", lora, "--out", tmp_path / "out")[0] == 0
