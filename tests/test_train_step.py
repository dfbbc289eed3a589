"""The benchmark of a training step: both loops do the same work, so that their times may be compared."""

from __future__ import annotations

import pytest
import torch

from benchmarks.train_step import measure, parse_arguments

TINY = ["--layers", "2", "--heads", "1", "--size", "64", "--rank", "4", "--steps", "1", "--device", "cpu"]


@pytest.mark.parametrize("how", ["", "+ckpt"])
def test_both_loops_do_the_same(how: str) -> None:
    """The same weights, pictures and draws give the same first loss and the same count of operations."""
    ours, theirs = (measure(parse_arguments(TINY), who + how) for who in ("lorafuse", "diffusers"))
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=2e-3)
    assert ours["flops"] == theirs["flops"]
    assert ours["trained"] == theirs["trained"]
    assert all(torch.isfinite(torch.tensor(each["losses"])).all() for each in (ours, theirs))


def test_checkpointing_computes_the_blocks_again() -> None:
    plain, again = (measure(parse_arguments(TINY), f"lorafuse{how}") for how in ("", "+ckpt"))
    assert 1.2 < again["flops"] / plain["flops"] < 1.5  # a third: forward, and two of backward without the weights
    assert again["losses"] == pytest.approx(plain["losses"], rel=1e-3)
