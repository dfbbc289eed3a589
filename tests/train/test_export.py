"""The LoRA in other dialects: what diffusers and PEFT make of the files, and files that are not what was trained."""

from __future__ import annotations

import copy
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from train import tiny, tiny_flux, tiny_flux2, tiny_sd3, tiny_wan, tiny_z_image
from train.runs import run, save_world

import lorafuse_fuse.cli
from lorafuse_common.conversion import plan_conversion, write_conversion
from lorafuse_common.dialects.kohya import KOHYA
from lorafuse_common.errors import ConfigError, LorafuseError
from lorafuse_common.families.flux import FLUX
from lorafuse_common.lora import read_lora
from lorafuse_train.base import open_base
from lorafuse_train.lora import export
from lorafuse_train.lora.adapter import FILE_NAME, attach, lora_state
from lorafuse_train.lora.export import PLACES, Exporter, Update, plan_exports, update_gap
from lorafuse_train.lora.lora_file import load_back, pipeline_of, read_as_diffusers, save_lora
from lorafuse_train.lora.targets import meta_model, resolve_targets
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import resolve_config
from lorafuse_train.recipes import RECIPES

FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen_image": (tiny, {}),
    "flux": (tiny_flux, {}),
    "flux2": (tiny_flux2, {}),
    "sd3": (tiny_sd3, {}),
    "wan": (tiny_wan, {}),
    "z_image": (tiny_z_image, {}),
}
READ_BY_DIFFUSERS: dict[str, set[str]] = {
    "qwen_image": {"comfyui", "kohya"},
    "flux": set(),
    "flux2": {"comfyui", "kohya"},
    "sd3": set(),
    "wan": {"comfyui", "kohya"},
    "z_image": {"kohya"},
}
"""With the family's preset of targets, at this size: diffusers takes kohya's FLUX for as wide as it really is."""


def config(folder: Path, out: Path, **given: Any) -> TrainConfig:
    options = {"fused_model": folder, "dataset_base_path": "x", "output_path": out, "allow_unfused_base": "yes"}
    return resolve_config({**options, "lora_rank": 3, "export": "comfyui,kohya,peft", **given})


class Trained:
    """A LoRA of random values on a tiny pipeline, as if it had been trained, and its diffusers file."""

    def __init__(self, folder: Path, out: Path, **given: Any) -> None:
        self.config, self.folder = config(folder, out, **given), folder
        self.base = open_base(self.config)
        model = meta_model(self.base.config["_class_name"], self.base.config)
        self.targets = resolve_targets(model, self.base.family, self.config.lora_target_modules)
        plan_exports(model, self.base, self.targets, self.config)
        self.transformer = self.fresh(torch.bfloat16 if self.config.base_dtype == "bf16" else torch.float32)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in attach(self.transformer, self.targets, self.config).items():
            scale = 0.05 if "magnitude" in name else 0.3
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
        self.state, self.file = lora_state(self.transformer), out / FILE_NAME
        save_lora(self.file, self.state, {"format": "pt"})

    def fresh(self, dtype: torch.dtype = torch.float32) -> Any:
        import diffusers

        cls = getattr(diffusers, self.base.config["_class_name"])
        return cls.from_pretrained(self.base.transformer, dtype=dtype).requires_grad_(False).eval()

    def export(self) -> None:
        Exporter(self.base, self.config, self.transformer, self.state).write(self.file)

    def wanted(self) -> dict[str, Tensor]:
        """The weights that a plain LoRA gives, in float64."""
        weights = {name: value.double() for name, value in self.fresh().state_dict().items()}
        for name, a in self.state.items():
            if ".lora_A." in name:
                module = name.removeprefix("transformer.").partition(".lora_A.")[0]
                b = self.state[name.replace("lora_A", "lora_B")]
                weight = weights[f"{module}.weight"]
                weights[f"{module}.weight"] = weight + (b.double().flatten(1) @ a.double().flatten(1)).view_as(weight)
        return weights


def as_diffusers_loads(trained: Trained, file: Path) -> dict[str, Tensor]:
    transformer = trained.fresh()
    loaded = pipeline_of(transformer, trained.folder)
    loaded.load_lora_weights(file.parent, weight_name=file.name)
    loaded.fuse_lora(components=["transformer"])
    loaded.unload_lora_weights()
    return dict(transformer.state_dict())


def as_peft_loads(trained: Trained, folder: Path) -> dict[str, Tensor]:
    return dict(PeftModel.from_pretrained(trained.fresh(), folder).merge_and_unload().state_dict())


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert torch.allclose(value.double(), wanted[name].double(), rtol=1e-5, atol=1e-5), name


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {name: made.save_pipeline(root / name, **options) for name, (made, options) in FAMILIES.items()}


def test_every_family_is_here() -> None:
    assert {recipe.family for recipe in RECIPES} == {*FAMILIES} == {*READ_BY_DIFFUSERS}


@pytest.mark.parametrize("family", FAMILIES)
def test_readers_get_the_deltas_that_were_trained(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    """With two ranks and a scale, by diffusers and PEFT themselves, added to the weights and compared in float64."""
    targets = resolve_config({"fused_model": "x", "dataset_base_path": "x", "output_path": "x"}).lora_target_modules
    trained = Trained(folders[family], tmp_path, lora_target_modules=targets, lora_alpha=2)
    trained.export()
    said, wanted = capsys.readouterr().out, trained.wanted()
    assert_close(as_diffusers_loads(trained, trained.file), wanted)
    assert_close(as_peft_loads(trained, tmp_path / "peft"), wanted)
    read = {name for name in ("comfyui", "kohya") if f"{tmp_path / PLACES[name]}; diffusers loads it too" in said}
    assert read == READ_BY_DIFFUSERS[family]
    for name in read:
        assert_close(as_diffusers_loads(trained, tmp_path / PLACES[name]), wanted)
    for name in {"comfyui", "kohya"} - read:
        assert f"{tmp_path / PLACES[name]}; read back, it has the deltas that were trained" in said
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "adapter_config.json", "adapter_model.safetensors", "comfyui.safetensors", "kohya.safetensors", FILE_NAME,
    ]  # fmt: skip
    assert not any("checked" in path.name for path in tmp_path.iterdir())
    load_back(trained.transformer, trained.folder, trained.file)  # the model is fit for use again


def test_an_expert_of_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Wan 2.2's files do not say for which one they are; each reader is told."""
    folder = tiny_wan.save_pipeline(tmp_path / "base", **tiny_wan.KINDS["t2v a14b"])
    trained = Trained(folder, tmp_path, component="transformer_2")
    trained.export()
    assert capsys.readouterr().out.count("loads it") == 3


def test_keys_are_those_of_each_dialect(folders: dict[str, Path], tmp_path: Path) -> None:
    """FLUX, whose original layout joins q, k and v: 3 ranks of 3 in one module, block by block."""
    trained = Trained(folders["flux"], tmp_path, lora_target_modules="to_q,to_k,to_v")
    trained.export()
    comfy, kohya = (load_file(tmp_path / PLACES[name]) for name in ("comfyui", "kohya"))
    b = comfy["diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight"]
    a = comfy["diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight"]
    ours = [trained.state[f"transformer.transformer_blocks.0.attn.to_{x}.lora_{f}.weight"] for x in "qkv" for f in "BA"]
    parts = [ours[2 * k].double() @ ours[2 * k + 1].double() for k in range(3)]
    assert torch.allclose(b.double() @ a.double(), torch.cat(parts), atol=1e-6)
    assert kohya["lora_unet_double_blocks_0_img_attn_qkv.alpha"] == len(a) == 9
    settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (3, 3, "LORA")


def test_diffusers_reads_kohyas_flux_as_wide_as_it_is(tmp_path: Path) -> None:
    generator, width = torch.Generator().manual_seed(0), 3072
    names = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    names += [f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"] + ["single_transformer_blocks.0.proj_mlp"]
    tensors = {}
    for name in names:
        rows = 4 * width if "mlp" in name else width
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    save_file(tensors, tmp_path / "lora.safetensors")
    plan = plan_conversion(read_lora(tmp_path / "lora.safetensors"), KOHYA, family=FLUX)
    write_conversion(plan, tmp_path / "kohya.safetensors")
    read, alphas = FluxPipeline.lora_state_dict(tmp_path / "kohya.safetensors", return_alphas=True)
    assert not alphas  # they are in A and B already
    found = export.updates_of(read)
    wanted = export.updates_of(tensors)
    assert found.keys() == wanted.keys()
    assert max(update_gap(wanted[name], found[name]) for name in wanted) < 1e-5


def test_a_bf16_base(folders: dict[str, Path], tmp_path: Path) -> None:
    trained = Trained(folders["qwen_image"], tmp_path, base_dtype="bf16")
    trained.export()
    assert_close(as_diffusers_loads(trained, tmp_path / PLACES["comfyui"]), trained.wanted())


def test_dora_is_held_by_every_dialect_where_whole_modules_are_trained(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Trained(folders["flux"], tmp_path, use_dora="yes", lora_target_modules="to_q,to_k,to_v,proj_mlp")
    trained.export()
    assert capsys.readouterr().out.count("it has the deltas and magnitudes that were trained") == 2
    merged = as_diffusers_loads(trained, trained.file)
    assert_close(as_peft_loads(trained, tmp_path / "peft"), merged)
    for name in ("comfyui", "kohya"):
        tensors = load_file(tmp_path / PLACES[name])
        prefix, dot = ("diffusion_model.", ".") if name == "comfyui" else ("lora_unet_", "_")
        stem = prefix + f"double_blocks{dot}0{dot}img_attn{dot}qkv"
        down, up = ("A", "B") if name == "comfyui" else ("down", "up")
        a, b = (tensors[f"{stem}.lora_{side}.weight"].double() for side in (down, up))
        whole = torch.cat([trained.fresh().get_parameter(f"{BLOCK}.to_{x}.weight") for x in "qkv"]).double() + b @ a
        weight = whole * tensors[f"{stem}.dora_scale"].double() / whole.norm(dim=1, keepdim=True)  # ComfyUI's formula
        wanted = torch.cat([merged[f"{BLOCK}.to_{x}.weight"] for x in "qkv"]).double()
        assert torch.allclose(weight, wanted, atol=1e-5)


BLOCK = "transformer_blocks.0.attn"


def test_dora_of_a_part_is_refused_before_the_training(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Trained(folders["flux"], tmp_path, use_dora="yes", lora_target_modules="to_q")
    for name in ("comfyui", "kohya"):
        assert f"--export {name}: cannot be written as {name}" in str(caught.value)
    assert "is dora and would be joined to" in str(caught.value)
    assert "--export peft" not in str(caught.value)
    Trained(folders["flux"], tmp_path, use_dora="yes", lora_target_modules="to_q", export="peft").export()
    Trained(folders["flux"], tmp_path, lora_target_modules="to_q").export()


@pytest.mark.parametrize(("family", "name"), [("sd3", "comfyui"), ("flux", "kohya"), ("qwen_image", "peft")])
def test_a_file_that_is_not_what_was_trained_gets_no_name(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, name: str
) -> None:
    """One number of one tensor, written wrongly; the command that is told writes it rightly."""
    trained = Trained(folders[family], tmp_path, export=name, lora_target_modules="preset")

    def spoiled(file: Path, metadata: dict[str, str]) -> None:
        tensors = load_file(file)
        key = min(key for key in tensors if "lora_B" in key or "lora_up" in key)
        tensors[key][0, 0] += 0.5
        save_file(tensors, file, metadata)

    monkeypatch.setattr(export, "set_metadata", spoiled)
    with pytest.raises(LorafuseError, match=r"is not what was trained .its delta is off by") as caught:
        trained.export()
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    command = str(caught.value).split("`")[1]
    lorafuse_fuse.cli.app(shlex.split(command)[1:], standalone_mode=False)
    written, _ = read_as_diffusers(tmp_path / PLACES[name], trained.base.transformer)
    found, wanted = export.updates_of(written), export.updates_of(trained.state)
    assert found.keys() == wanted.keys()
    assert max(update_gap(wanted[module], found[module]) for module in wanted) < 1e-5


def test_a_reader_that_gets_other_values_is_believed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(folders["qwen_image"], tmp_path, export="peft")
    load = PeftModel.from_pretrained

    def other(model: Any, folder: Path, **arguments: Any) -> Any:
        settings = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 2 * settings["lora_alpha"]}))
        return load(model, folder, **arguments)

    monkeypatch.setattr(PeftModel, "from_pretrained", other)
    with pytest.raises(LorafuseError, match=r"off by 100\.0% of its length"):
        trained.export()
    assert not (tmp_path / "peft").exists()


def test_gaps_are_those_of_the_products() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 40, generator=generator), torch.randn(50, 3, generator=generator)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    one, same = Update(a, b, None), Update(turn @ a, b @ turn.T, None)
    assert update_gap(one, same) < 1e-6
    other = Update(a, b + 0.1 * torch.randn(50, 3, generator=generator), None)
    wanted = ((other.b - b) @ a).norm() / (b @ a).norm()
    assert update_gap(one, other) == pytest.approx(float(wanted), rel=1e-5)
    rows = torch.ones(50)
    assert update_gap(Update(a, b, rows), Update(a, b, 1.5 * rows)) == pytest.approx(0.5)
    assert update_gap(Update(a, b, rows), one) == float("inf")
    assert update_gap(one, Update(a[:, :30], b, None)) == float("inf")


def test_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training of components (PiSSA) with every file; a second one there leaves none of the first."""
    world = save_world(tmp_path)
    options: dict[str, Any] = {"init_lora_weights": "pissa", "max_train_steps": 2, "lora_target_modules": "to_q,to_k"}
    out = run(world, tmp_path / "out", "--export", "kohya", "--export", "peft,comfyui", **options)
    assert {path.name for path in out.glob("*.safetensors")} == {FILE_NAME, "comfyui.safetensors", "kohya.safetensors"}
    pipe = QwenImagePipeline.from_pretrained(world / "fused")
    fresh = copy.deepcopy(pipe.transformer)
    pipe.load_lora_weights(out, weight_name="comfyui.safetensors")
    pipe.fuse_lora(components=["transformer"])
    pipe.unload_lora_weights()
    weights, state = dict(fresh.state_dict()), load_file(out / FILE_NAME)
    name = "transformer_blocks.0.attn.to_q"
    delta = state[f"transformer.{name}.lora_B.weight"] @ state[f"transformer.{name}.lora_A.weight"]
    assert torch.allclose(
        pipe.transformer.get_parameter(f"{name}.weight"), weights[f"{name}.weight"] + delta, atol=1e-5
    )
    with safe_open(out / "kohya.safetensors", "pt") as file:
        header = file.metadata()
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("8", "8")
    assert "lora_adapter_metadata" not in header
    assert header["modelspec.implementation"] == "https://github.com/QwenLM/Qwen-Image"
    assert json.loads(header["lorafuse"])["steps"] == 2
    assert "use it:" in capsys.readouterr().out
    run(world, out, "--overwrite_output_dir", **options)
    assert {path.name for path in out.glob("*.safetensors")} == {FILE_NAME}
    assert not (out / "peft" / "adapter_config.json").exists()
    with pytest.raises(ConfigError, match="export: found 'comfy', expected some of diffusers, comfyui, kohya, peft"):
        run(world, tmp_path / "next", export="comfy", **options)
