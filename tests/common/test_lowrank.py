"""Sums and approximations of low rank against dense float64 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

from lorafuse_common.lowrank import LowRank, Rows, approximated, compressed, concatenated


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_a_sum_of_products_of_which_some_change_only_some_rows() -> None:
    whole = ([Rows(0, draw(12, 3))], draw(3, 8, seed=1))
    lower = ([Rows(6, draw(4, 2, seed=2))], draw(2, 8, seed=3))
    swapped = ([Rows(6, draw(6, 4, seed=4)), Rows(0, draw(6, 4, seed=5))], draw(4, 8, seed=6))
    found = concatenated([whole, lower, swapped], 12)
    wanted = torch.zeros(12, 8, dtype=torch.float64)
    for pieces, down in (whole, lower, swapped):
        for piece in pieces:
            wanted[piece.first : piece.first + len(piece.up)] += piece.up.double() @ down.double()
    assert found.rank == 3 + 2 + 4
    assert torch.allclose(found.up.double() @ found.down.double(), wanted, atol=1e-12)


def test_the_widest_dtype_wins() -> None:
    half = ([Rows(0, draw(4, 2, dtype=torch.bfloat16))], draw(2, 4, dtype=torch.bfloat16))
    pair = concatenated([half, half], 4)
    assert pair.up.dtype is pair.down.dtype is torch.bfloat16
    assert torch.allclose(pair.dense().double(), pair.up.double() @ pair.down.double(), atol=1e-5)
    wide = concatenated([half, ([Rows(0, draw(4, 2))], draw(2, 4))], 4)
    assert wide.up.dtype is wide.down.dtype is torch.float32


@pytest.mark.parametrize(("rows", "columns"), [(40, 70), (70, 40), (5, 90)])
def test_compression_is_the_best_there_is(rows: int, columns: int) -> None:
    """Eckart and Young: no matrix of the rank is nearer than the truncated SVD of the dense product."""
    pair = LowRank(draw(rows, 24), draw(24, columns, seed=1))
    dense = pair.up.double() @ pair.down.double()
    s = torch.linalg.svdvals(dense)
    for rank in (1, 4, 12):
        found = compressed(pair, rank)
        error = float((dense - found.matrix.up.double() @ found.matrix.down.double()).norm() / dense.norm())
        best = float(s[rank:].norm() / s.norm())
        assert found.matrix.rank == min(rank, rows)
        assert error == pytest.approx(best, abs=1e-6)
        assert found.error == pytest.approx(best, abs=1e-6)
        assert found.norm == pytest.approx(float(dense.norm()), rel=1e-6)


def test_ranks_that_hold_nothing_are_left_out() -> None:
    pair = LowRank(draw(20, 3), draw(3, 30, seed=1))
    twice = LowRank(torch.cat([pair.up, pair.up], 1), torch.cat([pair.down, pair.down]))
    found = compressed(twice, 6)
    assert found.matrix.rank == 3
    assert torch.allclose(found.matrix.dense(), 2 * pair.dense(), atol=1e-5)


def test_factors_share_the_singular_values() -> None:
    found = compressed(LowRank(1000 * draw(20, 6), draw(6, 30, seed=1) / 1000), 4).matrix
    assert torch.allclose(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-4)


def noisy(rows: int, columns: int, rank: int, noise: float) -> torch.Tensor:
    """A matrix of low rank under noise, as the rounding of a fused checkpoint leaves it."""
    signal = draw(rows, rank) @ draw(rank, columns, seed=1) / math.sqrt(rank)
    return signal + noise * draw(rows, columns, seed=2)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.3, 3.0])
@pytest.mark.parametrize("asked", [4, 16, 40])
def test_random_projection_is_within_a_hundredth_of_the_best(noise: float, asked: int) -> None:
    """With a gap in the spectrum and without one, below the true rank and above it."""
    dense = noisy(400, 600, 16, noise)
    s = torch.linalg.svdvals(dense.double())
    found = approximated(dense, asked)
    error = float((dense.double() - found.matrix.up.double() @ found.matrix.down.double()).norm() / s.norm())
    best = float(s[asked:].norm() / s.norm())
    assert error <= 1.01 * best + 1e-5
    assert found.error == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_a_slowly_falling_spectrum() -> None:
    u, v = (torch.linalg.qr(draw(500, 500, seed=seed).double()).Q for seed in (0, 1))
    s = torch.arange(1, 501, dtype=torch.float64) ** -0.5
    found = approximated((u * s @ v).float(), 32)
    assert found.error == pytest.approx(float(s[32:].norm() / s.norm()), rel=1e-2)


def test_energy_needs_no_more_ranks_than_reach_it() -> None:
    u, v = (torch.linalg.qr(draw(60, 60, seed=seed).double()).Q for seed in (0, 1))
    s = torch.tensor([8.0, 4.0, 2.0, 1.0] + [0.0] * 56, dtype=torch.float64)  # squares 64, 16, 4, 1 of 85
    dense = (u * s @ v).float()
    for energy, rank in ((0.5, 1), (0.9, 2), (0.98, 3), (0.999, 4)):
        assert approximated(dense, 20, energy).matrix.rank == rank
        assert compressed(LowRank(dense, torch.eye(60)), 20, energy).matrix.rank == rank


def test_the_same_seed_gives_the_same_bytes() -> None:
    dense = noisy(400, 500, 8, 0.1)
    first, second, other = (approximated(dense, 8, seed=seed).matrix for seed in (5, 5, 6))
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)
    assert torch.allclose(first.dense(), other.dense(), atol=1e-3)


def test_nothing_is_approximated_by_nothing() -> None:
    for size in (30, 300):
        found = approximated(torch.zeros(size, size + 10), 4)
        assert (found.error, found.norm) == (0.0, 0.0)
        assert not found.matrix.dense().any()
