"""What a LoRA's names mean: mixed spellings, joined and duplicate modules, other components, other versions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from builders import save_model, write_lora, write_sparse
from peft import LoraConfig, get_peft_model
from rules import fused
from safetensors.torch import load_file, save_file

from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.dialects.comfy import COMFY
from lorafuse_common.dialects.diffusers import DIFFUSERS
from lorafuse_common.dialects.kohya import KOHYA
from lorafuse_common.families.flux import FLUX
from lorafuse_common.families.flux2 import FLUX2
from lorafuse_common.naming import Family
from lorafuse_fuse.choices import LoraRequest, ProblemKind
from lorafuse_fuse.fuse import FuseOptions, fuse, require_clean
from lorafuse_fuse.plan import FusePlan, plan_fuse

Tensors = dict[str, torch.Tensor]
Q, K, V = (f"transformer_blocks.0.attn.to_{n}" for n in "qkv")
A, B = torch.randn(4, 48), torch.randn(48, 4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_model(tmp_path_factory.mktemp("model") / "base", torch.float32))


def planned(base: Checkpoint, path: Path, tensors: Mapping[str, torch.Tensor], **metadata: str) -> FusePlan:
    save_file({key: value.clone() for key, value in tensors.items()}, path / "x.safetensors", metadata or None)
    return plan_fuse(base, [LoraRequest(path / "x.safetensors")])


def pair(stem: str, down: torch.Tensor = A, up: torch.Tensor = B) -> Tensors:
    return {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}


def test_one_file_may_mix_spellings(base: Checkpoint, tmp_path: Path) -> None:
    """Files that were merged from several tools' do."""
    stems = [
        f"diffusion_model.{Q}",
        f"model.diffusion_model.{K}",
        f"lora_unet_{V.replace('.', '_')}",
        "base_model.model.transformer_blocks.0.attn.to_out.0",
        "transformer.transformer_blocks.1._orig_mod.attn.to_q",
        "lycoris_transformer_blocks_1_attn_to_k",
        "pipe.dit.transformer_blocks.1.attn.to_v",
    ]
    plan = planned(base, tmp_path, {key: value for stem in stems for key, value in pair(stem).items()})
    assert plan.problems == ()
    assert plan.loras[0].applied == len(stems)
    changed = {tensor for component in plan.components for tensor in component.patches}
    expected = {Q, K, V, "transformer_blocks.0.attn.to_out.0"} | {f"transformer_blocks.1.attn.to_{n}" for n in "qkv"}
    assert changed == {f"{module}.weight" for module in expected}


def test_a_name_with_two_meanings_is_a_problem(tmp_path: Path) -> None:
    """Wan's layouts trade `norm2` and `norm3`; where nothing else tells the layout, none is guessed."""
    names = ("blocks.0.norm2", "blocks.0.norm3", "blocks.0.attn1.to_q", "blocks.0.attn2.to_q")
    save_file({f"{name}.weight": torch.zeros(8) for name in names}, tmp_path / "m.safetensors")
    base = open_checkpoint(tmp_path / "m.safetensors")
    plan = planned(base, tmp_path, {"blocks.0.norm3.diff": torch.ones(8)})
    assert plan.problems[0].kind is ProblemKind.AMBIGUOUS_MODULE
    told = {"blocks.0.norm3.diff": torch.ones(8), "blocks.0.self_attn.q.diff": torch.ones(8)}
    plan = planned(base, tmp_path, told)
    assert plan.problems == ()
    assert set(plan.components[0].patches) == {"blocks.0.norm2.weight", "blocks.0.attn1.to_q.weight"}


def test_names_that_only_joined_attention_has(tmp_path: Path) -> None:
    """SimpleTuner's `to_qkv` on a split base with fewer key than query heads, where no checkpoint has such a module."""
    torch.manual_seed(0)
    rows = {"to_q": 8, "to_k": 4, "to_v": 4}
    weights = {f"a.attn.{name}.weight": torch.randn(count, 6) for name, count in rows.items()}
    down, up = torch.randn(2, 6), torch.randn(16, 2)
    magnitude = torch.rand(16) + 1
    lora = pair("a.attn.to_qkv", down, up) | {"a.attn.to_qkv.dora_scale": magnitude[:, None]}
    result = fused(tmp_path, weights, lora)
    whole = torch.cat(list(weights.values())).double()
    merged = whole + up.double() @ down.double()
    merged *= magnitude.double()[:, None] / merged.norm(dim=1, keepdim=True)
    expected = whole + 0.5 * (merged - whole)
    torch.testing.assert_close(torch.cat([result[name] for name in weights]), expected.float())


def test_columns_of_a_joined_dora_are_normed_over_all_its_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {f"a.attn.to_{n}.weight": torch.randn(8, 6) for n in "qkv"}
    down, up, magnitude = torch.randn(2, 6), torch.randn(24, 2), torch.rand(1, 6) + 1
    result = fused(tmp_path, weights, pair("a.attn.to_qkv", down, up) | {"a.attn.to_qkv.dora_scale": magnitude})
    whole = torch.cat(list(weights.values())).double()
    merged = whole + up.double() @ down.double()
    merged *= magnitude.double() / merged.norm(dim=0, keepdim=True)
    expected = whole + 0.5 * (merged - whole)
    torch.testing.assert_close(torch.cat([result[name] for name in weights]), expected.float())


def test_a_split_dora_on_a_fused_base_is_normed_over_its_own_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = {"layers.0.attention.qkv.weight": torch.randn(24, 6), "layers.0.adaLN_modulation.0.weight": torch.ones(4)}
    down, up, magnitude = torch.randn(2, 6), torch.randn(8, 2), torch.rand(1, 6) + 1
    stem = "layers.0.attention.to_k"
    result = fused(tmp_path, weights, pair(stem, down, up) | {f"{stem}.dora_scale": magnitude})
    whole = weights["layers.0.attention.qkv.weight"].double()
    merged = whole[8:16] + up.double() @ down.double()
    merged *= magnitude.double() / merged.norm(dim=0, keepdim=True)
    expected = whole.clone()
    expected[8:16] += 0.5 * (merged - whole[8:16])
    torch.testing.assert_close(result["layers.0.attention.qkv.weight"], expected.float())


def test_the_same_rows_twice_in_one_file(base: Checkpoint, tmp_path: Path) -> None:
    """Anime-Z files hold qkv and to_q, to_k, to_v, which would add up to twice the delta."""
    joined = pair("transformer_blocks.0.attn.to_qkv", A, torch.randn(144, 4))
    plan = planned(base, tmp_path, joined | pair(Q) | pair("transformer_blocks.1.attn.to_q"))
    assert [problem.kind for problem in plan.problems] == [ProblemKind.DUPLICATE_MODULE]
    assert {plan.problems[0].subject, *plan.problems[0].detail.split(", ")[0].split()} > {
        Q,
        "transformer_blocks.0.attn.to_qkv",
    }
    assert plan.loras[0].applied == 2
    require_clean(plan, (ProblemKind.DUPLICATE_MODULE,))
    for untrained in (Q, "transformer_blocks.0.attn.to_qkv"):
        tensors = joined | pair(Q)
        tensors[f"{untrained}.lora_B.weight"] = torch.zeros_like(tensors[f"{untrained}.lora_B.weight"])
        plan = planned(base, tmp_path, tensors)
        assert plan.problems == ()
        assert plan.loras[0].harmless == {"untrained modules that others cover": 1}
        assert [patch.module.stem for patch in plan.patches].count(untrained) == 0


def test_other_components_are_named_and_untrained_ones_harmless(base: Checkpoint, tmp_path: Path) -> None:
    trained = pair("lora_te1_text_model_q") | pair("lora_te3_encoder_block_0_q") | pair("text_encoders.qwen.q")
    plan = planned(base, tmp_path, pair(Q) | trained)
    assert {(p.kind, p.detail) for p in plan.problems} == {
        (ProblemKind.OTHER_COMPONENT, "belongs to the text_encoder"),
        (ProblemKind.OTHER_COMPONENT, "belongs to the text_encoder_3"),
    }
    zeros = {key: torch.zeros_like(value) if "lora_B" in key else value for key, value in trained.items()}
    plan = planned(base, tmp_path, pair(Q) | zeros)
    assert plan.problems == ()
    assert plan.loras[0].harmless == {
        "untrained modules of the text_encoder": 2,
        "untrained modules of the text_encoder_3": 1,
    }
    assert (plan.loras[0].modules, plan.loras[0].applied) == (1, 1)


def test_a_wan_21_image_lora_on_22(tmp_path: Path) -> None:
    """Wan 2.2 has no image embedder; 2.1's modules for it have nothing to act on, in either layout."""
    shapes = {f"blocks.0.{m}.weight": (16, 16) for m in ("attn1.to_q", "attn2.to_q", "ffn.net.0.proj")}
    write_sparse(tmp_path / "m.safetensors", shapes)
    base = open_checkpoint(tmp_path / "m.safetensors")
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    original = pair("diffusion_model.blocks.0.self_attn.q", a, b)
    for module in ("blocks.0.cross_attn.k_img", "blocks.0.cross_attn.v_img", "img_emb.proj.1", "img_emb.proj.3"):
        original |= pair(f"diffusion_model.{module}", a, b)
    original["diffusion_model.blocks.0.cross_attn.norm_k_img.diff"] = torch.randn(16)
    own = pair("blocks.0.attn1.to_q", a, b) | pair("blocks.0.attn2.add_k_proj", a, b)
    for tensors, count in ((original, 5), (own, 1)):
        plan = planned(base, tmp_path, tensors)
        assert plan.problems == ()
        assert list(plan.loras[0].harmless.values()) == [count]
        assert "image" in next(iter(plan.loras[0].harmless))
        assert plan.loras[0].applied == 1
    plan = planned(base, tmp_path, original | pair("diffusion_model.blocks.0.cross_attn.nonsense", a, b))
    assert [problem.kind for problem in plan.problems] == [ProblemKind.NO_SUCH_MODULE]


@pytest.mark.parametrize("family", [FLUX, FLUX2], ids=lambda family: family.name)
def test_guidance_that_distilled_models_lack(tmp_path: Path, family: Family) -> None:
    """A FLUX.1 dev LoRA on schnell, and one for FLUX.2 dev on klein, which take no guidance."""
    names = [name for name in family.layouts[0].expand(1) if "guidance_embedder" not in name]
    write_sparse(tmp_path / "m.safetensors", {f"{name}.weight": (48, 48) for name in names})
    base = open_checkpoint(tmp_path / "m.safetensors")
    assert base.family is family
    tensors = pair("img_in") | pair("guidance_in.in_layer") | pair("guidance_in.out_layer")
    plan = planned(base, tmp_path, tensors)
    assert plan.problems == ()
    assert plan.loras[0].applied == 1
    assert list(plan.loras[0].harmless.values()) == [2]
    assert "guidance embedder" in next(iter(plan.loras[0].harmless))


def test_whole_modules_that_peft_saves(tmp_path: Path) -> None:
    """`modules_to_save` replace the base's, as PEFT's own merge does; its configuration says which they are."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False))
    for name, value in tuned.named_parameters():
        if "modules_to_save" in name:
            value.data += 1
    tuned.save_pretrained(tmp_path)
    merged = tuned.merge_and_unload().state_dict()
    save_file(before, tmp_path / "base.safetensors")
    checkpoint = open_checkpoint(tmp_path / "base.safetensors")
    plan = plan_fuse(checkpoint, [LoraRequest(tmp_path / "adapter_model.safetensors")])
    require_clean(plan, ())
    fuse(plan, FuseOptions(tmp_path / "out"))
    torch.testing.assert_close(load_file(tmp_path / "out" / "base.safetensors"), merged)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 8}))
    plan = plan_fuse(checkpoint, [LoraRequest(tmp_path / "adapter_model.safetensors")])
    assert {problem.kind for problem in plan.problems} == {ProblemKind.UNREAD_KEY}


@pytest.mark.parametrize("module", ["proj_mlp", "attn.to_k"])
def test_modules_of_layouts_with_other_words(tmp_path: Path, module: str) -> None:
    """A LoRA whose few modules could be many families' fuses where the base says which."""
    names = ["single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.attn.to_k"]
    names += ["single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_v"]
    save_file({f"{name}.weight": torch.zeros(48, 48) for name in names}, tmp_path / "m.safetensors")
    write_lora(tmp_path / "x.safetensors", {f"single_transformer_blocks.0.{module}": (A, B)}, DIFFUSERS)
    plan = plan_fuse(open_checkpoint(tmp_path / "m.safetensors"), [LoraRequest(tmp_path / "x.safetensors")])
    assert (plan.problems, plan.loras[0].applied) == ((), 1)


@pytest.mark.parametrize("dialect", [COMFY, KOHYA], ids=lambda dialect: dialect.name)
def test_a_stated_alpha_wins(base: Checkpoint, tmp_path: Path, dialect: object) -> None:
    assert dialect in (COMFY, KOHYA)
    path = write_lora(tmp_path / "x.safetensors", {Q: (A, B)}, COMFY if dialect is COMFY else KOHYA, alpha=8.0)
    plan = plan_fuse(base, [LoraRequest(path, alpha=2.0)])
    assert plan.loras[0].scale == "--alpha = 0.5"
    assert plan.patches[0].scale == 0.5
