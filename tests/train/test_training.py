"""Whole trainings through the command line, on a fused checkpoint that `lorafuse fuse` wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import compute_loss_weighting_for_sd3
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from train import tiny
from train.runs import run, save_world, step_rows

from lorafuse_common.errors import CheckpointError
from lorafuse_common.manifest import read_manifest
from lorafuse_train.encoding.cache import load
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.recipes.qwen_image import QwenImage
from lorafuse_train.steps.objective import draw
from lorafuse_train.steps.timesteps import NoiseLevels


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


def effect(out: Path, world: Path) -> torch.Tensor:
    """What the LoRA in `out`, loaded by diffusers alone, adds to a prediction of the fused model."""
    pipe = DiffusionPipeline.from_pretrained(world / "fused")
    recipe = QwenImage()
    generator = torch.Generator().manual_seed(0)
    x, caption = torch.randn(1, 4, 8, 8, generator=generator), {"embeds": torch.randn(3, 16, generator=generator)}

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return recipe.predict(pipe.transformer, x, torch.tensor([0.5]), recipe.collate([caption]))

    bare = predict()
    pipe.load_lora_weights(out, weight_name=FILE_NAME)
    return predict() - bare


def picture_of(printed: str) -> Any:
    """Run the code that a training prints at its end."""
    scope: dict[str, Any] = {}
    exec(textwrap.dedent(printed.split("use it:\n")[1]), scope)
    return scope["image"]


def test_a_training_from_start_to_end(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in (world / "fused").rglob("*") if path.is_file()}
    out = run(
        world, tmp_path / "out", "--use-gradient-checkpointing", "--verify",
        lora_alpha=8, lora_fused=world / "lightning.safetensors", original_model=world / "base",
        checkpointing_steps=2, validation_steps=2,
    )  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "checkpoint-2", "checkpoint-3", "health.png", "images", "logs", "metrics.csv", "metrics.jsonl",
        FILE_NAME, "samples", "samples.png", "train_config.yaml",
    ]  # fmt: skip
    rows = step_rows(out)
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert all(float(row["loss"]) > 0 and row["lr"] == "0.01" for row in rows)
    assert effect(out, world).norm() > 0
    assert effect(out / "checkpoint-2", world).norm() > 0
    with Image.open(out / "samples.png") as sheet:
        assert sheet.height > 6 * 128  # original, fused and new LoRA, at 2 steps and long
    printed = capsys.readouterr().out
    for part in (
        "fused: lightning.safetensors x 1; 2-step schedule",
        "to_q                        2\n",
        "sigmas=[1, 0.6]",
    ):
        assert part in printed
    assert {path: path.read_bytes() for path in before} == before
    assert picture_of(printed).size == (32, 32)

    def unneeded(*_: object) -> None:
        raise AssertionError("a warm start loads no encoder")

    monkeypatch.setattr(QwenImage, "load_text_encoder", unneeded)
    monkeypatch.setattr(QwenImage, "encode_image", unneeded)
    again = run(world, tmp_path / "again", "--config", str(out / "train_config.yaml"), lora_alpha=None, lora_rank=None)
    assert load_file(again / FILE_NAME).keys() == load_file(out / FILE_NAME).keys()


def test_the_header_tells_diffusers_the_scale_and_users_the_base(world: Path, tmp_path: Path) -> None:
    out = run(world, tmp_path / "out", lora_alpha=2)
    manifest = read_manifest(world / "fused")
    assert manifest
    with safe_open(out / FILE_NAME, "pt") as file:
        metadata = file.metadata()
    ours, adapter = json.loads(metadata["lorafuse"]), json.loads(metadata["lora_adapter_metadata"])
    assert (adapter["transformer.r"], adapter["transformer.lora_alpha"]) == (4, 4)  # alpha 2 is in B
    assert ours["fused_sha256"] == manifest.fused_sha256
    assert ours["fused_loras"] == [
        {"name": "lightning.safetensors", "sha256": manifest.loras[0].sha256, "strength": 1.0}
    ]
    assert ours["schedule"]["sigmas"] == [1.0, 0.6]
    assert str(tmp_path) not in json.dumps(metadata)
    assert str(world) not in json.dumps(metadata)
    # compare with the formula on a module whose LoRA diffusers has loaded
    state = load_file(out / FILE_NAME)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    pipe = DiffusionPipeline.from_pretrained(world / "fused")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    x = torch.randn(3, 32)
    expected = layer(x) + x @ state[f"{PREFIX}.lora_A.weight"].T @ state[f"{PREFIX}.lora_B.weight"].T
    pipe.load_lora_weights(out, weight_name=FILE_NAME)
    assert torch.allclose(pipe.transformer.transformer_blocks[0].attn.to_q(x), expected, atol=1e-5)


PREFIX = "transformer.transformer_blocks.0.attn.to_q"


def test_the_same_run_gives_the_same_bytes_and_another_seed_does_not(world: Path, tmp_path: Path) -> None:
    files = [run(world, tmp_path / name, seed=seed) / FILE_NAME for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, second, other = (file.read_bytes() for file in files)
    assert first == second
    assert first != other


def test_accumulation_equals_a_larger_batch(world: Path, tmp_path: Path) -> None:
    data = tiny.save_dataset(tmp_path / "data", ((32, 32),) * 6)
    split = {4: 1, 2: 2, 1: 4}
    states = [
        load_file(
            run(world, tmp_path / str(batch), dataset_base_path=data, train_batch_size=batch,
                gradient_accumulation_steps=passes, max_train_steps=2, max_grad_norm=0.1) / FILE_NAME
        )
        for batch, passes in split.items()
    ]  # fmt: skip
    for other in states[1:]:
        assert max((other[name] - tensor).abs().max() for name, tensor in states[0].items()) < 1e-6


PLAIN: dict[str, Any] = {"timestep_shift": 3, "max_grad_norm": 0.05}
RICH: dict[str, Any] = {
    "timestep_shift": 3, "max_grad_norm": 0, "optimizer": "torch.optim.NAdam", "optimizer_args": "eps=1e-4",
    "loss_weighting": "cosmap", "caption_dropout": 1, "masked_loss": "mask", "masked_loss_background": 0.25,
}  # fmt: skip


@pytest.mark.parametrize("options", [PLAIN, RICH], ids=["plain", "rich"])
def test_two_steps_equal_a_hand_written_loop(world: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """Against PEFT, torch's optimizers and the transformer called directly; only the random numbers are shared."""
    data = tiny.save_dataset(tmp_path / "data", ((32, 32),))
    (data / "metadata.csv").write_text("image,prompt,mask\n0.png,a red circle,mask.png\n")
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).resize((32, 32), 0).save(data / "mask.png")
    chosen = {"max_train_steps": 2, "train_batch_size": 1, "seed": 5, **options}
    ours = load_file(run(world, tmp_path / "out", dataset_base_path=data, **chosen) / FILE_NAME)
    (latents,) = (load(path)["x0"] for path in (data / ".lorafuse_cache" / "latents").rglob("*.safetensors"))
    pipe = DiffusionPipeline.from_pretrained(world / "fused")
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt("" if options is RICH else "a red circle")
    transformer = pipe.transformer.requires_grad_(False)
    names = sorted({name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in ours})
    torch.manual_seed(5)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=names))
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)
    weight = torch.ones(8, 8)
    if options is RICH:
        optimizer = torch.optim.NAdam(parameters, lr=0.01, eps=1e-4)
        weight = 0.25 + 0.75 * torch.arange(64).view(8, 8) * 4 / 255
    for step in range(2):
        random = draw(NoiseLevels(), 3.0, (4, 8, 8), seed=5, step=step, first=0, count=1)
        noisy = torch.lerp(latents[None], random.noise, random.sigma)
        out = transformer(packed(noisy), embeds, timestep=random.sigma, img_shapes=[[(1, 4, 4)]], return_dict=False)[0]
        error = (out - packed(random.noise - latents)) ** 2
        whole = packed(weight.expand(1, 4, 8, 8))
        loss = (whole * error).sum() / whole.sum()
        if options is RICH:
            loss = loss * compute_loss_weighting_for_sd3("cosmap", random.sigma)[0]
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, options["max_grad_norm"] or 1e9)
        optimizer.step()
        optimizer.zero_grad()
    theirs = get_peft_model_state_dict(transformer)
    assert max((ours[f"transformer.{name}"] - tensor).abs().max() for name, tensor in theirs.items()) < 1e-5


def packed(x: torch.Tensor) -> torch.Tensor:
    """(1, 4, 8, 8) -> (1, 16, 16), by 2x2 patches."""
    return x.reshape(1, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 16)


def test_gradient_checkpointing_changes_nothing(world: Path, tmp_path: Path) -> None:
    plain = load_file(run(world, tmp_path / "plain") / FILE_NAME)
    spared = load_file(run(world, tmp_path / "spared", "--use_gradient_checkpointing") / FILE_NAME)
    assert max((spared[name] - tensor).abs().max() for name, tensor in plain.items()) < 1e-6


def test_it_learns_one_picture(world: Path, tmp_path: Path) -> None:
    """Overfit: the loss falls far below that of predicting nothing, on noise levels it has not seen."""
    data = tiny.save_dataset(tmp_path / "data", ((32, 32),))
    out = run(
        world, tmp_path / "out", dataset_base_path=data, dataset_repeat=4, train_batch_size=4, max_train_steps=120,
        lora_rank=16, learning_rate=0.01, lora_target_modules="preset",
    )  # fmt: skip
    losses = [float(row["loss"]) for row in step_rows(out)]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


def test_bf16_base_and_bare_transformer_folder(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import QwenImageTransformer2DModel

    half = QwenImageTransformer2DModel.from_pretrained(world / "fused" / "transformer", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    with pytest.raises(CheckpointError, match="--pretrained_model_name_or_path"):
        run(tmp_path, tmp_path / "out", "--allow_unfused_base", fused="half", dataset_base_path=world / "data")
    out = run(
        tmp_path, tmp_path / "out", "--allow_unfused_base", fused="half", dataset_base_path=world / "data",
        pretrained_model_name_or_path=world / "base", lora_target_modules=r"regex:.*\.0\.attn\.to_[qv]",
    )  # fmt: skip
    state = load_file(out / FILE_NAME)
    assert len(state) == 4
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    printed = capsys.readouterr().out
    assert "bf16 autocast because the base is bfloat16" in printed
    assert picture_of(printed).size == (32, 32)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(world: Path, tmp_path: Path) -> None:
    """Five batches an epoch over two processes: in every third step, one of them has nothing to do."""
    data = tiny.save_dataset(tmp_path / "data", ((32, 32),) * 5)
    options: dict[str, Any] = {
        "dataset_base_path": data,
        "train_batch_size": 1,
        "max_train_steps": 4,
        "max_grad_norm": 0.1,
    }
    alone = run(world, tmp_path / "alone", gradient_accumulation_steps=2, **options)
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    arguments += ["--fused_model", str(world / "fused"), "--output_path", str(tmp_path / "both"), "--lora_rank", "4"]
    arguments += ["--learning_rate", "0.01", "--lr_warmup_steps", "0", "--validation_inference_steps", "2"]
    arguments += ["--validation_prompt", "a red circle", "--objective_base", "fused", "--preserve_weight", "0"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [*launch, "-m", "lorafuse_train", "train", *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 1
    one, two = load_file(alone / FILE_NAME), load_file(tmp_path / "both" / FILE_NAME)
    # Adam divides by a gradient's own size, and so makes much of its rounding.
    assert max((two[name] - tensor).abs().max() for name, tensor in one.items()) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_training_on_cuda(world: Path, tmp_path: Path, dtype: str) -> None:
    out = run(world, tmp_path / "out", "--use_gradient_checkpointing", base_dtype=dtype)
    assert effect(out, world).norm() > 0
