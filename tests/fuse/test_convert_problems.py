"""What `lorafuse convert` asks for and refuses: architectures, components, broken files, what a dialect cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from builders import save_model
from safetensors.torch import load_file, save_file
from table_models import RANK, ROWS, Run, base_file, draw, lora_file, low_rank, refused, spelled

from lorafuse_common.families.flux import FLUX
from lorafuse_common.families.mochi import MOCHI
from lorafuse_common.families.sd3 import SD3

TO_Q, TO_K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"


@pytest.fixture
def convert(run: Run) -> Run:
    return lambda *args: run("convert", *args)


def test_which_architecture(convert: Run, tmp_path: Path) -> None:
    """Asked for where names that several have are written differently, and only there."""
    factors = {TO_Q: low_rank(name="q"), TO_K: low_rank(name="k")}
    bare = spelled(tmp_path / "bare.safetensors", "lightning", factors)
    flat = spelled(tmp_path / "flat.safetensors", "lycoris", factors)
    out = tmp_path / "out" / "x.safetensors"
    for source in (bare, flat):
        for to in ("diffusers", "lycoris", "lightning"):
            assert convert(source, "--to", to, "--out", out, "--force")[0] == 0
    for to in ("kohya", "comfyui"):
        err = refused(convert, tmp_path, bare, "--to", to, "--out", tmp_path / "x.safetensors")
        assert "its names may be those of flux (FLUX.1)" in err
        assert "qwen_image (Qwen-Image)" in err
        assert f"{to} spells them differently for these. Say which it is with --family NAME" in err
    for family, key in [("flux", "double_blocks_0_img_attn_qkv"), ("qwen_image", "transformer_blocks_0_attn_to_q")]:
        assert convert(bare, "--to", "kohya", "--out", out, "--family", family, "--force")[0] == 0
        assert f"lora_unet_{key}.alpha" in load_file(out)
    base = save_model(tmp_path / "base")
    assert "the base's weight 48x48" in refused(convert, tmp_path, bare, "--to", "kohya", "--out", out, "--base", base)
    both = ("--base", base, "--family", "flux")
    assert "give one" in refused(convert, tmp_path, bare, "--to", "kohya", "--out", out, *both)
    assert "is none of flux, " in refused(convert, tmp_path, bare, "--to", "kohya", "--out", out, "--family", "sdxl")
    assert "expected one of diffusers, comfyui" in refused(convert, tmp_path, bare, "--to", "xlabs", "--out", out)


def test_unknown_architectures(convert: Run, tmp_path: Path) -> None:
    """Their names are kept where they need no translation, and found in the checkpoint where they do."""
    factors = {"stages.0.mixer.query": low_rank(), "stages.1.mixer.out_proj": low_rank()}
    dotted = spelled(tmp_path / "dotted.safetensors", "peft", factors)
    flat = spelled(tmp_path / "flat.safetensors", "kohya", factors)
    out = tmp_path / "out" / "x.safetensors"
    assert convert(dotted, "--to", "diffusers", "--out", out)[0] == 0
    assert "transformer.stages.1.mixer.out_proj.lora_B.weight" in load_file(out)
    for source, to in ((dotted, "comfyui"), (flat, "diffusers")):
        err = refused(convert, tmp_path, source, "--to", to, "--out", tmp_path / "x.safetensors")
        assert "of no family that lorafuse knows (first: " in err
    base = tmp_path / "base.safetensors"
    save_file({f"{name}.weight": torch.zeros(ROWS, 8) for name in factors}, base)
    assert convert(flat, "--to", "comfyui", "--out", out, "--base", base, "--force")[0] == 0
    assert "diffusion_model.stages.1.mixer.out_proj.lora_B.weight" in load_file(out)


def test_names_that_flatten_alike(convert: Run, tmp_path: Path) -> None:
    lora = spelled(tmp_path / "a.safetensors", "peft", {"mixer.in.proj": low_rank(), "mixer.in_proj": low_rank()})
    err = refused(convert, tmp_path, lora, "--to", "lycoris", "--out", tmp_path / "x" / "x.safetensors")
    assert "two of its modules are lycoris_mixer_in_proj.lora_" in err


def test_modules_that_no_table_has(convert: Run, tmp_path: Path) -> None:
    factors = {TO_Q: low_rank(name="q"), "transformer_blocks.0.attn.to_new": low_rank(name="new")}
    lora = spelled(tmp_path / "a.safetensors", "diffusers", factors)
    out = tmp_path / "out" / "x.safetensors"
    assert convert(lora, "--to", "lightning", "--out", out)[0] == 0
    assert "transformer_blocks.0.attn.to_new.alpha" in load_file(out)
    err = refused(convert, tmp_path, lora, "--to", "kohya", "--out", tmp_path / "x.safetensors", "--family", "flux")
    assert "1 x transformer.transformer_blocks.0.attn.to_new: FLUX.1 has no such module; --base BASE tells" in err


def test_the_last_block(convert: Run, tmp_path: Path) -> None:
    """Its names or rows are others in SD3 and Mochi; which block it is, a LoRA does not say."""
    out = tmp_path / "out" / "x.safetensors"
    for family, module in ((SD3, "joint_blocks.1.context_block.adaLN_modulation.1"), (MOCHI, "blocks.1.mod_y")):
        folder = tmp_path / family.name
        folder.mkdir()
        lora, base = lora_file(folder, family, "comfyui"), base_file(folder, family, "comfyui")
        err = refused(convert, tmp_path, lora, "--to", "diffusers", "--out", out)
        assert f"1 x diffusion_model.{module}: is in block 1, the highest here, and the last block of" in err
        assert convert(lora, "--to", "kohya", "--out", out, "--force")[0] == 0
        assert convert(lora, "--to", "diffusers", "--out", out, "--base", base, "--force")[0] == 0
    name = "norm1_context.linear_1"
    assert f"transformer.transformer_blocks.1.{name}.lora_A.weight" in load_file(out)
    for number, module in enumerate((f"transformer_blocks.0.{name}", "transformer_blocks.0.norm1_context.linear")):
        lora = spelled(tmp_path / f"{number}.safetensors", "diffusers", {module: low_rank()})
        assert (
            convert(lora, "--to", "comfyui", "--out", out, "--family", "mochi", "--force")[0] == 0
        )  # the name says it


def test_a_published_size_has_a_known_last_block(convert: Run, tmp_path: Path) -> None:
    size = SD3.sizes[0]
    module = f"joint_blocks.{size.blocks - 1}.context_block.adaLN_modulation.1"
    factors = {".lora_down.weight": draw("A", 2, size.width), ".lora_up.weight": draw("B", 6, 2)}
    lora, out = spelled(tmp_path / "a.safetensors", "kohya", {module: factors}), tmp_path / "out" / "x.safetensors"
    assert convert(lora, "--to", "diffusers", "--out", out, "--family", "sd3")[0] == 0
    b = load_file(out)[f"transformer.transformer_blocks.{size.blocks - 1}.norm1_context.linear.lora_B.weight"]
    assert b.equal(factors[".lora_up.weight"].roll(3, 0))


def test_other_components(convert: Run, tmp_path: Path) -> None:
    text = {f"lora_te_text_model_{n}.lora_{way}.weight": torch.ones(4, 4) for n in range(4) for way in ("up", "down")}
    text |= {key.replace("te_", "te2_"): torch.zeros(4, 4) for key in text}
    path = spelled(tmp_path / "a.safetensors", "kohya", {"single_blocks.0.linear2": low_rank()})
    save_file(load_file(path) | text, path)
    command = (path, "--to", "peft", "--out", tmp_path / "out" / "x.safetensors", "--family", "flux")
    err = refused(convert, tmp_path, *command)
    assert "4 x lora_te_text_model_0, lora_te_text_model_1, lora_te_text_model_2, and 1 more: belongs to the" in err
    code, _, err = convert(*command, "--allow", "OTHER_COMPONENT")
    assert code == 0
    assert "not written: 4 untrained modules of the text_encoder_2; not written: 4 modules of the text_encoder" in err
    assert len(load_file(tmp_path / "out" / "x.safetensors")) == 2
    save_file(text, path)
    err = refused(convert, tmp_path, path, "--to", "peft", "--out", tmp_path / "y" / "y.safetensors")
    assert "has no module of a diffusion transformer (first: lora_te2_text_model_0 of the text_encoder_2)" in err


def test_one_of_two_experts(convert: Run, tmp_path: Path) -> None:
    factors = {name: draw(f"{name}{way}", 4, 4) for name in ("transformer", "transformer_2") for way in "AB"}
    tensors = {
        f"{name}.blocks.0.attn1.to_q.lora_{way}.weight": draw(f"{name}{way}", 4, 4) for name in factors for way in "AB"
    }
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "out" / "x.safetensors"
    both = (tmp_path / "a.safetensors", "--to", "kohya", "--out", out)
    assert "belongs to the transformer_2" in refused(convert, tmp_path, *both)
    for component in ("transformer", "transformer_2"):
        options = ("--allow", "OTHER_COMPONENT", "--force", "--component", component)
        assert convert(*both, *options)[0] == 0
        found = load_file(out)["lora_unet_blocks_0_self_attn_q.lora_up.weight"]
        assert found.equal(tensors[f"{component}.blocks.0.attn1.to_q.lora_B.weight"])


def test_all_problems_at_once(convert: Run, tmp_path: Path) -> None:
    good = spelled(tmp_path / "a.safetensors", "diffusers", {TO_Q: low_rank()})
    other, attention = "transformer.transformer_blocks.1.attn", "transformer.transformer_blocks.0.attn"
    tensors = load_file(good) | {
        "transformer.note": torch.ones(1),
        f"{attention}.to_q.lora_A.weight": torch.ones(RANK, 8),
        f"{other}.to_q.lora_A.weight": torch.ones(RANK, 8),
        f"{other}.to_k.lora_A.weight": torch.ones(RANK, 8),
        f"{other}.to_k.lora_B.weight": torch.ones(ROWS, RANK + 1),
        f"{other}.to_v.hra_u": torch.ones(8, 8),
        f"{other}.to_v.alpha": torch.tensor(1.0),
        f"{other}.to_out.0.lora_A.weight": torch.ones(RANK, 8),
        f"{other}.to_out.0.lora_B.weight": torch.ones(ROWS, RANK),
        f"{other}.to_out.0.alpha": torch.tensor(float("nan")),
    }
    save_file(tensors, good)
    err = refused(convert, tmp_path, good, "--to", "diffusers", "--out", tmp_path / "x.safetensors")
    for part in (
        "cannot be written as diffusers: 6 problems",
        "1 x transformer.note: its suffix is not known",
        "to_q.lora_down.weight: its module has this factor already",
        f"{other}.to_q: is incomplete: has only .lora_A.weight",
        f"{other}.to_k: the ranks of A [4, 8] and B [6, 5] differ",
        f"{other}.to_v: is HRA",
        f"{other}.to_out.0: alpha is nan",
    ):
        assert part in err, part


def limits() -> list[tuple[str, Mapping[str, torch.Tensor], str]]:
    lora = low_rank()
    return [
        ("peft", {".lokr_w1": torch.ones(2, 2), ".lokr_w2": torch.ones(3, 4)}, "is lokr, which peft files cannot hold"),
        ("diffusers", {".diff": torch.ones(6, 8)}, "is diff, which diffusers files cannot hold: --to comfyui or kohya"),
        ("original", {".diff_b": torch.ones(6)}, "changes a bias without its weight, which original files cannot"),
        ("peft", lora | {".set_bias": torch.ones(6)}, "replaces a bias, which peft files cannot: --to"),
        ("peft", lora | {".lora_mid.weight": torch.ones(4, 4)}, "is lora with a core, which peft files cannot hold"),
        ("diffusers", lora | {".dora_scale": torch.ones(1, 8)}, "is dora by columns, which diffusers files cannot"),
    ]  # fmt: skip


@pytest.mark.parametrize(("to", "factors", "why"), limits())
def test_what_a_dialect_cannot_hold(
    convert: Run, tmp_path: Path, to: str, factors: Mapping[str, torch.Tensor], why: str
) -> None:
    lora = spelled(tmp_path / "a.safetensors", "lightning", {TO_Q: factors})
    err = refused(
        convert, tmp_path, lora, "--to", to, "--out", tmp_path / "x" / "x.safetensors", "--family", "qwen_image"
    )
    assert f"1 x {TO_Q}: {why}" in err


def test_dora_beside_lora(convert: Run, tmp_path: Path) -> None:
    factors = {TO_Q: low_rank(), TO_K: low_rank() | {".dora_scale": torch.ones(ROWS, 1)}}
    lora = spelled(tmp_path / "a.safetensors", "lightning", factors)
    err = refused(convert, tmp_path, lora, "--to", "diffusers", "--out", tmp_path / "x" / "x.safetensors")
    assert f"1 x {TO_Q}: is no DoRA, and others here are" in err
    assert convert(lora, "--to", "kohya", "--out", tmp_path / "x" / "x.safetensors", "--family", "qwen_image")[0] == 0


def test_overlapping_modules(convert: Run, tmp_path: Path) -> None:
    """Two that change the same rows are a problem, unless one of them has no delta."""
    factors = {"double_blocks.0.img_attn.qkv": low_rank(3 * ROWS)}
    lora = spelled(tmp_path / "a.safetensors", "comfyui", factors)
    q = {f"diffusion_model.{TO_Q}{suffix}": value for suffix, value in low_rank().items()}
    save_file(load_file(lora) | q, lora)
    out = tmp_path / "x" / "x.safetensors"
    err = refused(convert, tmp_path, lora, "--to", "kohya", "--out", out, "--family", "flux")
    assert "changes the same rows as diffusion_model." in err
    save_file(load_file(lora) | {key: torch.zeros_like(value) for key, value in q.items()}, lora)
    code, _, err = convert(lora, "--to", "kohya", "--out", out, "--family", "flux")
    assert code == 0, err
    assert "1 modules read, 1 written" in err
    assert "not written: 1 untrained modules that others cover" in err


def test_other_rules_keep_their_alphas(convert: Run, tmp_path: Path) -> None:
    """OFT's constraint, and what LyCORIS ignores of a full LoKr; PEFT scales the latter, which is multiplied in."""
    oft = {".oft_blocks": draw("oft", 3, 2, 2), ".alpha": torch.tensor(0.25)}
    lokr = {".lokr_w1": torch.ones(2, 2), ".lokr_w2": torch.ones(3, 4)}
    lora = spelled(tmp_path / "a.safetensors", "lightning", {TO_Q: oft, TO_K: lokr | {".alpha": torch.tensor(1e10)}})
    out = tmp_path / "x" / "x.safetensors"
    assert convert(lora, "--to", "kohya", "--out", out, "--family", "qwen_image")[0] == 0
    tensors = load_file(out)
    assert tensors["lora_unet_transformer_blocks_0_attn_to_q.alpha"] == 0.25
    assert tensors["lora_unet_transformer_blocks_0_attn_to_k.alpha"] == 1e10
    pefts = tmp_path / "peft" / "adapter_model.safetensors"
    spelled(pefts, "peft", {TO_K: lokr})
    (pefts.parent / "adapter_config.json").write_text('{"peft_type": "LOKR", "r": 8, "alpha": 4}')
    assert convert(pefts, "--to", "comfyui", "--out", out, "--family", "qwen_image", "--force")[0] == 0
    assert load_file(out)[f"diffusion_model.{TO_K}.lokr_w1"].equal(torch.full((2, 2), 0.5))


def test_factors_in_other_dtypes(convert: Run, tmp_path: Path) -> None:
    """Passed on as they are, but no arithmetic is done on them."""
    factors = {"double_blocks.0.img_attn.proj": {k: v.to(torch.float8_e4m3fn) for k, v in low_rank().items()}}
    lora = spelled(tmp_path / "a.safetensors", "kohya", factors)
    out = tmp_path / "x" / "x.safetensors"
    assert convert(lora, "--to", "lycoris", "--out", out, "--family", "flux")[0] == 0
    assert load_file(out)["lycoris_transformer_blocks_0_attn_to_out_0.lora_up.weight"].dtype == torch.float8_e4m3fn
    save_file(load_file(lora) | {"lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(3.0)}, lora)
    err = refused(convert, tmp_path, lora, "--to", "diffusers", "--out", tmp_path / "y.safetensors", "--family", "flux")
    assert "has factors in F8_E4M3, into which its scale of 0.75 cannot be multiplied" in err
    qkv = {k: v.to(torch.float8_e4m3fn) for k, v in low_rank(3 * ROWS).items()}
    lora = spelled(tmp_path / "b.safetensors", "kohya", {"double_blocks.0.img_attn.qkv": qkv})
    err = refused(convert, tmp_path, lora, "--to", "lycoris", "--out", tmp_path / "y.safetensors", "--family", "flux")
    assert "has factors in F8_E4M3, which cannot be cut or joined" in err


def test_control_loras_of_flux(convert: Run, tmp_path: Path) -> None:
    """ComfyUI has to be told that `img_in` gets more columns; BFL's norms replace the model's."""
    tensors = {
        "img_in.lora_A.weight": draw("A", 4, 20),
        "img_in.lora_B.weight": draw("B", ROWS, 4),
        "img_in.lora_B.bias": draw("bias", ROWS),
        "single_blocks.0.norm.key_norm.scale": draw("norm", ROWS),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    out, back = tmp_path / "out" / "x.safetensors", tmp_path / "back" / "x.safetensors"
    assert convert(tmp_path / "a.safetensors", "--to", "comfyui", "--out", out)[0] == 0
    found = load_file(out)
    assert found["diffusion_model.img_in.reshape_weight"].tolist() == [ROWS, 20]
    assert found["diffusion_model.img_in.diff_b"].equal(tensors["img_in.lora_B.bias"])
    assert found["diffusion_model.single_blocks.0.norm.key_norm.set_weight"].equal(draw("norm", ROWS))
    assert convert(out, "--to", "kohya", "--out", back, "--family", "flux")[0] == 0
    assert "lora_unet_img_in.reshape_weight" in load_file(back)
    base = base_file(tmp_path, FLUX, "original")
    narrow = low_rank() | {".lora_down.weight": draw("A", 4, 10)}
    plain = spelled(tmp_path / "plain.safetensors", "original", {"img_in": narrow})
    assert convert(plain, "--to", "comfyui", "--out", out, "--base", base, "--force")[0] == 0
    assert "diffusion_model.img_in.reshape_weight" not in load_file(out)
