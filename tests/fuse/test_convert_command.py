"""`lorafuse convert` as its users run it: what it asks for, what it refuses, what it says and leaves on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from builders import make_factors, save_model, write_lora
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from table_models import DIALECT, Run, draw, files_in, refused

from lorafuse_common.conversion import spelling, writable, writer
from lorafuse_common.tensorfile import read_header
from lorafuse_fuse import cli

TO_Q, TO_K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"


@pytest.fixture
def convert(run: Run) -> Run:
    return lambda *args: run("convert", *args)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora.safetensors", make_factors(), DIALECT["lightning"], 2.0)


def test_what_it_says(convert: Run, tmp_path: Path, lora: Path) -> None:
    out = tmp_path / "new" / "out.safetensors"
    code, stdout, err = convert(lora, "--to", "comfyui", "--out", out, "--json", "--family", "qwen_image")
    assert code == 0, err
    assert "lightning (diffusers names) -> comfyui (diffusers names): 5 modules read, 5 written\n" in err
    assert err.endswith(f"{out}: 0.0 MB, written\n")
    facts = json.loads(stdout)
    assert (facts["family"], facts["bytes"], facts["up_to_date"]) == ("qwen_image", out.stat().st_size, False)
    assert facts["to"] == {"dialect": "comfyui", "layout": "diffusers", "modules": 5}
    before = out.stat().st_mtime_ns
    code, _, err = convert(lora, "--to", "comfyui", "--out", out, "--family", "qwen_image")
    assert (code, out.stat().st_mtime_ns) == (0, before)
    assert "is up to date" in err
    assert files_in(tmp_path) == ["lora.safetensors", "new/out.safetensors"]
    code, stdout, _ = convert(lora, "--to", "peft", "--out", out, "--json")
    assert code == 1
    assert "exists with other content" in json.loads(stdout)["error"]


def test_the_help_names_every_dialect() -> None:
    command = typer.main.get_command(cli.app).commands["convert"]  # type: ignore[attr-defined]
    text = next(parameter.help for parameter in command.params if parameter.name == "to")
    assert all(dialect.name in text for dialect in writable())


def test_scales_and_header(convert: Run, tmp_path: Path) -> None:
    """A scale of every origin becomes the dialect's own; what the header says of others stays."""
    factors = {TO_Q: (draw("A", 4, 8).bfloat16(), draw("B", 6, 4).bfloat16())}
    adapter = {"transformer.r": 4, "transformer.lora_alpha": 3, "transformer.use_rslora": True}
    header = {
        "lora_adapter_metadata": json.dumps(adapter),
        "ss_network_alpha": "6",
        "ss_network_dim": "4",
        "sshs_model_hash": "of other bytes",
        "modelspec.title": "kept",
    }
    source = write_lora(tmp_path / "a.safetensors", factors, DIALECT["diffusers"], None, header)
    out = {name: tmp_path / name / "adapter_model.safetensors" for name in ("diffusers", "kohya", "comfyui", "peft")}
    for name, path in out.items():
        assert convert(source, "--to", name, "--out", path, "--family", "qwen_image")[0] == 0
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "modelspec.title": "kept"}
    a, b = factors[TO_Q]
    baked = load_file(out["diffusers"])[f"transformer.{TO_Q}.lora_B.weight"]  # 3 / sqrt(4)
    assert baked.dtype == torch.float32
    assert baked.equal(b.float() * 1.5)
    kohya = load_file(out["kohya"])
    assert kohya.pop("lora_unet_transformer_blocks_0_attn_to_q.alpha") == 6
    assert [value.dtype for value in kohya.values()] == [torch.bfloat16] * 2
    assert load_file(out["comfyui"])[f"diffusion_model.{TO_Q}.alpha"] == 6
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config.get("use_rslora", False)) == (4, 6, False)
    assert load_file(out["peft"])[f"base_model.model.{TO_Q}.lora_A.weight"].equal(a)


@pytest.mark.parametrize(("alpha", "dtype"), [(2.0, torch.bfloat16), (4.0, torch.bfloat16), (3.0, torch.float32)])
def test_baked_scales_are_exact(convert: Run, tmp_path: Path, alpha: float, dtype: torch.dtype) -> None:
    factors = {TO_Q: (draw("A", 4, 8).bfloat16(), draw("B", 6, 4).bfloat16())}
    source = write_lora(tmp_path / "a.safetensors", factors, DIALECT["lightning"], alpha)
    assert convert(source, "--to", "diffusers", "--out", tmp_path / "b.safetensors")[0] == 0
    b = load_file(tmp_path / "b.safetensors")[f"transformer.{TO_Q}.lora_B.weight"]
    assert b.dtype == dtype
    assert b.double().equal(factors[TO_Q][1].double() * (alpha / 4))


def test_same_bytes(convert: Run, tmp_path: Path, lora: Path) -> None:
    for name in ("a", "b"):
        out = tmp_path / name / "adapter_model.safetensors"
        assert convert(lora, "--to", "peft", "--out", out)[0] == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_file_as_safetensors_would_write_it(convert: Run, tmp_path: Path) -> None:
    """Every tensor begins where its dtype may, and metadata are sorted."""
    factors = {TO_Q: (draw("A", 1, 3).bfloat16(), draw("B", 5, 1).bfloat16())}
    header = {"z": "1", "a": "2", "m": "3"}
    source = write_lora(tmp_path / "a.safetensors", factors, DIALECT["lightning"], 0.7, header)
    assert convert(source, "--to", "diffusers", "--out", tmp_path / "b.safetensors")[0] == 0
    file = read_header(tmp_path / "b.safetensors")
    assert [ref.dtype for ref in file.tensors.values()] == ["F32", "BF16"]
    assert list(file.metadata) == ["a", "format", "m", "z"]
    assert file.data_start % 8 == 0


def test_outputs_that_exist(convert: Run, tmp_path: Path, lora: Path) -> None:
    other = tmp_path / "b" / "other.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"other")
    assert "with other content" in refused(convert, tmp_path, lora, "--to", "diffusers", "--out", other)
    assert convert(lora, "--to", "diffusers", "--out", other, "--force")[0] == 0
    assert other.stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "adapter_config.json").write_text("{}")
    peft = tmp_path / "c" / "adapter_model.safetensors"
    err = refused(convert, tmp_path, lora, "--to", "peft", "--out", peft)
    assert "adapter_config.json: exists with other content" in err
    assert convert(lora, "--to", "peft", "--out", peft, "--force")[0] == 0


def test_outputs_that_are_refused(convert: Run, tmp_path: Path, lora: Path) -> None:
    base = save_model(tmp_path / "base") / "diffusion_pytorch_model.safetensors"
    (tmp_path / "link.safetensors").symlink_to(lora)
    os.link(lora, tmp_path / "same.safetensors")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    (tmp_path / "folder.safetensors").mkdir()
    for out, why in [
        (lora, "is the input"),
        (tmp_path / "link.safetensors", "is the input"),
        (tmp_path / "same.safetensors", "is the input"),
        (base, "is the input"),
        (tmp_path / "folder.safetensors", "is a folder"),
        (tmp_path / "out", "expected the name of a .safetensors file"),
        (tmp_path / "peft" / "x.safetensors", "beside an adapter_config.json, which states the scale of another"),
        (lora / "x.safetensors", "cannot be written"),
    ]:
        assert why in refused(
            convert, tmp_path, lora, "--to", "diffusers", "--out", out, "--base", base.parent, "--force"
        )
    err = refused(convert, tmp_path, lora, "--to", "peft", "--out", tmp_path / "x.safetensors", "--force")
    assert f"Give it a folder of its own: {tmp_path / 'x' / 'adapter_model.safetensors'}" in err


def test_nothing_is_left_of_a_failure(
    convert: Run, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(spelling, "write_tensors", full)
        err = refused(convert, tmp_path, lora, "--to", "diffusers", "--out", tmp_path / "x.safetensors")
    assert f"{tmp_path / 'x.safetensors'}: cannot be written: No space left on device" in err

    def touch(*args: object) -> None:
        os.utime(lora)
        write(*args)  # type: ignore[arg-type]

    write = writer.write_tensors
    monkeypatch.setattr(spelling, "write_tensors", touch)
    err = refused(convert, tmp_path, lora, "--to", "diffusers", "--out", tmp_path / "x.safetensors")
    assert "changed while being read" in err


def test_a_lora_that_vanishes(convert: Run, tmp_path: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vanish(*_: object) -> None:
        lora.unlink()

    monkeypatch.setattr(spelling, "check_out", vanish)
    code, _, err = convert(lora, "--to", "diffusers", "--out", tmp_path / "x.safetensors")
    assert code == 1
    assert "lora.safetensors: cannot be read: No such file or directory" in err
    assert files_in(tmp_path) == []


def test_what_a_killed_run_left_is_removed(convert: Run, tmp_path: Path, lora: Path) -> None:
    """Its lock went with it; that of a run which still writes is left alone, as are other files."""
    out = tmp_path / "out.safetensors"
    dead, other = tmp_path / ".out.safetensors.0123abcd.tmp", tmp_path / ".out.safetensors.x.tmp"
    dead.write_bytes(b"half")
    other.write_bytes(b"mine")
    with writer.temporary_beside(out) as file:
        assert not dead.exists()
        code, _, err = convert(lora, "--to", "diffusers", "--out", out)
        assert code == 0, err
        assert Path(file.name).exists()
    assert files_in(tmp_path) == [".out.safetensors.x.tmp", "lora.safetensors", "out.safetensors"]


def test_a_run_that_is_killed_in_the_middle(tmp_path: Path, lora: Path) -> None:
    out = tmp_path / "out.safetensors"
    program = (
        "import os, signal; from lorafuse_common.conversion import writer; from pathlib import Path\n"
        f"with writer.temporary_beside(Path({str(out)!r})) as file: os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(".out.safetensors.*.tmp")
    with writer.temporary_beside(out):
        assert not left.exists()
    assert files_in(tmp_path) == ["lora.safetensors"]
