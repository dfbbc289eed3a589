"""What cannot be fused: every kind is found, all at once, before anything is written, with its likeliest cause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from builders import MODULES, make_factors, save_model, write_lora, write_sparse
from safetensors.torch import save_file

from lorafuse_common.checkpoint import Checkpoint, open_checkpoint
from lorafuse_common.dialects.comfy import COMFY
from lorafuse_common.dialects.kohya import KOHYA
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.errors import LorafuseError, PlanError
from lorafuse_common.manifest import read_manifest
from lorafuse_fuse.choices import LoraRequest, ProblemKind
from lorafuse_fuse.fuse import FuseOptions, fuse, require_clean
from lorafuse_fuse.plan import FusePlan, plan_fuse
from lorafuse_fuse.report import describe_plan

A, B = torch.randn(4, 48), torch.randn(48, 4)
TO_Q = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(save_model(tmp_path_factory.mktemp("model") / "base"))


def planned(base: Checkpoint, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> FusePlan:
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    return plan_fuse(base, [LoraRequest(tmp_path / "x.safetensors")])


GOOD = {f"{TO_Q}.lora_A.weight": A, f"{TO_Q}.lora_B.weight": B}
CASES: dict[ProblemKind, dict[str, torch.Tensor]] = {
    ProblemKind.UNREAD_KEY: {f"{TO_Q}.surprise": A},
    ProblemKind.DUPLICATE_KEY: {f"{TO_Q}.lora_A.other.weight": A},
    ProblemKind.OTHER_COMPONENT: {"text_encoder.q.lora_A.weight": A, "text_encoder.q.lora_B.weight": B},
    ProblemKind.NO_SUCH_MODULE: {"transformer_blocks.9.attn.to_q.lora_A.weight": A},
    ProblemKind.INCOMPLETE_MODULE: {"transformer_blocks.0.attn.to_k.lora_A.weight": A},
    ProblemKind.UNKNOWN_ALGEBRA: {"transformer_blocks.0.attn.to_k.oft_R.weight": A},
    ProblemKind.SHAPE_MISMATCH: {
        "transformer_blocks.0.attn.to_k.lora_A.weight": torch.randn(4, 32),
        "transformer_blocks.0.attn.to_k.lora_B.weight": B,
    },
    ProblemKind.UNEDITABLE_DTYPE: {
        "transformer_blocks.0.attn.to_k.lora_A.weight": A.to(torch.float8_e4m3fn),
        "transformer_blocks.0.attn.to_k.lora_B.weight": B,
    },
    ProblemKind.SCALE_CONFLICT: {
        "transformer_blocks.0.attn.to_k.lora_A.weight": A,
        "transformer_blocks.0.attn.to_k.lora_B.weight": B,
        "transformer_blocks.0.attn.to_k.alpha": torch.tensor(0.0),
    },
}


@pytest.mark.parametrize("kind", CASES)
def test_each_kind_is_found_beside_what_fits(base: Checkpoint, tmp_path: Path, kind: ProblemKind) -> None:
    plan = planned(base, tmp_path, GOOD | CASES[kind])
    assert [problem.kind for problem in plan.problems] == [kind]
    assert plan.loras[0].applied == 1
    assert plan.loras[0].ignored == {kind: 1}
    with pytest.raises(PlanError, match=kind):
        fuse_checked(plan, tmp_path / "out")
    fuse_checked(plan, tmp_path / "out", kind)
    assert (tmp_path / "out" / "lorafuse.json").is_file()


def fuse_checked(plan: FusePlan, out: Path, *allowed: ProblemKind) -> None:
    require_clean(plan, allowed)
    fuse(plan, FuseOptions(out, allowed))


def test_all_problems_are_listed_together(base: Checkpoint, tmp_path: Path) -> None:
    tensors = GOOD | {key: value for case in CASES.values() for key, value in case.items() if "to_k" not in key}
    planned(base, tmp_path, tensors)
    (tmp_path / "y.safetensors").write_bytes(b"no")
    plan = plan_fuse(base, [LoraRequest(tmp_path / f"{name}.safetensors") for name in "xyz"])
    with pytest.raises(PlanError) as error:
        require_clean(plan, ())
    text = str(error.value)
    for word in ("UNREAD_KEY", "DUPLICATE_KEY", "OTHER_COMPONENT", "NO_SUCH_MODULE", "y.safetensors", "z.safetensors"):
        assert word in text, text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_factors_stop_before_writing(base: Checkpoint, tmp_path: Path, value: float) -> None:
    broken = A.clone()
    broken[1, 2] = value
    plan = planned(base, tmp_path, GOOD | {f"{TO_Q}.lora_A.weight": broken})
    require_clean(plan, ())
    with pytest.raises(PlanError, match=rf"1 x NOT_FINITE: {TO_Q}"):
        fuse(plan, FuseOptions(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_damaged_modules_are_left_out_where_that_is_allowed(base: Checkpoint, tmp_path: Path) -> None:
    to_k = "transformer_blocks.0.attn.to_k"
    broken = {f"{to_k}.lora_A.weight": A * float("nan"), f"{to_k}.lora_B.weight": B}
    plan = planned(base, tmp_path, GOOD | broken)
    fuse_checked(plan, tmp_path / "out", ProblemKind.NOT_FINITE)
    manifest = read_manifest(tmp_path / "out")
    assert manifest
    assert [change.name for change in manifest.changes] == [f"{TO_Q}.weight"]
    assert (manifest.loras[0].applied, manifest.loras[0].ignored) == (1, {"NOT_FINITE": 1})


def test_what_is_no_lora_cannot_be_allowed(base: Checkpoint, tmp_path: Path) -> None:
    plan = plan_fuse(base, [LoraRequest(tmp_path / "absent.safetensors")])
    with pytest.raises(PlanError, match="absent"):
        require_clean(plan, tuple(ProblemKind))


def test_untrained_loras_have_no_effect(base: Checkpoint, tmp_path: Path) -> None:
    plan = planned(base, tmp_path, GOOD | {f"{TO_Q}.lora_B.weight": torch.zeros_like(B)})
    with pytest.raises(PlanError, match=r"NO_EFFECT.*never trained"):
        fuse_checked(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_strength_zero_has_no_effect(base: Checkpoint, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "x.safetensors")
    plan = plan_fuse(base, [LoraRequest(tmp_path / "x.safetensors", 0.0)])
    with pytest.raises(PlanError, match="strength is 0"):
        require_clean(plan, ())


def test_fp8_weights_are_not_edited(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_sparse(tmp_path / "base" / "model.safetensors", {f"{TO_Q}.weight": (48, 24)}, "F8_E4M3")
    raw = (tmp_path / "base" / "model.safetensors").read_bytes().replace(b"[48, 24]", b"[48, 48]")
    (tmp_path / "base" / "model.safetensors").write_bytes(raw)
    plan = planned(open_checkpoint(tmp_path / "base"), tmp_path, GOOD)
    assert plan.problems[0].kind is ProblemKind.UNEDITABLE_DTYPE
    assert "F8_E4M3" in plan.problems[0].detail


@pytest.mark.parametrize(
    ("tensors", "cause"),
    [
        ({"blocks.0.self_attn.q": (48, 48), "blocks.0.ffn.0": (48, 48)}, "are Wan names; the base is Qwen-Image"),
        ({"double_blocks.0.img_mod.lin": (48, 48)}, "are FLUX.1 or HunyuanVideo names; the base is Qwen-Image"),
        ({"double_blocks.0.img_attn.qkv": (48, 48)}, "are Chroma or FLUX.1 or FLUX.2 or HunyuanVideo names"),
        (
            {TO_Q: (48, 48), "transformer_blocks.30.attn.to_q": (48, 48)},
            "names block 30; the base's last is 1, so it is of a larger model",
        ),
        ({TO_Q: (3072, 3072)}, "shapes are of the 20B model; the base is of width 48"),
    ],
)
def test_the_likeliest_cause_is_named(
    base: Checkpoint, tmp_path: Path, tensors: dict[str, tuple[int, int]], cause: str
) -> None:
    factors = {name: (torch.randn(4, i), torch.randn(o, 4)) for name, (o, i) in tensors.items()}
    write_lora(tmp_path / "x.safetensors", factors, COMFY)
    with pytest.raises(PlanError, match=cause):
        require_clean(plan_fuse(base, [LoraRequest(tmp_path / "x.safetensors")]), ())


def test_sizes_of_a_family_have_names(tmp_path: Path) -> None:
    names = {f"blocks.{i}.{m}.weight": (1536, 1536) for i in range(2) for m in ("attn1.to_q", "attn2.to_k")}
    write_sparse(tmp_path / "model.safetensors", names)
    factors = {"blocks.0.attn1.to_q": (torch.randn(4, 5120), torch.randn(5120, 4))}
    write_lora(tmp_path / "x.safetensors", factors, COMFY)
    plan = plan_fuse(open_checkpoint(tmp_path / "model.safetensors"), [LoraRequest(tmp_path / "x.safetensors")])
    assert plan.loras[0].cause == "this LoRA's shapes are of the 14B model; the base is 1.3B"


def test_flat_names_are_looked_up_not_guessed(tmp_path: Path) -> None:
    """Two modules that flatten to one name cannot be told apart, so neither is taken."""
    save_file({"a.b_c.weight": torch.zeros(48, 48), "a_b.c.weight": torch.zeros(48, 48)}, tmp_path / "m.safetensors")
    write_lora(tmp_path / "x.safetensors", {"a.b.c": (A, B)}, KOHYA)
    plan = plan_fuse(open_checkpoint(tmp_path / "m.safetensors"), [LoraRequest(tmp_path / "x.safetensors")])
    assert plan.problems[0].kind is ProblemKind.NO_SUCH_MODULE
    assert not plan.patches


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "absent.safetensors", "folder"])
def test_unreadable_loras_are_problems_with_their_path(base: Checkpoint, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    plan = plan_fuse(base, [LoraRequest(tmp_path / name)])
    assert [problem.kind for problem in plan.problems] == [ProblemKind.NOT_A_LORA]
    assert name in plan.problems[0].detail


def test_a_checkpoint_is_no_lora(base: Checkpoint) -> None:
    plan = plan_fuse(base, [LoraRequest(base.files[0].path)])
    assert "is no LoRA" in plan.problems[0].detail


def test_a_base_with_nan_is_an_error(tmp_path: Path) -> None:
    weight = torch.zeros(48, 48)
    weight[3, 3] = float("nan")
    save_file({f"{TO_Q}.weight": weight}, tmp_path / "m.safetensors")
    plan = planned(open_checkpoint(tmp_path / "m.safetensors"), tmp_path, GOOD)
    with pytest.raises(LorafuseError, match="not finite"):
        fuse(plan, FuseOptions(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_lone_lightning_alpha_is_incomplete(base: Checkpoint, tmp_path: Path) -> None:
    factors = make_factors(MODULES[:1])
    path = write_lora(tmp_path / "x.safetensors", factors, LIGHTNING, 2.0)
    plan = planned(base, tmp_path, {**GOOD, "transformer_blocks.0.attn.to_v.alpha": torch.tensor(1.0)})
    assert path.exists()
    assert [problem.kind for problem in plan.problems] == [ProblemKind.INCOMPLETE_MODULE]


@pytest.mark.parametrize(
    ("alphas", "says"),
    [((4.0, 2.0), None), ((4.0, 0.4), "vary between 0.1 and 1"), ((80.0, 4.0), "scale of 20 is unusually large")],
)
def test_unusual_scales_are_pointed_out(
    base: Checkpoint, tmp_path: Path, alphas: tuple[float, float], says: str | None
) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for module, alpha in zip((TO_Q, "transformer_blocks.0.attn.to_k"), alphas, strict=True):
        tensors |= {f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B}
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    plan = planned(base, tmp_path, tensors)
    assert not plan.problems
    assert [note for note in plan.loras[0].notes if (says or "") in note] == list(plan.loras[0].notes)
    assert (says is None) == (not plan.loras[0].notes)
    assert (says or "lora ") in describe_plan(plan)


def broken(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A good LoRA with one thing wrong."""
    changed = dict(tensors)
    if name == "renamed factor":
        changed[f"{TO_Q}.lora_C.weight"] = changed.pop(f"{TO_Q}.lora_B.weight")
    elif name == "renamed module":
        changed = {key.replace("to_q", "to_quarry"): value for key, value in changed.items()}
    elif name == "another rank":
        changed[f"{TO_Q}.lora_A.weight"] = A[:3]
    elif name == "infinite alpha":
        changed[f"{TO_Q}.alpha"] = torch.tensor(float("inf"))
    elif name == "another width":
        changed[f"{TO_Q}.lora_B.weight"] = B[:40]
    elif name == "qkv and to_q":
        qkv = f"{TO_Q.removesuffix('to_q')}to_qkv"
        changed |= {f"{qkv}.lora_A.weight": A, f"{qkv}.lora_B.weight": torch.randn(144, 4)}
    return changed


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("renamed factor", {ProblemKind.UNREAD_KEY, ProblemKind.INCOMPLETE_MODULE}),
        ("renamed module", {ProblemKind.NO_SUCH_MODULE}),
        ("another rank", {ProblemKind.SHAPE_MISMATCH}),
        ("another width", {ProblemKind.SHAPE_MISMATCH}),
        ("infinite alpha", {ProblemKind.SCALE_CONFLICT}),
        ("qkv and to_q", {ProblemKind.DUPLICATE_MODULE}),
    ],
)
def test_broken_files_give_the_right_kind(base: Checkpoint, tmp_path: Path, name: str, kinds: set[ProblemKind]) -> None:
    plan = planned(base, tmp_path, broken(name, GOOD))
    assert {problem.kind for problem in plan.problems} - {ProblemKind.NO_EFFECT} == kinds
    with pytest.raises(PlanError, match=next(iter(kinds))):
        require_clean(plan, ())


def test_a_truncated_file_is_no_lora(base: Checkpoint, tmp_path: Path) -> None:
    planned(base, tmp_path, GOOD)
    raw = (tmp_path / "x.safetensors").read_bytes()
    for size in (0, 7, 40, len(raw) - 1):
        (tmp_path / "x.safetensors").write_bytes(raw[:size])
        plan = plan_fuse(base, [LoraRequest(tmp_path / "x.safetensors")])
        assert [problem.kind for problem in plan.problems] == [ProblemKind.NOT_A_LORA]
        assert "x.safetensors" in plan.problems[0].detail


@pytest.mark.parametrize(
    ("suffix", "says"),
    [
        (".oft_R.weight", "PEFT's OFT"),
        (".hra_u.default", "HRA"),
        (".vera_lambda_b", "VeRA"),
        (".ia3_l", r"\(IA\)\^3"),
        (".lambda_layer", "timestep"),
    ],
)
def test_what_cannot_be_fused_statically_is_refused_by_name(
    base: Checkpoint, tmp_path: Path, suffix: str, says: str
) -> None:
    plan = planned(base, tmp_path, {**GOOD, f"{TO_Q.replace('to_q', 'to_k')}{suffix}": torch.ones(48)})
    assert [problem.kind for problem in plan.problems] == [ProblemKind.UNKNOWN_ALGEBRA]
    with pytest.raises(PlanError, match=says):
        require_clean(plan, ())


def test_kohyas_own_oft_is_not_taken_for_lycoris(base: Checkpoint, tmp_path: Path) -> None:
    blocks = {f"{TO_Q}.oft_blocks": torch.randn(12, 4, 4)}
    assert planned(base, tmp_path, blocks).problems == ()
    save_file(blocks, tmp_path / "x.safetensors", {"ss_network_module": "networks.oft_flux"})
    plan = plan_fuse(base, [LoraRequest(tmp_path / "x.safetensors")])
    assert plan.problems[0].kind is ProblemKind.UNKNOWN_ALGEBRA
    assert "kohya" in plan.problems[0].detail
