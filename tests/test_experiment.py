"""What the experiment measures: the distance against its closed form, and that it orders what it should order."""

from __future__ import annotations

from pathlib import Path

import drawing
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from maker.pictures import drawn
from maker.scoring import frechet
from trials.document import lines_of, spread
from trials.measure import Measure, Score, train_style_judge
from trials.variants import VARIANTS, TrainedOn
from trials.workspace import Workspace, write_prompts

from lorafuse_train.options.options import resolve_config


def test_the_distance_is_that_of_two_gaussians() -> None:
    """|m1 - m2|^2 + sum (s1 - s2)^2 for Gaussians with diagonal covariances, which large samples nearly are."""
    generator = torch.Generator().manual_seed(0)
    deviations = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.5, 1.0, 0.5])
    means = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.5, 1.0, 1.0])
    one, other = (torch.randn(200_000, 3, generator=generator) * s + m for s, m in zip(deviations, means, strict=True))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet(one, other) == pytest.approx(expected.item(), rel=0.02)
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)


def _blurred(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """Means of size x size pixels, without a dark frame at the border."""
    return F.avg_pool2d(F.pad(pictures, [size // 2] * 4, mode="reflect"), size, 1)


@pytest.mark.slow
def test_scores_fall_with_blur_and_with_the_wrong_style() -> None:
    measure = Measure(train_style_judge(150))
    pictures, scenes = drawn(256, np.random.default_rng(3), "ink")
    clean = measure.score(pictures, scenes, "ink")
    blurred = [measure.score(_blurred(pictures, size), scenes, "ink") for size in (3, 7)]
    plain = measure.score(drawn(256, np.random.default_rng(3), "plain")[0], scenes, "ink")
    assert clean.distance < blurred[0].distance < blurred[1].distance
    assert clean.distance < plain.distance
    assert pytest.approx(clean.edges, abs=0.05) == 1
    assert clean.edges > blurred[0].edges > blurred[1].edges
    assert plain.right < clean.right


def test_every_variant_is_one_that_the_trainer_knows() -> None:
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names)
    for variant in VARIANTS:
        given = {"fused_model": "a", "dataset_base_path": "b", "output_path": "c", "train_batch_size": "16"}
        resolve_config({**given, **variant.options})


def test_seeds_are_summed_up_by_variant() -> None:
    def found(distance: float) -> dict[str, object]:
        score = {"distance": distance, "right": 0.5, "edges": 1.0}
        assert score.keys() == Score.__dataclass_fields__.keys()
        return {"scores": {"new few": score}, "seconds": 10.0, "health": {"agreement": 0.5}}

    lines = lines_of({"fused": found(1), "few-preserve-1": found(2), "few-preserve-2": found(4), "few-1": found(9)})
    assert [line.title for line in lines] == [
        "fused base, untrained", "only the few-step noise levels", "few-step levels, preservation"
    ]  # fmt: skip
    assert lines[2].mean("new few") == 3
    assert spread(lines[2].values("new few", "distance")) == "3.0 ± 1.4"
    assert lines[2].health("agreement") == "0.50"


def test_a_scaffold_belongs_to_its_number_of_steps(tmp_path: Path) -> None:
    one, other = (Workspace(tmp_path, steps, "ink", 8, 1) for steps in (240, 480))
    assert one.checkpoint(TrainedOn.SCAFFOLD) != other.checkpoint(TrainedOn.SCAFFOLD)
    assert one.checkpoint(TrainedOn.FUSED) == other.checkpoint(TrainedOn.FUSED)


def test_the_prompts_are_the_plain_captions(tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.txt")
    text = (tmp_path / "prompts.txt").read_text()
    assert text == (ROOT / "examples" / "shapes" / "prompts.txt").read_text()
    assert len(set(text.splitlines())) == len(drawing.SHAPES) * len(drawing.COLOURS) * len(drawing.BACKGROUNDS)
