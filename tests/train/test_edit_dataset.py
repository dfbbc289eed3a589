"""Control pictures in a dataset: how they are named, every fault by row, batches without wrong pairs, the cache."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train import tiny, tiny_edit

from lorafuse_common.errors import ConfigError, DatasetError
from lorafuse_train.dataset.data import Prompt, Sample, read_dataset
from lorafuse_train.dataset.order import MicroBatch
from lorafuse_train.dataset.pictures import ControlRule, Geometry
from lorafuse_train.encoding.encode import Encodings, fill_cache, open_cache
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import resolve_config
from lorafuse_train.plan import Plan, make_order, plan_training
from lorafuse_train.recipes.flux_kontext import FluxKontext
from lorafuse_train.samples.drawn_prompts import unrelated
from lorafuse_train.samples.prompts import EDITS, STILL
from lorafuse_train.steps.loop import Training, _loss_sum

CPU = torch.device("cpu")
EDIT = ControlRule("EditPipeline", 1, 3, size=lambda picture, target: (picture[0] // 8 * 8, picture[1] // 8 * 8))


def read(folder: Path, rule: ControlRule = EDIT, frame_step: int = 0, **options: Any) -> list[Sample]:
    config = TrainConfig(fused_model=folder, output_path=folder, dataset_base_path=folder, **options)
    return read_dataset(config, Geometry(8, config.max_pixels, None, frame_step, rule))


def save(folder: Path, *names: str, size: tuple[int, int] = (32, 16)) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        tiny_edit.picture(number, *size).save(folder / name)


def faults(folder: Path, rule: ControlRule = EDIT, **options: Any) -> str:
    with pytest.raises(DatasetError) as caught:
        read(folder, rule, **options)
    return str(caught.value)


def test_all_forms_name_the_same_controls(tmp_path: Path) -> None:
    save(tmp_path, "a.png", "b.png", "x.png", "y.png", "a,b.png")
    one, two = ["x.png", "a,b.png"], "y.png"
    rows = [{"image": "a.png", "prompt": "p", "edit_image": one}, {"image": "b.png", "prompt": "q", "edit_image": two}]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    found = [read(tmp_path)]
    (tmp_path / "metadata.json").rename(tmp_path / "other.json")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found.append(read(tmp_path, data_file_keys="image,edit_image"))
    (tmp_path / "metadata.jsonl").unlink()
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("image", "prompt", "edit_image"), ("a.png", "p", json.dumps(one)), ("b.png", "q", two)]
        )
    found.append(read(tmp_path))
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("image", "prompt", "first", "second"), ("a.png", "p", *one), ("b.png", "q", "", two)]
        )
    found.append(read(tmp_path, data_file_keys="image,first,second"))
    assert all(samples == found[0] for samples in found)
    assert [[control.path.name for control in sample.controls] for sample in found[0]] == [one, [two]]
    assert found[0][0].bucket == ((1, 16, 32), ((16, 32), (16, 32)))
    alone = read(tmp_path, ControlRule(), data_file_keys="image")
    assert [sample.controls for sample in alone] == [(), ()]


def test_sidecars_have_their_controls_in_folders_of_the_same_shape(tmp_path: Path) -> None:
    save(tmp_path, "data/a.png", "data/sub/a.png", "before/a.jpg", "before/sub/a.png", "data/hint/a.png")
    for name in ("a", "sub/a"):
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    folders = (tmp_path / "before", tmp_path / "data" / "hint")
    missing = f"1 fault:\n  sub/a.png: control picture {folders[1]}/sub/a.*: no such file"
    assert missing in faults(tmp_path / "data", dataset_control_path=folders)
    save(tmp_path, "data/hint/sub/a.png")
    samples = read(tmp_path / "data", dataset_control_path=folders)  # `hint` lies within, and is no picture to learn
    assert [[str(control.path.relative_to(tmp_path)) for control in sample.controls] for sample in samples] == [
        ["before/a.jpg", "data/hint/a.png"],
        ["before/sub/a.png", "data/hint/sub/a.png"],
    ]
    assert samples[0].controls[0].sha256 != samples[1].controls[0].sha256
    save(tmp_path, "before/a.png")
    assert "has both a.jpg and a.png; which of them" in faults(tmp_path / "data", dataset_control_path=folders)
    assert "--dataset_control_path" in faults(tmp_path / "data", dataset_control_path=(tmp_path / "absent",))
    (tmp_path / "data" / "metadata.jsonl").write_text("{}")
    assert "in a column 'edit_image'" in faults(tmp_path / "data", dataset_control_path=folders)


def test_every_fault_of_a_control_is_listed_with_its_row(tmp_path: Path) -> None:
    save(tmp_path, "a.png", "cut.png", size=(64, 64))
    save(tmp_path, "small.png", size=(4, 64))
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    given = [
        "a.png", "absent.png", ["a.png", "absent.png", "cut.png"], "text.png", "small.png", 3, ["a.png", ""],
        "[a.png, b.png]", [], None, ["a.png"] * 4, {"file": "a.png"},
    ]  # fmt: skip
    rows = [{"image": "a.png", "prompt": f"p{number}", "edit_image": value} for number, value in enumerate(given)]
    rows += [{"image": "a.png", "prompt": "typo", "edit_images": "a.png"}, {"image": "gone.png", "prompt": "",
             "edit_image": "gone too.png"}]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    message = faults(tmp_path)
    assert f"{len(given) - 1 + 2} faults" in message
    absent, cut = tmp_path / "absent.png", tmp_path / "cut.png"
    for part in (
        f"line 2: control picture {absent}: no such file",
        f"line 3: control picture {absent}: no such file",
        f"; control picture {cut}: cannot be decoded",
        f"line 4: control picture {tmp_path / 'text.png'}: cannot be decoded",
        f"line 5: control picture {tmp_path / 'small.png'}: is 4x64 pixels",
        "line 6: 'edit_image' is 3; expected a file's name or a list such as",
        "line 7: 'edit_image' is ['a.png', '']; expected",
        "line 8: 'edit_image' is '[a.png, b.png]', no JSON list; write a list such as",
        "line 9: has 0 control pictures; a EditPipeline takes 1 to 3",
        "line 10: has 0 control pictures",
        "line 11: has 4 control pictures; a EditPipeline takes 1 to 3",
        "line 12: 'edit_image' is {'file': 'a.png'}; expected",
        "line 13: has 0 control pictures",
        "line 14: the caption is empty; ",
        f"; control picture {tmp_path / 'gone too.png'}: no such file",
    ):
        assert part in message


def test_a_dataset_for_another_kind_of_model_is_one_fault_beside_the_others(tmp_path: Path) -> None:
    save(tmp_path, "a.png", "b.png")
    (tmp_path / "metadata.csv").write_text("image,prompt\na.png,x\nb.png,y\nabsent.png,z\n")
    message = faults(tmp_path)
    assert "2 faults:\n  no row has a control picture, and a EditPipeline draws nothing without" in message
    assert "a column 'edit_image'" in message
    assert message.endswith(f"row 3 (line 4): {tmp_path / 'absent.png'}: no such file")
    (tmp_path / "metadata.csv").write_text("image,prompt\na.png,x\nb.png,y\n")
    assert len(read(tmp_path, ControlRule("FluxKontextPipeline", 0, 1))) == 2
    assert "no column ['edit_image']" in faults(tmp_path, data_file_keys="image,edit_image")
    (tmp_path / "metadata.csv").write_text("image,prompt,edit_image\na.png,x,b.png\nb.png,,\n")
    message = faults(tmp_path, ControlRule("FluxPipeline"))
    assert (
        "2 faults:\n  1 rows have control pictures (first: row 1 (line 2)), which a FluxPipeline does not take"
        in message
    )
    assert "leave them out with --data_file_keys image, or without" in message
    assert message.endswith("row 2 (line 3): the caption is empty")


def test_the_same_names_in_two_folders_are_two_pictures(tmp_path: Path) -> None:
    save(tmp_path, "one/a.png", "two/a.png", "one/before.png", "two/before.png")
    rows = [
        {"image": f"{folder}/a.png", "prompt": "p", "edit_image": f"{folder}/before.png"} for folder in ("one", "two")
    ]
    (tmp_path / "metadata.json").write_text(json.dumps(rows))
    one, two = read(tmp_path)
    assert one.sha256 != two.sha256
    assert one.controls[0].sha256 != two.controls[0].sha256
    (tmp_path / "metadata.json").write_text(json.dumps([rows[0], {**rows[0], "edit_image": "two/before.png"}, rows[0]]))
    assert "1 fault:\n  entry 3: repeats entry 1" in faults(tmp_path)  # another control makes another row


@pytest.mark.parametrize("keys", ["edit_image", "image,image", "image,prompt", "image,,x", "image, "])
def test_file_keys_that_cannot_be_meant(keys: str) -> None:
    with pytest.raises(ConfigError, match="data_file_keys"):
        resolve_config({"fused_model": "x", "dataset_base_path": "x", "output_path": "x", "data_file_keys": keys})


def test_a_video_is_refused_where_pictures_are_drawn(tmp_path: Path) -> None:
    save(tmp_path, "a.png")
    (tmp_path / "metadata.json").write_text('[{"video": "a.mp4", "prompt": "x"}]')
    assert "entry 1: " in (message := faults(tmp_path, ControlRule("FluxPipeline")))
    assert "a.mp4: is a video; a FluxPipeline draws pictures" in message
    (tmp_path / "metadata.json").write_text('[{"video": "a.mp4", "image": "a.png", "prompt": "x"}]')
    assert "has both 'image' and 'video'" in faults(tmp_path, ControlRule())
    assert [sample.path.name for sample in read(tmp_path, ControlRule(), data_file_keys="image")] == ["a.png"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_edit.save_pipeline(tmp_path_factory.mktemp("edit") / "base", "plus")


def planned(base: Path, data: Path, **options: Any) -> Plan:
    given = {"fused_model": base, "dataset_base_path": data, "output_path": data / "out", "max_pixels": tiny_edit.AREA}
    return plan_training(resolve_config({**given, "allow_unfused_base": True, "seed": 3, **options}))


def test_batches_hold_one_target_size_and_the_same_control_sizes(base: Path, tmp_path: Path) -> None:
    square, wide = (32, 32), (64, 32)
    targets = [square, square, square, square, wide, wide, square, square]
    controls = [[square], [square], [wide], [square, square], [square], [square], [(320, 320)], [wide]]
    plan = planned(base, tiny_edit.save_pairs(tmp_path / "data", targets, controls), train_batch_size=4)
    order = make_order(plan.config, plan.samples, 1)
    batches = [set(micro.samples) for step in range(order.steps_per_epoch) for micro in order.step(step)]
    assert {frozenset(batch) for batch in batches} == {
        frozenset(batch) for batch in ({0, 1, 6}, {2, 7}, {3}, {4, 5})
    }  # the picture of 320 x 320 is scaled to the area of the others
    shapes = {shape for shape, _ in (sample.bucket for sample in plan.samples)}
    assert {*plan.shifts} == shapes == {(1, 32, 32), (1, 32, 64)}


def test_a_changed_control_renews_what_was_made_of_it_and_nothing_else(base: Path, tmp_path: Path) -> None:
    data = tiny_edit.save_pairs(tmp_path / "data", [(32, 32)] * 3, [[(32, 32)], [(40, 24), (32, 32)], [(24, 40)]])

    def fill(**options: Any) -> tuple[int, int]:
        plan = planned(base, data, **options)
        filled = fill_cache(open_cache(plan), plan, [Prompt(" ", plan.samples[0].controls, (1, 32, 32))], CPU)
        return filled.there, filled.made

    assert fill() == (0, 3 + 3 + 4)
    assert fill() == (10, 0)
    path = data / "before" / "1-0.png"
    tiny_edit.picture(77, 40, 24).save(path)  # under the same name
    assert fill() == (8, 2)  # its control latents, and the text that saw it
    (data / "before" / "0-0.png").rename(data / "before" / "renamed.png")
    rows = (data / "metadata.jsonl").read_text().replace("0-0.png", "renamed.png")
    (data / "metadata.jsonl").write_text(rows)
    assert fill() == (10, 0)


def test_a_control_that_changes_after_the_check_is_an_error(base: Path, tmp_path: Path) -> None:
    data = tiny_edit.save_pairs(tmp_path / "data", [(32, 32)] * 2, [[(32, 32)], [(32, 32)]])
    plan = planned(base, data)
    Image.new("RGB", (32, 32)).save(data / "before" / "1-0.png")
    with pytest.raises(DatasetError, match=r"1-0\.png: was changed"):
        fill_cache(open_cache(plan), plan, (), CPU)


def test_controls_stay_where_a_caption_is_dropped(base: Path, tmp_path: Path) -> None:
    """The loss of a step, told a caption and told none, against predictions put together by hand."""
    data = tiny_edit.save_pairs(tmp_path / "data", [(32, 32)] * 2, [[(32, 32)], [(32, 32)]])
    transformer = tiny_edit.pipeline("plus").transformer
    seen: list[dict[str, torch.Tensor]] = []
    for dropout in (0.0, 1.0):
        plan = planned(base, data, caption_dropout=dropout)
        cache = open_cache(plan)
        fill_cache(cache, plan, [sample.uncaptioned for sample in plan.samples], CPU)
        encodings = Encodings(cache)
        collate = plan.recipe.collate

        def keep(samples: Any, collate: Any = collate) -> Any:
            condition = collate(samples)
            seen.append(condition)
            return condition

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(plan.recipe), "collate", lambda self, samples: keep(samples))
            training = _training(plan, transformer, encodings)
            _loss_sum(training, 0, MicroBatch((0, 1), 0))
    told, untold = seen
    assert told["control_0"].equal(untold["control_0"])
    assert told["embeds"].shape[1] > untold["embeds"].shape[1]
    sample = plan.samples[0]
    alone = encodings.condition(Prompt("", sample.controls, sample.shape))["embeds"]
    assert untold["embeds"][0, : len(alone)].equal(alone)


def _training(plan: Plan, transformer: Any, encodings: Encodings) -> Training:
    from accelerate import Accelerator

    from lorafuse_train.precision import Precision

    order = make_order(plan.config, plan.samples, 1)
    return Training(
        plan, transformer, {}, encodings, order, 1, Precision(CPU, autocast=False, reason=""), Accelerator(cpu=True)
    )


def test_a_plain_dataset_for_an_edit_model_says_what_it_needs(base: Path, tmp_path: Path) -> None:
    data = tiny.save_dataset(tmp_path / "data")
    with pytest.raises(DatasetError, match="a QwenImageEditPlusPipeline draws nothing without"):
        planned(base, data)


def test_unrelated_prompts_are_edits_only_where_pictures_are_shown(base: Path, tmp_path: Path) -> None:
    """FLUX.2 and Kontext may draw from text alone, and are then to be measured on what can be drawn from text."""
    data = tiny_edit.save_pairs(tmp_path / "data", [(32, 32)] * 3, [[(32, 32)], [(64, 32)], [(32, 32)]])
    plan = planned(base, data)
    asked = unrelated(plan.config, FluxKontext(), plan.samples)
    assert {prompt.caption for prompt in asked} <= {*EDITS}
    assert {prompt.controls for prompt in asked} == {plan.samples[0].controls, plan.samples[2].controls}
    alone = unrelated(plan.config, FluxKontext(), [replace(sample, controls=()) for sample in plan.samples])
    assert {prompt.caption for prompt in alone} <= {*STILL}
    assert not any(prompt.controls for prompt in alone)
