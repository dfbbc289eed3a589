"""What keeps the few-step ability, against diffusers' pipelines, PEFT and the original base."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from train import tiny
from train.runs import run, save_world

import lorafuse_fuse.cli
from lorafuse_common.errors import ConfigError
from lorafuse_common.manifest import MANIFEST_NAME
from lorafuse_fuse.usage import SCHEDULE_KEY
from lorafuse_train.encoding.cache import load
from lorafuse_train.few_step import trajectories
from lorafuse_train.few_step.coupling import Coupling, assign
from lorafuse_train.few_step.preserve import draw_visits
from lorafuse_train.few_step.trajectories import starting_noise
from lorafuse_train.lora.adapter import FILE_NAME
from lorafuse_train.steps.objective import draw
from lorafuse_train.steps.timesteps import NoiseLevels

PROMPTS = ["a blue circle", "a green square", "a navy star", "a red sketch"]
KEPT: dict[str, Any] = {"objective_base": "auto", "preserve_weight": "auto", "preserve_count": 3}
"""The options of a training that keeps what was fused."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = save_world(tmp_path_factory.mktemp("world"))
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def fuse(world: Path, out: Path, *more: str) -> Path:
    arguments = ["fuse", str(world / "base"), "--out", str(out), *more]
    lorafuse_fuse.cli.app(arguments, standalone_mode=False)
    return out


def velocity(transformer: Any, x: torch.Tensor, sigma: float, embeds: torch.Tensor) -> torch.Tensor:
    """v (1, 16, 16), packed, of the transformer called directly."""
    shapes = [[(1, 4, 4)]]
    out: torch.Tensor = transformer(
        packed(x), embeds, timestep=torch.tensor([sigma]), img_shapes=shapes, return_dict=False
    )[0]
    return out


def packed(x: torch.Tensor) -> torch.Tensor:
    """(1, 4, 8, 8) -> (1, 16, 16), by 2x2 patches."""
    return x.reshape(1, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(1, 16, 16)


def unpacked(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(1, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 4, 8, 8)


def trained(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / FILE_NAME)


def steps_of(out: Path) -> list[dict[str, Any]]:
    """The metrics of each step; validations have lines of their own."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((other[name] - tensor).abs().max().item() for name, tensor in one.items())


def hand_written(world: Path, data: Path, names: list[str], weight: float) -> dict[str, torch.Tensor]:
    """Two steps: flow matching through the original base, preservation through the fused one, with PEFT alone."""
    (latents,) = (load(path)["x0"] for path in (data / ".lorafuse_cache" / "latents").rglob("*.safetensors"))
    pipes = [DiffusionPipeline.from_pretrained(world / name) for name in ("base", "fused")]
    with torch.no_grad():
        caption, *kept = (pipes[0].encode_prompt(text)[0] for text in ["a red circle", *PROMPTS[:3]])
    models = []
    for pipe in pipes:
        torch.manual_seed(5)
        model = pipe.transformer.requires_grad_(False)
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=names))
        models.append(model)
    parameters = [[p for p in model.parameters() if p.requires_grad] for model in models]
    optimizer = torch.optim.AdamW(parameters[0], lr=0.01, weight_decay=0.01)
    for step in range(2):
        random = draw(NoiseLevels(), 3.0, (4, 8, 8), seed=5, step=step, first=0, count=1)
        noisy = torch.lerp(latents[None], random.noise, random.sigma)
        error = velocity(models[0], noisy, random.sigma.item(), caption) - packed(random.noise - latents)
        torch.autograd.backward(error.square().mean())
        ((number, at),) = draw_visits(1, 3, 2, 5, step, [0])
        x, sigmas = starting_noise(number, (4, 8, 8))[None], [1.0, 0.6, 0.0]
        models[1].disable_adapters()
        with torch.no_grad():
            for sigma, following in itertools.pairwise(sigmas[: at + 1]):
                x = x + (following - sigma) * unpacked(velocity(models[1], x, sigma, kept[number]))
            target = velocity(models[1], x, sigmas[at], kept[number])
        models[1].enable_adapters()
        moved = velocity(models[1], x, sigmas[at], kept[number]) - target
        torch.autograd.backward(weight * moved.square().mean())
        for own, other in zip(*parameters, strict=True):
            assert own.grad is not None
            own.grad += other.grad if other.grad is not None else 0
            other.grad = None
        torch.nn.utils.clip_grad_norm_(parameters[0], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for own, other in zip(*parameters, strict=True):
            other.data.copy_(own.data)
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(models[0])
    return found


@pytest.mark.parametrize("how", ["loras taken off", "weights swapped"])
def test_two_steps_equal_a_hand_written_loop_over_two_models(
    world: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.save_dataset(tmp_path / "data", ((32, 32),))
    (data / "metadata.csv").write_text("image,prompt\n0.png,a red circle\n")
    options: dict[str, Any] = {
        **KEPT, "dataset_base_path": data, "max_train_steps": 2, "train_batch_size": 1, "seed": 5, "timestep_shift": 3,
        "preserve_share": 1, "preserve_weight": 0.7, "preserve_prompts": world / "prompts.txt",
        "original_model": world / "base",
    }  # fmt: skip
    fused = "fused"
    if how == "weights swapped":
        fused = "fused-without-loras"
        fuse(world, world / fused, "--lora", str(world / "lightning.safetensors"), "--schedule", "1,0.6")
        shutil.rmtree(world / fused / "lorafuse", ignore_errors=True)
    ours = trained(run(world, tmp_path / "out", fused=fused, **options))
    printed = capsys.readouterr().out
    assert "through the original weights, because the base is for few steps" in printed
    if how == "weights swapped":
        assert f"tensors of {world / 'base' / 'transformer'} are kept beside" in printed
    else:
        assert "taken off: lightning.safetensors x 1" in printed
        assert "0.00% of what they changed in the weights" in printed  # fp32
        assert "for --objective_base" in printed.split("memory:")[1].splitlines()[0]
    names = sorted({name.removeprefix("transformer.").rsplit(".lora_", 1)[0] for name in ours})
    theirs = hand_written(world, data, names, 0.7)
    assert max((ours[f"transformer.{name}"] - tensor).abs().max() for name, tensor in theirs.items()) < 2e-4
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert rows[0]["preserve_loss"] < 1e-9  # B is zero: nothing has moved yet
    assert rows[1]["preserve_loss"] > 1e-6


def test_trajectories_are_the_pipelines(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "out", **KEPT, preserve_prompts=world / "prompts.txt")
    pipe = DiffusionPipeline.from_pretrained(world / "fused")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.set_progress_bar_config(disable=True)
    found = [load(path) for path in (world / "fused" / "lorafuse" / "trajectories").rglob("*.safetensors")]
    ends = [f["states"][1] - 0.6 * f["velocities"][1] for f in found]
    for number, prompt in enumerate(PROMPTS[:3]):
        noise = starting_noise(number, (4, 8, 8))[None]
        latents = pipe(
            prompt, height=32, width=32, num_inference_steps=2, sigmas=[1.0, 0.6], true_cfg_scale=1.0,
            latents=packed(noise), output_type="latent",
        ).images  # fmt: skip
        assert min((unpacked(latents)[0] - end).abs().max().item() for end in ends) < 1e-5
    # the same trajectories serve every training of this base
    before = {path: path.stat().st_mtime_ns for path in (world / "fused" / "lorafuse").rglob("*.safetensors")}
    run(world, tmp_path / "again", **KEPT, preserve_prompts=world / "prompts.txt", seed=3)
    assert {path: path.stat().st_mtime_ns for path in (world / "fused" / "lorafuse").rglob("*.safetensors")} == before


def test_guided_trajectories_belong_to_their_negative_prompt(world: Path, tmp_path: Path) -> None:
    schedule = tmp_path / "guided.json"
    schedule.write_text('{"sigmas": [1, 0.6], "guidance_scale": 2}')
    lora = str(world / "lightning.safetensors")
    bases = {"guided": fuse(world, tmp_path / "guided", "--lora", lora, "--schedule", str(schedule))}
    bases["plain"] = fuse(world, tmp_path / "plain", "--lora", lora, "--schedule", "1,0.6")
    given = {**KEPT, "preserve_count": 1, "preserve_prompts": world / "prompts.txt", "max_train_steps": 1}

    def found(name: str, negative: str) -> list[dict[str, torch.Tensor]]:
        run(world, tmp_path / "out", "--overwrite_output_dir", fused=str(bases[name]), **given,
            validation_negative_prompt=negative)  # fmt: skip
        return [load(path) for path in (bases[name] / "lorafuse" / "trajectories").rglob("*.safetensors")]

    assert len(found("plain", "blue")) == len(found("plain", "green")) == 1
    assert len(found("guided", "blue")) == 1
    one, other = found("guided", "green")
    assert one["states"][0].equal(other["states"][0])
    assert not one["states"][1].equal(other["states"][1])


def test_trajectories_of_a_base_that_may_not_be_written_lie_in_the_cache(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafuse_train.few_step.trajectories.os.access", lambda *_: False)
    assert trajectories.choose_folder(world / "fused", tmp_path) == tmp_path / "trajectories"


def test_preservation_does_not_depend_on_how_a_step_is_split(world: Path, tmp_path: Path) -> None:
    """But for the order of fp32 sums, which Adam's division makes larger, by how much depends on the processor."""
    data = tiny.save_dataset(tmp_path / "data", ((32, 32),) * 4)

    def state(batch: int, weight: str = "auto") -> dict[str, torch.Tensor]:
        options = {**KEPT, "preserve_weight": weight, "dataset_base_path": data, "max_grad_norm": 0.1}
        out = tmp_path / f"{batch}-{weight}"
        return trained(run(world, out, train_batch_size=batch, gradient_accumulation_steps=4 // batch,
                           max_train_steps=2, **options))  # fmt: skip

    whole = state(4)
    assert max(furthest(whole, state(batch)) for batch in (2, 1)) < 2e-5 < 1e-4 < furthest(whole, state(4, "1.1"))
    drawn = draw_visits(0.5, 7, 3, seed=1, step=2, places=range(400))
    assert 150 < len(drawn) < 250
    assert {number for number, _ in drawn} == set(range(7))
    assert {at for _, at in drawn} == set(range(3))
    assert drawn == [visit for place in range(400) for visit in draw_visits(0.5, 7, 3, 1, 2, [place])]


@pytest.mark.parametrize("kind", ["checkpointing", "pissa", "bf16"])
def test_the_original_weights_with_every_kind_of_training(world: Path, tmp_path: Path, kind: str) -> None:
    """Of the two ways to them, each is the other's reference."""
    kinds: dict[str, dict[str, Any]] = {
        "checkpointing": {"use_gradient_checkpointing": True},
        "pissa": {"init_lora_weights": "pissa"},
        "bf16": {"base_dtype": "bf16", "learning_rate": 1e-3},
    }
    more = kinds[kind]
    bare = world / "fused-bare"
    if not bare.exists():
        fuse(world, bare, "--lora", str(world / "lightning.safetensors"), "--schedule", "1,0.6")
        shutil.rmtree(bare / "lorafuse", ignore_errors=True)
    options = {**KEPT, "preserve_prompts": world / "prompts.txt", "lora_target_modules": "to_k,to_q", **more}
    taken_off = trained(run(world, tmp_path / "off", **options))
    swapped = trained(run(world, tmp_path / "swapped", fused=bare.name, original_model=world / "base", **options))
    plain = trained(run(world, tmp_path / "plain", **{**options, "objective_base": "fused"}))
    size = max(tensor.abs().max().item() for tensor in plain.values())
    assert furthest(taken_off, swapped) < (2e-4 if kind != "bf16" else 0.02 * size) < furthest(taken_off, plain)


def test_a_dora_starts_as_the_original_base(world: Path, tmp_path: Path) -> None:
    """Its first loss is a LoRA's: what is taken off is no part of the weights whose lengths it has."""

    def losses(name: str, **more: Any) -> list[float]:
        out = run(world, tmp_path / name, **KEPT, **more)
        return [row["loss"] for row in steps_of(out)]

    plain, dora = losses("plain"), losses("dora", use_dora=True)
    assert dora[0] == pytest.approx(plain[0], rel=1e-5)
    assert dora[2] != pytest.approx(plain[2], rel=1e-5)
    bare = shutil.copytree(world / "fused", tmp_path / "bare")
    shutil.rmtree(bare / "lorafuse")
    given = {"dataset_base_path": world / "data", "original_model": world / "base", **KEPT}
    with pytest.raises(ConfigError, match="lengths are those of the fused weights"):
        run(tmp_path, tmp_path / "x", fused="bare", use_dora=True, **given)


def test_what_auto_chooses(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = str(world / "lightning.safetensors")
    cases = {
        "many": (("--schedule", "none"), "through the fused weights, because the base is none for few steps"),
        "scaffold": (
            ("--schedule", "1,0.6", "--role", "scaffold"),
            "through the fused weights, because what was fused is a scaffold",
        ),
    }
    for name, (arguments, said) in cases.items():
        fuse(world, world / name, "--lora", lora, *arguments)
        more = {"original_model": world / "base"} if name == "scaffold" else {}
        run(world, tmp_path / name, fused=name, **{**KEPT, "preserve_count": None}, max_train_steps=1, **more)
        printed = capsys.readouterr().out
        assert said in printed
        assert "preservation:" not in printed


def test_a_fused_style_stays_where_only_the_few_steps_are_to_go(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training is that on a checkpoint into which the style alone was fused."""
    tensors = load_file(world / "lightning.safetensors")
    tiny.save_lightning(tmp_path / "style.safetensors", seed=8)
    save_file(tensors, tmp_path / "fast.safetensors", {SCHEDULE_KEY: json.dumps({"sigmas": [1, 0.6]})})
    style, fast = str(tmp_path / "style.safetensors"), str(tmp_path / "fast.safetensors")
    fuse(world, tmp_path / "styled", "--lora", f"{style}:0.7", "--schedule", "none")
    fuse(world, tmp_path / "both", "--lora", fast, "--lora", f"{style}:0.7")
    common: dict[str, Any] = {"dataset_base_path": world / "data"}
    theirs = trained(run(tmp_path, tmp_path / "theirs", fused="styled", **common))
    capsys.readouterr()
    found = {
        asked: trained(run(tmp_path, tmp_path / asked.partition(":")[0], fused="both", objective_base=asked, **common))
        for asked in ("auto", "without:fast.safetensors", "original")
    }
    printed = capsys.readouterr().out
    assert "a part of what was fused, because the base is for few steps; taken off: fast.safetensors x 1 (" in printed
    assert "a part of what was fused, as asked; taken off: fast.safetensors x 1 (" in printed
    assert "say so: --objective_base without:NAME" in printed
    assert furthest(found["auto"], found["without:fast.safetensors"]) == 0
    assert furthest(found["auto"], theirs) < 1e-5 < 1e-3 < furthest(found["auto"], found["original"])
    with pytest.raises(ConfigError, match=r"x was not fused into .*both; expected some of fast.safetensors, style"):
        run(tmp_path, tmp_path / "x", fused="both", objective_base="without:x", **common)
    manifest = json.loads((tmp_path / "both" / MANIFEST_NAME).read_text())
    for lora in manifest["loras"]:
        lora["name"] = "fast.safetensors"
    (tmp_path / "both" / MANIFEST_NAME).write_text(json.dumps(manifest))
    run(tmp_path, tmp_path / "same-names", fused="both", objective_base="auto", **common)
    assert "through the original weights" in capsys.readouterr().out


def test_a_base_that_was_for_few_steps_before(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((world / "fused" / MANIFEST_NAME).read_text())
    manifest["schedule"] |= {"source": "turbo (A few-step model)", "loras": []}
    turbo = shutil.copytree(world / "fused", tmp_path / "turbo")
    (turbo / MANIFEST_NAME).write_text(json.dumps(manifest))
    run(tmp_path, tmp_path / "out", fused="turbo", dataset_base_path=world / "data", **KEPT)
    printed = capsys.readouterr().out
    assert "through the fused weights, because the base drew in few steps before the fuse already" in printed
    assert "preservation: weight 1" in printed
    del manifest["schedule"]["loras"]  # as manifests were before there were such entries
    manifest["schedule"]["source"] = "lightning.safetensors (A few-step LoRA)"
    (turbo / MANIFEST_NAME).write_text(json.dumps(manifest))
    run(tmp_path, tmp_path / "older", fused="turbo", dataset_base_path=world / "data", **KEPT)
    assert "through the original weights, because the base is for few steps" in capsys.readouterr().out


def test_why_the_original_weights_cannot_be_had(world: Path, tmp_path: Path) -> None:
    gone = shutil.copytree(world / "fused", tmp_path / "fused")
    shutil.rmtree(gone / "lorafuse", ignore_errors=True)
    with pytest.raises(ConfigError) as error:
        run(tmp_path, tmp_path / "out", dataset_base_path=world / "data", **KEPT)
    for part in ("lightning.safetensors: its file is not kept in", "--original_model", "--lora_fused", "auto"):
        assert part in str(error.value)
    given = {"dataset_base_path": world / "data", "lora_fused": world / "lightning.safetensors", **KEPT}
    ours = trained(run(tmp_path, tmp_path / "given", **given))
    assert furthest(ours, trained(run(world, tmp_path / "kept", **KEPT))) == 0
    manifest = json.loads((gone / MANIFEST_NAME).read_text())
    manifest["changes"].append({**manifest["changes"][0], "name": "proj_out.weight"})
    (gone / MANIFEST_NAME).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"1 tensors were changed by no weight of these LoRAs .first: proj_out"):
        run(tmp_path, tmp_path / "more", **given)
    with pytest.raises(ConfigError, match="has no few-step schedule"):
        run(world, tmp_path / "x", fused="base", preserve_weight=1, allow_unfused_base=True)
    with pytest.raises(ConfigError, match="nothing was fused into it"):
        run(world, tmp_path / "x", fused="base", objective_base="original", allow_unfused_base=True)


def test_a_fused_dora_takes_the_original_checkpoint(world: Path, tmp_path: Path) -> None:
    tensors = load_file(world / "lightning.safetensors")
    dora = {**tensors}
    for name in tensors:
        if name.endswith(".alpha"):
            dora[name.replace(".alpha", ".dora_scale")] = torch.rand(32, 1) + 0.5
    save_file(dora, tmp_path / "dora.safetensors")
    fuse(world, tmp_path / "fused", "--lora", str(tmp_path / "dora.safetensors"), "--schedule", "1,0.6")
    given = {"dataset_base_path": world / "data", **KEPT}
    with pytest.raises(ConfigError, match=r"dora\.safetensors: 4 of its modules are no plain LoRA"):
        run(tmp_path, tmp_path / "out", **given)
    run(tmp_path, tmp_path / "out", original_model=world / "base", **given)


def test_a_train_adapter_is_in_the_loss_alone(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training on the original base with an adapter equals training on a checkpoint into which it was fused."""
    lora = world / "lightning.safetensors"
    options: dict[str, Any] = {"max_train_steps": 3, "allow_unfused_base": True}
    half = {"train_adapter": f"{lora}:0.5"}
    ours = trained(run(world, tmp_path / "ours", fused="base", **options, **half))
    assert "lightning.safetensors x 0.5, which samples are without" in capsys.readouterr().out
    fuse(world, tmp_path / "half", "--lora", f"{lora}:0.5", "--schedule", "none")
    theirs = trained(run(world, tmp_path / "theirs", fused=str(tmp_path / "half"), **options))
    assert ours.keys() == theirs.keys()
    assert furthest(ours, theirs) < 1e-5
    plain = trained(run(world, tmp_path / "plain", fused="base", **options))
    assert furthest(ours, plain) > 1e-4
    with pytest.raises(ConfigError, match=r"--train_adapter .*missing\.safetensors"):
        run(world, tmp_path / "x", train_adapter=tmp_path / "missing.safetensors")


def test_another_way_of_keeping_is_not_continued(world: Path, tmp_path: Path) -> None:
    out = run(world, tmp_path / "out", checkpointing_steps=1, max_train_steps=1, **KEPT)
    with pytest.raises(ConfigError) as error:
        run(world, out, resume_from_checkpoint="latest", max_train_steps=2, **{**KEPT, "objective_base": "fused"})
    assert "objective_base: 'original' then, 'fused' now" in str(error.value)
    with pytest.raises(ConfigError, match="preserved"):
        run(world, out, resume_from_checkpoint="latest", max_train_steps=2, **{**KEPT, "preserve_count": 2})
    run(world, out, resume_from_checkpoint="latest", max_train_steps=2, **{**KEPT, "preserve_weight": 1})


@pytest.mark.parametrize("size", [1, 2, 5, 7])
def test_assignments_are_the_best_of_all(size: int) -> None:
    cost = torch.rand(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    rows = torch.arange(size)
    best = min(cost[rows, torch.tensor(order)].sum().item() for order in itertools.permutations(range(size)))
    found = assign(cost)
    assert sorted(found.tolist()) == rows.tolist()
    assert cost[rows, found].sum().item() == pytest.approx(best, abs=1e-12)


def test_coupled_noises_lie_nearer_and_are_functions_of_the_place() -> None:
    x0 = 3 * torch.randn(6, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    arguments = (NoiseLevels(), 2.0, (4, 2, 2), 1, 7)
    plain = draw(*arguments, 0, 6)
    near = draw(*arguments, 0, 6, Coupling(x0, 16, False))
    dealt = draw(*arguments, 0, 6, Coupling(x0, 1, True))
    distances = [((random.noise - x0) ** 2).flatten(1).sum(1) for random in (plain, near, dealt)]
    assert (distances[1] <= distances[0]).all()
    assert distances[1].sum() < 0.95 * distances[0].sum()
    assert distances[2].sum() < distances[0].sum()
    assert sorted(dealt.noise.flatten(1)[:, 0].tolist()) == sorted(plain.noise.flatten(1)[:, 0].tolist())
    assert near.sigma.equal(plain.sigma)
    alone = draw(*arguments, 3, 1, Coupling(x0[3:4], 16, False))
    assert alone.noise[0].equal(near.noise[3])
    own = torch.Generator().manual_seed(0)
    candidates = torch.stack([torch.randn(4, 2, 2, generator=own) for _ in range(9)])
    chosen = Coupling(x0, 9, False).choose(2, candidates[0], _after_one())
    assert chosen.equal(min(candidates, key=lambda noise: ((noise - x0[2]) ** 2).sum().item()))


def _after_one() -> torch.Generator:
    generator = torch.Generator().manual_seed(0)
    torch.randn(4, 2, 2, generator=generator)
    return generator


@pytest.mark.parametrize("options", [{"noise_coupling": "nearest:4"}, {"noise_coupling": "minibatch_ot"}])
def test_a_training_with_coupled_noise(world: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    coupled = trained(run(world, tmp_path / "coupled", **options))
    assert furthest(coupled, trained(run(world, tmp_path / "plain"))) > 1e-4


def test_contradictions(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="with weight 0, nothing is preserved"):
        run(world, tmp_path / "x", preserve_share=0.1)
    for batch in (1, 17):
        with pytest.raises(ConfigError, match="is for 2 to 16 pictures"):
            run(world, tmp_path / "x", noise_coupling="minibatch_ot", train_batch_size=batch)
    with pytest.raises(ConfigError, match="expected none, minibatch_ot or nearest:K"):
        run(world, tmp_path / "x", noise_coupling="nearest:0")
