"""`verify` finds what is wrong with a fused checkpoint: a byte, a file, another input, a sum that is not the sum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import MODULES, make_factors, save_model, tiny_transformer, write_lora
from safetensors.torch import load_file, save_file

from lorafuse_common import hashing
from lorafuse_common.dialects.comfy import COMFY
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.manifest import MANIFEST_NAME, FileRecord, Manifest, dump_manifest, read_manifest
from lorafuse_common.tensorfile import read_header
from lorafuse_fuse import deviation

Run = Callable[..., tuple[int, str, str]]
EDITED, UNTOUCHED = f"{MODULES[0]}.weight", "norm_out.linear.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pipeline folder as far as a fuse looks at one."""
    root = tmp_path / "base"
    save_model(root / "transformer", sharded=True)
    (root / "vae").mkdir()
    (root / "vae" / "model.safetensors").write_bytes(b"v" * 1000)
    (root / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    return root


@pytest.fixture
def loras(tmp_path: Path) -> tuple[Path, Path]:
    fast = write_lora(tmp_path / "fast.safetensors", make_factors(), LIGHTNING, 2.0)
    return fast, write_lora(tmp_path / "style.safetensors", make_factors(MODULES[:2], 3, 2), COMFY)


@pytest.fixture
def out(run: Run, tmp_path: Path, base: Path, loras: tuple[Path, Path]) -> Path:
    code, _, err = run("fuse", base, "--lora", loras[0], "--lora", f"{loras[1]}:0.5", "--out", tmp_path / "out")
    assert code == 0, err
    return tmp_path / "out"


def faults(run: Run, *args: object) -> list[tuple[str, str]]:
    """Kind and subject of what `verify` finds; its status, its text and its JSON agree."""
    code, text, err = run("verify", *args, "--json")
    found = json.loads(text)
    assert (code, found["good"]) == ((1, False) if found["faults"] else (0, True)), err
    assert err.count("\nfault  ") == len(found["faults"])
    assert all(f"{fault['kind']}: {fault['subject']}: {fault['detail']}" in err for fault in found["faults"])
    return [(fault["kind"], fault["subject"]) for fault in found["faults"]]


def holder(out: Path, tensor: str) -> Path:
    """The weight file of a fused folder that a tensor is in."""
    return next(path for path in sorted(out.rglob("*.safetensors")) if b'"' + tensor.encode() in path.read_bytes())


def flip(path: Path, tensor: str, bit: int = 0, element: int = 5) -> str:
    """Change one bit of one bf16 number; the file's name within its fused folder."""
    ref, raw = read_header(path).tensors[tensor], bytearray(path.read_bytes())
    raw[ref.start + 2 * element] ^= 1 << bit
    path.write_bytes(raw)
    return f"{path.parent.name}/{path.name}"


def record_again(out: Path) -> Manifest:
    """Make the manifest's hashes those of the files, as if a wrong fuse had written them."""
    manifest = read_manifest(out)
    assert manifest
    contents = {record.path: (out / record.path).read_bytes() for record in manifest.outputs}
    records = tuple(FileRecord(p, hashlib.sha256(raw).hexdigest(), len(raw)) for p, raw in contents.items())
    manifest = replace(manifest, outputs=records)
    (out / MANIFEST_NAME).write_text(dump_manifest(manifest))
    return manifest


def test_good(run: Run, base: Path, loras: tuple[Path, Path], out: Path) -> None:
    """In any order of the LoRAs, with strengths or without; and what it says is what float64 gives."""
    assert faults(run, out) == []
    assert faults(run, out, "--base", base, "--lora", loras[1]) == []
    code, text, err = run(
        "verify", out, "--base", base, "--lora", f"{loras[1]}:0.5", "--lora", loras[0], "--deep", "--json"
    )
    assert code == 0, err
    assert err.splitlines()[-1] == f"lorafuse: verified {out}: good"
    found = json.loads(text)
    before = {k: v for path in (base / "transformer").glob("*.safetensors") for k, v in load_file(path).items()}
    after = {k: v for path in (out / "transformer").glob("*.safetensors") for k, v in load_file(path).items()}
    assert {row["name"] for row in found["deviations"]} == {f"{module}.weight" for module in MODULES}
    assert found["untouched"] == len(before) - len(MODULES)
    parts = [(make_factors(), 0.5), (make_factors(MODULES[:2], 3, 2), 0.5)]  # alpha 2 of rank 4, and strength 0.5
    for row in found["deviations"]:
        module = row["name"].removesuffix(".weight")
        exact = before[row["name"]].double()
        for factors, scale in parts:
            if module in factors:
                exact += scale * factors[module][1].double() @ factors[module][0].double()
        apart = (after[row["name"]].double() - exact).abs()
        assert row["absolute"] == pytest.approx(float(apart.max()), rel=1e-3)
        steps = apart / torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)  # bf16 has 7 bits after the first
        assert row["ulps"] == pytest.approx(float(steps.max()), abs=2e-3)
        assert 0.4 < row["ulps"] <= row["limit"] == 0.5


@pytest.mark.parametrize("tensor", [EDITED, UNTOUCHED])
def test_one_bit(run: Run, base: Path, loras: tuple[Path, Path], out: Path, tensor: str) -> None:
    name = flip(holder(out, tensor), tensor)
    assert faults(run, out) == [("SHA256", name)]
    kind = "DEVIATION" if tensor == EDITED else "UNTOUCHED"
    inputs = ("--base", base, "--lora", loras[0], "--lora", loras[1])
    assert faults(run, out, *inputs, "--deep") == [("SHA256", name), (kind, tensor)]
    record_again(out)  # the manifest now says that this is right
    assert faults(run, out, *inputs) == []
    assert faults(run, out, *inputs, "--deep") == [(kind, tensor)]


def test_hashes_are_computed_not_remembered(run: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_RACY_NS", 0)
    path = holder(out, EDITED)
    flip(path, EDITED)
    manifest = read_manifest(out)
    assert manifest
    record = next(record for record in manifest.outputs if out / record.path == path)
    hashing.remember({path: record.sha256})
    assert hashing.sha256_of(path) == record.sha256  # the memory is wrong
    assert [kind for kind, _ in faults(run, out)] == ["SHA256"]
    assert hashing.sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()  # and was put right


def test_all_faults_at_once(run: Run, tmp_path: Path, base: Path, out: Path) -> None:
    (out / "vae" / "model.safetensors").unlink()
    (out / "model_index.json").write_text('{"_class_name":  "QwenImagePipeline"}')
    (out / "transformer" / "config.json").write_bytes((base / "transformer" / "config.json").read_bytes()[::-1])
    (out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").rename(tmp_path / "index")
    assert faults(run, out)[:4] == [
        ("SIZE", "model_index.json"),
        ("SHA256", "transformer/config.json"),
        ("MISSING", "transformer/diffusion_pytorch_model.safetensors.index.json"),
        ("MISSING", "vae/model.safetensors"),
    ]


def test_another_base(run: Run, base: Path, loras: tuple[Path, Path], out: Path) -> None:
    path = holder(base, UNTOUCHED)
    flip(path, UNTOUCHED)
    (base / "vae" / "model.safetensors").write_bytes(b"w" * 1000)
    expected = [("OTHER_BASE", f"base transformer/{path.name}"), ("OTHER_BASE", "base vae/model.safetensors")]
    assert faults(run, out, "--base", base) == expected
    code, _, err = run("verify", out, "--base", base, "--lora", loras[0], "--lora", loras[1], "--deep")
    assert code == 1
    assert "not done: it would compare with other inputs" in err
    code, _, err = run("verify", out, "--base", base / "nowhere")
    assert code == 1
    assert "no such file or folder" in err
    assert faults(run, out, "--base", path) == [("OTHER_BASE", str(path))]


def test_other_loras(run: Run, tmp_path: Path, base: Path, loras: tuple[Path, Path], out: Path) -> None:
    fast, style = loras
    assert faults(run, out, "--lora", f"{fast}:0.9", "--lora", style) == [("OTHER_STRENGTH", fast.name)]
    assert faults(run, out, "--lora", f"{fast}:0.5", "--lora", f"{style}:1") == [  # swapped
        ("OTHER_STRENGTH", fast.name),
        ("OTHER_STRENGTH", style.name),
    ]
    (tmp_path / "other").mkdir()
    other = write_lora(tmp_path / "other" / style.name, make_factors(MODULES[:2], 3, 7), COMFY)
    assert faults(run, out, "--lora", other) == [("OTHER_LORA", str(other))]
    _, _, err = run("verify", out, "--lora", other)
    assert "is none of the LoRAs that were fused" in err
    assert "the one of this name has sha256" in err
    assert faults(run, out, "--base", base, "--lora", fast, "--lora", other, "--deep") == [
        ("OTHER_LORA", style.name),
        ("OTHER_LORA", str(other)),
    ]
    assert faults(run, out, "--lora", f"{fast}@transformer_2") == [("OTHER_LORA", str(fast))]
    assert faults(run, out, "--lora", tmp_path / "gone.safetensors") == [
        ("OTHER_LORA", str(tmp_path / "gone.safetensors"))
    ]


def test_what_deep_needs(run: Run, base: Path, loras: tuple[Path, Path], out: Path) -> None:
    """The base, and the LoRAs where they are not kept in the folder."""
    assert run("verify", out, "--base", base, "--deep")[0] == 0
    manifest = read_manifest(out)
    assert manifest
    kept = {its.name: out / str(its.file) for its in manifest.loras}
    aside = kept[loras[1].name].rename(out.parent / "aside.safetensors")
    wanted = [("MISSING", manifest.loras[1].file), ("OTHER_LORA", loras[1].name)]
    assert faults(run, out, "--base", base, "--deep") == wanted
    aside.rename(kept[loras[1].name])
    code, _, err = run("verify", out, "--deep")
    assert code == 1
    assert "--base BASE --lora fast.safetensors --lora style.safetensors" in err
    assert faults(run, out, "--base", base, "--lora", loras[0], "--deep") == [("OTHER_LORA", loras[1].name)]
    code, text, err = run("verify", base, "--json")
    assert code == 1
    assert "is no fused checkpoint" in err
    assert "is no fused checkpoint" in json.loads(text)["error"]


def test_a_wrong_sum_is_found(run: Run, tmp_path: Path, base: Path, loras: tuple[Path, Path]) -> None:
    """The check adds up by itself: files that are as recorded, made with 1 % more than is recorded."""
    out, inputs = tmp_path / "out", ("--base", base, "--lora", loras[0])
    assert run("fuse", base, "--lora", f"{loras[0]}:1.01", "--out", out)[0] == 0
    manifest = read_manifest(out)
    assert manifest
    honest = dump_manifest(manifest)
    (out / MANIFEST_NAME).write_text(
        dump_manifest(replace(manifest, loras=(replace(manifest.loras[0], strength=1.0),)))
    )
    assert faults(run, out, *inputs) == []
    found = faults(run, out, *inputs, "--deep")
    assert sorted(found) == [("DEVIATION", f"{module}.weight") for module in sorted(MODULES)]
    (out / MANIFEST_NAME).write_text(honest)
    assert faults(run, out, *inputs, "--deep") == []


def test_a_last_rounding_in_the_wrong_direction_is_found(
    run: Run, base: Path, loras: tuple[Path, Path], out: Path
) -> None:
    """Cut off rather than rounded: less than one unit in the last place away, and more than half of one."""
    path = holder(out, EDITED)
    tensors, metadata = load_file(path), dict(read_header(path).metadata)
    exact = load_file(holder(base, EDITED))[EDITED].float()
    for factors in (make_factors(), make_factors(MODULES[:2], 3, 2)):
        exact += 0.5 * factors[MODULES[0]][1] @ factors[MODULES[0]][0]
    cut = exact.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32).bfloat16()
    assert 0 < int((cut != tensors[EDITED]).sum()) < cut.numel()
    save_file(tensors | {EDITED: cut}, path, metadata=metadata)
    record_again(out)
    inputs = ("--base", base, "--lora", loras[0], "--lora", loras[1])
    assert ("DEVIATION", EDITED) in faults(run, out, *inputs, "--deep")


@pytest.mark.parametrize(
    "options",
    [
        ("--dtype", "float32"),
        ("--dtype", "float16"),
        ("--rounding", "stochastic", "--seed", "3"),
        ("--alpha", "fast.safetensors=1.7"),
    ],
    ids=lambda options: " ".join(options),
)
def test_options_come_from_the_manifest(
    run: Run, tmp_path: Path, base: Path, loras: tuple[Path, Path], options: tuple[str, ...]
) -> None:
    out, inputs = tmp_path / "out", ("--base", base, "--lora", loras[0])
    code, _, err = run("fuse", base, "--lora", f"{loras[0]}:0.3", *options, "--out", out)
    assert code == 0, err
    assert faults(run, out, *inputs, "--deep") == []
    path = holder(out, EDITED)
    tensors = load_file(path)
    tensors[EDITED] = tensors[EDITED] * 1.01
    save_file(tensors, path, metadata=dict(read_header(path).metadata))
    record_again(out)
    assert ("DEVIATION", EDITED) in faults(run, out, *inputs, "--deep")


def test_a_small_error_of_an_fp32_weight_is_found(run: Run, tmp_path: Path, loras: tuple[Path, Path]) -> None:
    base = save_model(tmp_path / "fp32", torch.float32)
    assert run("fuse", base, "--lora", loras[0], "--out", tmp_path / "out")[0] == 0
    inputs = ("--base", base, "--lora", loras[0], "--deep")
    assert faults(run, tmp_path / "out", *inputs) == []
    path = tmp_path / "out" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    row = tensors[EDITED].view(-1)
    row[int(row.abs().argmax())] *= 1 + 1e-5
    save_file(tensors, path, metadata=dict(read_header(path).metadata))
    record_again(tmp_path / "out")
    assert ("DEVIATION", EDITED) in faults(run, tmp_path / "out", *inputs)


def test_scaled_fp8(run: Run, tmp_path: Path) -> None:
    """The weight and its new scale are compared, each with what it should be."""
    name = MODULES[0]
    weight = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().amax(1, keepdim=True) / 448
    tensors = {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}
    save_file(tensors | {"x.bias": torch.ones(3)}, tmp_path / "base.safetensors")
    lora = write_lora(tmp_path / "x.safetensors", make_factors((name,), size=0.3), COMFY)
    assert run("fuse", tmp_path / "base.safetensors", "--lora", lora, "--out", tmp_path / "out")[0] == 0
    inputs = (tmp_path / "out", "--base", tmp_path / "base.safetensors", "--lora", lora, "--deep")
    assert faults(run, *inputs) == []
    path = tmp_path / "out" / "base.safetensors"
    right, metadata = load_file(path), dict(read_header(path).metadata)
    wrong = {name: value.clone() for name, value in right.items()}
    wrong[f"{name}.weight"].view(torch.uint8)[3, 4] ^= 2
    save_file(wrong, path, metadata=metadata)
    record_again(tmp_path / "out")
    assert ("DEVIATION", f"{name}.weight") in faults(run, *inputs)
    for factor in (1.001, 0.0, float("nan")):
        wrong = {name: value.clone() for name, value in right.items()}
        wrong[f"{name}.weight_scale"][7] *= factor
        save_file(wrong, path, metadata=metadata)
        record_again(tmp_path / "out")
        assert ("DEVIATION", f"{name}.weight_scale") in faults(run, *inputs)


def test_chains(run: Run, tmp_path: Path, base: Path, loras: tuple[Path, Path]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("fuse", base, "--lora", loras[0], "--out", first)[0] == 0
    assert run("fuse", first, "--lora", loras[1], "--out", second)[0] == 0
    assert faults(run, second, "--base", first, "--lora", loras[1], "--deep") == []
    assert {kind for kind, _ in faults(run, second, "--base", base, "--lora", loras[1])} == {"OTHER_BASE"}


def test_one_lora_in_both_experts(run: Run, tmp_path: Path, base: Path, loras: tuple[Path, Path]) -> None:
    """One `--lora` stands for both; stated components have to be those that were fused into."""
    save_model(base / "transformer_2", seed=1)
    fast = loras[0]
    pair = ("--lora", f"{fast}:0.5@transformer", "--lora", f"{fast}:0.8@transformer_2")
    out = tmp_path / "out"
    code, _, err = run("fuse", base, *pair, "--out", out)
    assert code == 0, err
    assert faults(run, out, "--base", base, "--lora", fast, "--deep") == []
    assert faults(run, out, "--base", base, *reversed_pairs(pair), "--deep") == []
    swapped = ("--lora", f"{fast}:0.8@transformer", "--lora", f"{fast}:0.5@transformer_2")
    assert faults(run, out, *swapped) == [("OTHER_STRENGTH", fast.name)] * 2
    path = out / "transformer_2" / "diffusion_pytorch_model.safetensors"
    flip(path, EDITED)
    record_again(out)
    code, text, _ = run("verify", out, "--base", base, *pair, "--deep", "--json")
    worst = max(json.loads(text)["deviations"], key=lambda row: row["ulps"])
    assert (code, worst["name"], worst["component"]) == (1, EDITED, "transformer_2")


def reversed_pairs(options: tuple[str, ...]) -> tuple[str, ...]:
    return options[2:] + options[:2]


def test_headers(run: Run, tmp_path: Path, loras: tuple[Path, Path]) -> None:
    base = tmp_path / "base.safetensors"
    weights = {name: value.clone() for name, value in tiny_transformer().bfloat16().state_dict().items()}
    save_file(weights, base, metadata={"author": "me"})
    assert run("fuse", base, "--lora", loras[0], "--out", tmp_path / "out")[0] == 0
    inputs = (tmp_path / "out", "--base", base, "--lora", loras[0], "--deep")
    path = tmp_path / "out" / base.name
    right, metadata = load_file(path), dict(read_header(path).metadata)

    def found(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
        save_file(tensors, path, metadata=metadata)
        record_again(tmp_path / "out")
        code, text, _ = run("verify", *inputs, "--json")
        assert code == 1
        return " ".join(fault["detail"] for fault in json.loads(text)["faults"] if fault["kind"] == "HEADER")

    assert "lacks 1 tensors of the base's (first: norm_out" in found(
        {name: value for name, value in right.items() if name != UNTOUCHED}, metadata
    )
    assert "has 1 tensors that the base's has not (first: added)" in found(right | {"added": torch.ones(2)}, metadata)
    assert f"{EDITED} is F32 [48, 48], should be BF16" in found(right | {EDITED: right[EDITED].float()}, metadata)
    assert "another __metadata__" in found(right, metadata | {"author": "you"})
    path.write_bytes(path.read_bytes()[:-1])
    record_again(tmp_path / "out")
    assert "HEADER" in {kind for kind, _ in faults(run, *inputs)}


def test_weights_that_were_not_written_by_the_fuse(run: Run, base: Path, out: Path) -> None:
    """diffusers would load this file rather than the shards."""
    save_model(out / "transformer", seed=5)
    (out / "transformer" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    assert ("UNRECORDED", "transformer/diffusion_pytorch_model.safetensors") in faults(run, out)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "vae/../../secret"])
def test_a_manifest_cannot_lead_elsewhere(run: Run, out: Path, name: str) -> None:
    (out.parent / "secret").write_text("x")
    manifest = read_manifest(out)
    assert manifest
    record = FileRecord(name, hashlib.sha256(b"x").hexdigest(), 1)
    (out / MANIFEST_NAME).write_text(dump_manifest(replace(manifest, outputs=(*manifest.outputs, record))))
    code, _, err = run("verify", out)
    assert code == 1
    assert "outside its folder" in err


def test_a_plan_that_is_not_the_recorded_one(run: Run, base: Path, loras: tuple[Path, Path], out: Path) -> None:
    manifest = read_manifest(out)
    assert manifest
    fewer = replace(manifest, changes=manifest.changes[1:])
    (out / MANIFEST_NAME).write_text(dump_manifest(fewer))
    inputs = ("--base", base, "--lora", loras[0], "--lora", loras[1], "--deep")
    assert faults(run, out, *inputs) == [("OTHER_PLAN", manifest.changes[0].name)]
    (loras[0].parent / "adapter_config.json").write_text('{"r": 3, "lora_alpha": 6}')  # was not there before
    found = faults(run, out, *inputs)
    assert ("OTHER_PLAN", "style.safetensors") in found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_units_in_the_last_place(dtype: torch.dtype) -> None:
    """The distance to the next number of the dtype, found by walking through all or many of them."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    end = {1: 0x7E, 2: 0x7BFF if dtype is torch.float16 else 0x7F7F, 4: 0x7F7FFFFF}[dtype.itemsize]
    steps = torch.arange(0, end, 1 if dtype.itemsize < 4 else 99_991, dtype=torch.int64)
    here, after = (bits.to(kind).view(dtype).double() for bits in (steps, steps + 1))
    assert torch.equal(deviation.ulp(here, dtype), after - here)
    assert torch.equal(deviation.ulp(-(here + (after - here) / 2), dtype), after - here)
