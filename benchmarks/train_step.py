"""python -m benchmarks.train_step --size 1024 --rank 32

One LoRA step of a Qwen-Image-shaped transformer with random weights: lorafuse's own parts (recipe, adapter, loss)
beside a loop as diffusers' example scripts write it, with and without checkpointing and compilation. Prints time,
peak memory and the share of the device's own matrix peak; every variant runs in a process of its own. On a GPU the
model is of the real size, without one it is small.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

TEXT_TOKENS = 128
FULL = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "axes_dims_rope": (16, 56, 56),
}
"""Qwen/Qwen-Image's transformer/config.json, without its 60 layers."""
Step = Callable[[int], Tensor]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    gpu = torch.cuda.is_available()
    add("--layers", type=int, default=60 if gpu else 2, help="blocks of the transformer, 60 in the real one")
    add("--heads", type=int, default=24 if gpu else 4, help="attention heads of 128, 24 in the real one")
    add("--size", type=int, default=1024 if gpu else 256, help="height and width of the picture")
    add("--batch", type=int, default=1, help="pictures of a step (default: %(default)s)")
    add("--rank", type=int, default=32, help="of the LoRA (default: %(default)s)")
    add("--steps", type=int, default=8, help="timed steps, after four that are not (default: %(default)s)")
    add("--device", default="cuda" if gpu else "cpu")
    add(
        "--variants",
        nargs="*",
        default=["lorafuse+ckpt", "diffusers+ckpt", "lorafuse", "lorafuse+ckpt+compile"],
        help="lorafuse or diffusers, with +ckpt and +compile (default: %(default)s)",
    )
    add("--profile", action="store_true", help="after each variant's figures, the kernels that took most of one step")
    add("--out", type=Path, help="write the figures to this JSON file")
    add("--one", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_transformer(args: argparse.Namespace, device: torch.device) -> Any:
    """Random bf16 weights, made where they are used."""
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(num_layers=args.layers, **{**FULL, "num_attention_heads": args.heads})
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(std=0.02)
    reset = type(model.pos_embed)(theta=10000, axes_dim=list(FULL["axes_dims_rope"]), scale_rope=True)  # type: ignore[call-overload]
    model.pos_embed = reset
    return model


def lorafuse_step(args: argparse.Namespace, model: Any, device: torch.device) -> tuple[Step, list[nn.Parameter]]:
    """As `lorafuse_train.steps.loop` takes one, less the bookkeeping."""
    from lorafuse_train.lora.adapter import attach, spare_casts
    from lorafuse_train.options.config import TrainConfig
    from lorafuse_train.recipes.qwen_image import QwenImage
    from lorafuse_train.steps.objective import add_noise, loss_sum

    config = TrainConfig(
        fused_model=Path("unused"), dataset_base_path=Path("unused"), output_path=Path("unused"), lora_rank=args.rank
    )
    parameters = list(attach(model, targets_of(model), config).values())
    spare_casts(model)
    recipe = QwenImage()
    x0, embeds = inputs(args)
    condition = recipe.collate([{"embeds": row} for row in embeds])

    def step(number: int) -> Tensor:
        noise, sigma = draws(args, number, x0)
        x, eps, s = x0.to(device), noise.to(device), sigma.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = recipe.predict(model, add_noise(x, eps, s), s, condition)
        loss: Tensor = loss_sum(velocity, x, eps) / args.batch
        torch.autograd.backward(loss)
        return loss.detach()

    return step, parameters


def diffusers_step(args: argparse.Namespace, model: Any, device: torch.device) -> tuple[Step, list[nn.Parameter]]:
    """As in diffusers' `examples/dreambooth/train_dreambooth_lora_qwen_image.py`, on the same modules."""
    from diffusers import QwenImagePipeline
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    modules = list(targets_of(model).modules)
    model.add_adapter(
        LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=modules)
    )
    cast_training_params([model], dtype=torch.float32)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x0, embeds = inputs(args)
    x0, embeds = x0[:, :, None].to(device, torch.bfloat16), embeds.to(device, torch.bfloat16)
    batch, channels, _, height, width = x0.shape
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=device)

    def step(number: int) -> Tensor:
        noise, sigma = draws(args, number, x0[:, :, 0].cpu().float())
        eps, s = noise[:, :, None].to(device, torch.bfloat16), sigma.to(device)
        noisy = (1 - s.view(-1, 1, 1, 1, 1)) * x0 + s.view(-1, 1, 1, 1, 1) * eps
        packed = QwenImagePipeline._pack_latents(noisy, batch, channels, height, width)
        with torch.autocast(device.type, torch.bfloat16):
            made = model(
                hidden_states=packed,
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                timestep=s,
                img_shapes=[[(1, height // 2, width // 2)]] * batch,
                return_dict=False,
            )[0]
        velocity = QwenImagePipeline._unpack_latents(made, height * 8, width * 8, 8)
        loss: Tensor = ((velocity.float() - (eps - x0).float()) ** 2).reshape(batch, -1).mean(1).mean()
        torch.autograd.backward(loss)
        return loss.detach()

    return step, parameters


def targets_of(model: Any) -> Any:
    """What a LoRA is attached to where nothing else is asked for."""
    from lorafuse_common.families.qwen_image import QWEN_IMAGE
    from lorafuse_train.lora.targets import resolve_targets

    return resolve_targets(model, QWEN_IMAGE, "preset")


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """x0 (B, 16, h, w), fp32, and embeddings (B, L, 3584), bf16, on the CPU as a cache gives them."""
    generator = torch.Generator().manual_seed(0)
    side = args.size // 8
    x0 = torch.randn(args.batch, 16, side, side, generator=generator)
    return x0, torch.randn(args.batch, TEXT_TOKENS, 3584, generator=generator).bfloat16()


def draws(args: argparse.Namespace, number: int, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Noise and sigma of a step."""
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randn(x0.shape, generator=generator), torch.rand(args.batch, generator=generator)


def measure(args: argparse.Namespace, variant: str) -> dict[str, Any]:
    """Time, memory and arithmetic of one variant, in this process."""
    from torch.utils.flop_counter import FlopCounterMode

    device = torch.device(args.device)
    who, *how = variant.split("+")
    model = make_transformer(args, device)
    step, parameters = (lorafuse_step if who == "lorafuse" else diffusers_step)(args, model, device)
    if "ckpt" in how:
        model.enable_gradient_checkpointing()
        model.train(who == "diffusers")
    if "compile" in how:
        model.compile_repeated_blocks()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def whole(number: int) -> float:
        loss = step(number)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    started = time.perf_counter()
    with FlopCounterMode(display=False) if "compile" not in how else nullcontext() as counter:
        first = whole(0)
    flops = counter.get_total_flops() if counter is not None else None
    for number in (1, 2, 3):
        whole(number)
    ready = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, losses = [], [first]
    for number in range(4, 4 + args.steps):
        begin = time.perf_counter()
        losses.append(whole(number))  # reading the loss waits for the device
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    if args.profile:
        with torch.profiler.profile() as profiler:
            whole(4 + args.steps)
        order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=18, max_name_column_width=60)
        print("\n".join(line[:62] + line[-110:] for line in table.splitlines()), file=sys.stderr)
    return {
        "variant": variant, "seconds": median(times), "all_seconds": times, "warm_up_seconds": ready,
        "flops": flops, "peak_bytes": peak, "losses": losses,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "trained": sum(p.numel() for p in parameters),
    }  # fmt: skip


def matrix_peak(device: torch.device) -> float:
    """bf16 FLOP/s of a large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        product = a @ b
        float(product[0, 0])
        times.append(time.perf_counter() - begin)
    return 2 * side**3 / median(times[2:])


def main() -> None:
    """Run the variants and print a table."""
    args = parse_arguments()
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    device = torch.device(args.device)
    peak = matrix_peak(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; bf16 matrix products: {peak / 1e12:.4g} TFLOP/s")
    shape = f"{args.layers} layers, {args.size}x{args.size}, batch {args.batch}"
    print(f"{shape}, {TEXT_TOKENS} text tokens, rank {args.rank}")
    print(f"{'':28} {'s/step':>8} {'peak GiB':>9} {'TFLOP':>8} {'of peak':>8}")
    results = []
    for variant in args.variants:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--one", variant],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            why = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "failed")
            print(f"{variant:28} {why[:120]}")
            results.append({"variant": variant, "error": done.stderr[-4000:]})
            continue
        figures = json.loads(done.stdout.splitlines()[-1])
        results.append(figures)
        print(_line(figures, results, peak), flush=True)
        if args.profile:
            print(done.stderr[done.stderr.find("-----") :], flush=True)
    if args.out:
        facts = {"device": name, "torch": torch.__version__, "matrix_flops": peak, "results": results}
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


def _line(figures: dict[str, Any], earlier: Sequence[dict[str, Any]], peak: float) -> str:
    """One row; a compiled step has the arithmetic of the same one without."""
    plain = figures["variant"].replace("+compile", "")
    flops = next((e["flops"] for e in earlier if e["variant"] == plain and e.get("flops")), None)
    memory = f"{figures['peak_bytes'] / 2**30:9.1f}" if figures["peak_bytes"] else f"{'-':>9}"
    work = f"{flops / 1e12:8.1f} {flops / figures['seconds'] / peak:8.1%}" if flops else f"{'-':>8} {'-':>8}"
    return f"{figures['variant']:28} {figures['seconds']:8.3f} {memory} {work}"


if __name__ == "__main__":
    main()
