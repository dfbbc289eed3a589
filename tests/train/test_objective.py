"""The objective against its formulas, and the order of pictures against its promises."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from lorafuse_train.objective import NoiseLevels, add_noise, draw, loss_sum
from lorafuse_train.order import Order, seed_for


def test_noising_is_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0, noise = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    timesteps = scheduler.timesteps[[0, 400, 999]]
    sigma = scheduler.sigmas[[0, 400, 999]]
    assert torch.allclose(add_noise(x0, noise, sigma), scheduler.scale_noise(x0, timesteps, noise), atol=1e-6)


def test_the_loss_is_the_sum_of_the_pictures_means() -> None:
    v, x0, noise = (torch.randn(3, 4, 2, 6) for _ in range(3))
    each = [torch.nn.functional.mse_loss(v[i], noise[i] - x0[i]) for i in range(3)]
    assert torch.allclose(loss_sum(v, x0, noise), torch.stack(each).sum())
    assert loss_sum(noise - x0, x0, noise) == 0
    assert loss_sum(v.bfloat16(), x0, noise).dtype == torch.float32


@pytest.mark.parametrize(("scheme", "mean", "std"), [("logit_normal", 0.5, 0.7), ("none", 0.0, 1.0)])
def test_the_density_is_diffusers(scheme: str, mean: float, std: float) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = NoiseLevels(scheme, mean, std)
    ours = torch.stack([levels.draw(1.0, generator) for _ in range(4000)]).sort().values
    theirs = compute_density_for_timestep_sampling(
        scheme, 4000, mean, std, 1.29, generator=torch.Generator().manual_seed(1)
    )
    assert (ours - theirs.sort().values).abs().max() < 0.05  # Kolmogorov-Smirnov in quantiles


def test_the_shift_is_the_schedulers() -> None:
    u = torch.sigmoid(torch.randn((), generator=torch.Generator().manual_seed(3)))
    sigma = NoiseLevels("logit_normal", 0, 1).draw(3.0, torch.Generator().manual_seed(3))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[float(u)])
    assert torch.allclose(sigma, scheduler.sigmas[0])


def test_draws_depend_on_the_place_in_the_step_alone() -> None:
    levels = NoiseLevels("logit_normal", 0, 1)
    whole = draw(levels, 2.0, (4, 2, 2), seed=1, step=7, first=0, count=4)
    for first in range(4):
        part = draw(levels, 2.0, (4, 2, 2), seed=1, step=7, first=first, count=1)
        assert part.noise[0].equal(whole.noise[first])
        assert part.sigma[0] == whole.sigma[first]
    for seed, step in ((2, 7), (1, 8)):
        assert not draw(levels, 2.0, (4, 2, 2), seed, step, 0, 4).noise.equal(whole.noise)
    assert len(set(whole.noise.flatten().tolist())) == whole.noise.numel()
    assert seed_for("a", 1, 23) != seed_for("a", 12, 3)


def order(batch_size: int = 2, accumulation: int = 1, world: int = 1, repeat: int = 1, seed: int = 0) -> Order:
    sizes = ((8, 8), (8, 16), (8, 8), (8, 8), (8, 16), (8, 8), (8, 8))
    return Order(sizes, seed, repeat, batch_size, accumulation, world)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
@pytest.mark.parametrize("repeat", [1, 3])
def test_an_epoch_sees_every_picture_once_and_never_mixes_sizes(batch_size: int, repeat: int) -> None:
    plan = order(batch_size, accumulation=2, repeat=repeat)
    epochs = []
    for epoch in range(2):
        steps = [plan.step(epoch * plan.steps_per_epoch + step) for step in range(plan.steps_per_epoch)]
        batches = [micro.samples for step in steps for micro in step]
        assert all(len(batch) <= batch_size for batch in batches)
        assert all(len({plan.sizes[index] for index in batch}) == 1 for batch in batches)
        assert Counter(index for batch in batches for index in batch) == dict.fromkeys(range(7), repeat)
        assert [micro.first for step in steps for micro in step] == [
            sum(len(before.samples) for before in step[:place]) for step in steps for place in range(len(step))
        ]
        epochs.append(batches)
    assert epochs[0] != epochs[1]


def test_the_pictures_of_a_step_do_not_depend_on_how_they_are_split() -> None:
    def pictures(batch_size: int, accumulation: int, world: int) -> list[tuple[int, ...]]:
        plan = Order(((8, 8),) * 8, 5, 1, batch_size, accumulation, world)
        return [tuple(i for micro in plan.step(step) for i in micro.samples) for step in range(4)]

    assert pictures(4, 1, 1) == pictures(2, 2, 1) == pictures(2, 1, 2) == pictures(1, 2, 2)
    assert order(seed=1).step(0) == order(seed=1).step(0)
    assert [order(seed=1).step(i) for i in range(3)] != [order(seed=2).step(i) for i in range(3)]
