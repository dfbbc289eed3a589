"""The objective against its formulas, and the order of pictures against its promises."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lorafuse_train.dataset.order import Order, seed_for
from lorafuse_train.steps.objective import add_noise, draw, drops_caption, loss_sum
from lorafuse_train.steps.timesteps import NoiseLevels


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


def test_weights_and_masks_make_weighted_means() -> None:
    v, x0, noise = (torch.randn(2, 4, 3, 6) for _ in range(3))
    mask, weights = torch.rand(2, 3, 6), torch.tensor([2.0, 0.5])
    error = (v - (noise - x0)) ** 2
    expected = sum(
        weights[i] * sum((mask[i] * error[i, c]).sum() for c in range(4)) / (4 * mask[i].sum()) for i in range(2)
    )
    assert torch.allclose(loss_sum(v, x0, noise, weights, mask), torch.as_tensor(expected))
    assert torch.allclose(loss_sum(v, x0, noise, None, torch.ones(2, 1, 1)), loss_sum(v, x0, noise))
    video = [tensor[:, :, None].expand(-1, -1, 5, -1, -1) for tensor in (v, x0, noise)]
    assert torch.allclose(loss_sum(video[0], video[1], video[2], weights, mask), loss_sum(v, x0, noise, weights, mask))
    assert torch.allclose(add_noise(video[1], video[2], weights)[:, :, 3], add_noise(x0, noise, weights))


def test_captions_are_dropped_by_place_and_as_often_as_asked() -> None:
    dropped = [drops_caption(0.3, 1, step, place) for step in range(500) for place in range(4)]
    assert 0.27 < sum(dropped) / len(dropped) < 0.33
    assert dropped == [drops_caption(0.3, 1, step, place) for step in range(500) for place in range(4)]
    assert dropped != [drops_caption(0.3, 2, step, place) for step in range(500) for place in range(4)]
    assert all(drops_caption(1, 1, 0, place) for place in range(50))
    assert not any(drops_caption(0, 1, 0, place) for place in range(50))


def test_draws_depend_on_the_place_in_the_step_alone() -> None:
    levels = NoiseLevels()
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
