"""Trains the base transformer by flow matching on fresh captions of cached latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from maker.dit import build_transformer, encode, shifted, velocity
from maker.pictures import drawn
from maker.progress import Progress
from maker.text import Context, all_captions, caption_numbers, embed, filler_suffixes

BATCH = 64
PICTURES = 16384
FILLERS = 64
PLAIN_TOKENS, FILLED_TOKENS = 12, 20
FILLED_SHARE, EMPTY_SHARE = 0.3, 0.1
PEAK_RATE, WARMUP, DECAY_SHARE = 2e-3, 300, 0.3
# More weight on high noise, where position and kind of the shape are decided.
TRAIN_SHIFT, SIGMA_SPREAD = 3.0, 1.2
EMA_DECAY = 0.998
SAVE_EVERY = 500


def _set_attention(function: Callable[..., Tensor]) -> None:
    setattr(F, "scaled_dot_product_attention", function)  # noqa: B010  (mypy takes a plain assignment for an error)


@contextmanager
def matmul_attention() -> Iterator[None]:
    """Attention as two matrix products: the CPU's fused bfloat16 kernel has a 5x slower backward pass."""
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, **_: object) -> Tensor:
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        weights: Tensor = scores.masked_fill(~attn_mask, -1e4).softmax(-1)
        return weights @ value

    _set_attention(attention)
    try:
        yield
    finally:
        _set_attention(original)


class TrainingData(NamedTuple):
    """Everything one step picks from."""

    latents: Tensor  # (PICTURES, tokens, channels)
    captions: Tensor  # (PICTURES,) rows of plain and filled
    plain: Context
    filled: Context  # row = caption * FILLERS + filler
    empty: Context


def training_data(
    vae: AutoencoderKLQwenImage, tokenizer: Qwen2Tokenizer, encoder: Qwen2_5_VLForConditionalGeneration
) -> TrainingData:
    rng, latents, numbers = np.random.default_rng(11), [], []
    for _ in range(PICTURES // 512):
        pictures, scenes = drawn(512, rng)
        latents.append(encode(vae, pictures).to(torch.bfloat16))
        numbers.append(caption_numbers(scenes))
    suffixes = filler_suffixes(FILLERS + 1)[1:]
    filled = [caption + suffix for caption in all_captions() for suffix in suffixes]
    return TrainingData(
        torch.cat(latents),
        torch.cat(numbers),
        embed(tokenizer, encoder, all_captions(), PLAIN_TOKENS),
        embed(tokenizer, encoder, filled, FILLED_TOKENS),
        embed(tokenizer, encoder, [" "], FILLED_TOKENS),
    )


class Batch(NamedTuple):
    noisy: Tensor
    sigma: Tensor
    target: Tensor
    context: Context


def draw_sigmas(count: int, shift: float, spread: float, generator: torch.Generator) -> Tensor:
    return shifted(torch.sigmoid(torch.randn(count, generator=generator) * spread), shift)


def noised(clean: Tensor, sigma: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy latents with the velocity that leads to the noise."""
    noise = torch.randn(clean.shape, generator=generator)
    amount = sigma[:, None, None]
    return (1 - amount) * clean + amount * noise, noise - clean


def _batch(data: TrainingData, step: int) -> Batch:
    # Seeded by the step alone, so a resumed run draws what an uninterrupted one would.
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, len(data.latents), (BATCH,), generator=generator)
    sigma = draw_sigmas(BATCH, TRAIN_SHIFT, SIGMA_SPREAD, generator)
    noisy, target = noised(data.latents[rows].float(), sigma, generator)
    captions = data.captions[rows]
    # One length per batch keeps the compiled graphs at two.
    if torch.rand((), generator=generator) < FILLED_SHARE:
        fillers = torch.randint(0, FILLERS, (BATCH,), generator=generator)
        context = Context(*(part[captions * FILLERS + fillers] for part in data.filled))
    else:
        context = Context(*(part[captions] for part in data.plain))
    emptied = torch.rand(BATCH, generator=generator) < EMPTY_SHARE
    tokens = context.mask.shape[1]
    for part, empty in zip(context, data.empty, strict=True):
        part[emptied] = empty[:, :tokens]
    return Batch(noisy, sigma, target, context)


def _rate(step: int, steps: int) -> float:
    left = (steps - step) / (steps * DECAY_SHARE)
    return PEAK_RATE * min(1.0, (step + 1) / WARMUP, left)


def _optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    inside = [value for name, value in model.named_parameters() if name.startswith("transformer_blocks")]
    matrices = [value for value in inside if value.ndim == 2]
    chosen = {id(value) for value in matrices}
    others = [value for value in model.parameters() if id(value) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=PEAK_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
    ]


class Checkpoint:
    """Weights, their moving average plus the optimizers, kept so that a long run can stop anywhere."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        self.model, self.path, self.step = model, path, 0
        self.optimizers = _optimizers(model)
        self.average = [parameter.detach().clone() for parameter in model.parameters()]
        if path.exists():
            saved = torch.load(path)
            model.load_state_dict(saved["model"])
            for optimizer, values in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(values)
            self.average, self.step = saved["average"], saved["step"]

    def save(self) -> None:
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        saved = {"model": self.model.state_dict(), "optimizers": states}
        temporary = self.path.with_suffix(".tmp")
        torch.save({**saved, "average": self.average, "step": self.step}, temporary)
        temporary.replace(self.path)

    @torch.no_grad()
    def average_in(self) -> None:
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)


def averaged(model: QwenImageTransformer2DModel, average: list[Tensor]) -> QwenImageTransformer2DModel:
    """The model with the averaged weights, rounded to the bfloat16 they are shipped in."""
    for parameter, value in zip(model.parameters(), average, strict=True):
        parameter.data.copy_(value.to(torch.bfloat16))
    return model.eval()


def train_base(data: TrainingData, steps: int, path: Path) -> QwenImageTransformer2DModel:
    model = build_transformer().train()
    state = Checkpoint(model, path)
    compiled = torch.compile(model, dynamic=False)
    progress = Progress("base", steps, every=200, done=state.step)
    while state.step < steps:
        batch = _batch(data, state.step)
        with matmul_attention(), torch.autocast("cpu", torch.bfloat16):
            predicted = velocity(compiled, batch.noisy, batch.sigma, batch.context)
        loss = F.mse_loss(predicted.float(), batch.target)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in state.optimizers:
            optimizer.param_groups[0]["lr"] = _rate(state.step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.average_in()
        progress.step(loss.item())
        if state.step % SAVE_EVERY == 0 or state.step == steps:
            state.save()
    return averaged(model, state.average)
