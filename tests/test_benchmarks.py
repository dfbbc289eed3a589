"""The benchmark's harness: what it makes, compares and leaves behind; never how long anything takes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import QwenImageTransformer2DModel
from PIL import Image

from benchmarks import check, synthetic
from benchmarks.contenders import CONTENDERS, reason_to_skip
from benchmarks.inputs import LoraShape, Shape, base_path, make_inputs, shape_for
from benchmarks.jobs import Job, job_of
from benchmarks.machine import cached_share, chill, machine_facts, warm
from benchmarks.measure import Usage, run_measured
from benchmarks.rounds import Run, orders
from benchmarks.scaling import cases_of, fit, parse_arguments
from benchmarks.summary import Floor, Spread, summarise, targets
from benchmarks.workspace import BenchmarkError, require_space, workspace
from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_fuse.choices import LoraRequest
from lorafuse_fuse.plan import plan_fuse

TINY = 0.003
SHAPE = shape_for(TINY)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest checkpoint, and two LoRAs of rank 8."""
    folder = tmp_path_factory.mktemp("inputs")
    synthetic.build_base(folder, SHAPE)
    for index in range(2):
        synthetic.build_lora(folder, LoraShape(SHAPE, 8, index))
    return folder


def test_the_checkpoint_is_one_that_diffusers_loads(inputs: Path) -> None:
    model = QwenImageTransformer2DModel.from_pretrained(base_path(inputs, SHAPE), torch_dtype=torch.bfloat16)
    weights = model.state_dict()
    assert sum(2 * tensor.numel() for tensor in weights.values()) == SHAPE.nbytes
    assert len(list(base_path(inputs, SHAPE).glob("*.safetensors"))) > 1
    query = weights["transformer_blocks.1.attn.to_q.weight"].float()
    assert query.std().item() == pytest.approx(synthetic.WEIGHT_STD, rel=0.1)
    assert not torch.equal(query[0], query[1])


def test_the_same_parameters_give_the_same_bytes(inputs: Path, tmp_path: Path) -> None:
    synthetic.build_base(tmp_path, SHAPE)
    synthetic.build_lora(tmp_path, LoraShape(SHAPE, 8, 1))
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 5
    assert all((tmp_path / path).read_bytes() == (inputs / path).read_bytes() for path in made)


def test_every_module_of_the_loras_is_fused_and_changes_one_percent(inputs: Path) -> None:
    job = job_of(inputs, SHAPE, 8, 2)
    plan = plan_fuse(open_checkpoint(job.base), [LoraRequest(path) for path in job.loras])
    assert not plan.problems
    assert [lora.dialect for lora in plan.loras] == ["lightning"] * 2
    assert [lora.applied for lora in plan.loras] == [12 * SHAPE.blocks] * 2
    base = check.read_sample(job.base)
    fused = check.exact_sample(base, job.loras[:1])
    name = "transformer_blocks.0.img_mlp.net.2.weight"
    before, after = check.numbers(base[name]), check.numbers(fused[name])
    assert np.linalg.norm(after - before) / np.linalg.norm(before) == pytest.approx(0.01, rel=0.1)


def test_rounding_is_that_of_torch() -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:3] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8])  # ties
    expected = values.bfloat16()
    assert np.array_equal(check.rounded(values.numpy()), expected.view(torch.uint16).numpy())
    assert np.array_equal(check.numbers(check.rounded(values.numpy())), expected.double().numpy())


@pytest.mark.parametrize(("size_gb", "heads"), [(41, 24), (6, 24), (0.8, 24), (0.3, 12), (0.003, 1)])
def test_sizes_come_near_to_what_is_asked_for(size_gb: float, heads: int) -> None:
    shape = shape_for(size_gb)
    assert shape.heads == heads
    assert shape.nbytes == pytest.approx(size_gb * 1e9, rel=0.25)


def test_who_does_nothing_is_found_out(inputs: Path) -> None:
    job = job_of(inputs, SHAPE, 8, 1)
    base = check.read_sample(job.base)
    exact = check.exact_sample(base, job.loras)
    one = np.uint16(1)  # the last bit
    nearly = {name: bits ^ one if name.endswith(check.EDITED) else bits for name, bits in exact.items()}
    touched = exact | {"transformer_blocks.0.attn.to_q.bias": exact["transformer_blocks.0.attn.to_q.bias"] ^ one}
    assert check.compare(base, exact, exact) == {
        "max_ulp": 0.0, "off_share": 0.0, "error_to_delta": 0.0, "untouched_equal": True, "ok": True,
    }  # fmt: skip
    assert check.compare(base, exact, nearly)["max_ulp"] == 1.0
    assert not check.compare(base, exact, base)["ok"]
    assert not check.compare(base, exact, touched)["ok"]
    assert check.compare_copy(base, base)["ok"] and not check.compare_copy(base, exact)["ok"]


def test_a_process_is_measured_with_its_children_and_its_failure(tmp_path: Path) -> None:
    child = "import time; start = time.process_time()\nwhile time.process_time() - start < 0.2: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); sys.exit('no luck')"
    usage = run_measured([sys.executable, "-c", code], os.environ, tmp_path / "log")
    assert usage.status == 1 and usage.tail == "no luck\n"
    assert usage.cpu_seconds > 0.2
    assert usage.synced_seconds >= usage.wall_seconds > 0 and usage.peak_rss_bytes > 1 << 20
    killed = run_measured([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], os.environ, tmp_path / "log")
    assert killed.status == -signal.SIGKILL


def test_the_page_cache_is_filled_and_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.machine.can_drop_caches", lambda: False)  # not that of the whole machine
    file = tmp_path / "file"
    file.write_bytes(random.Random(0).randbytes(4 << 20))
    warm([tmp_path])
    if cached_share([tmp_path]) is None:
        pytest.skip("this kernel does not tell what it caches")
    assert cached_share([tmp_path]) == 1.0
    chill([tmp_path])
    if cached_share([tmp_path]) == 1.0:
        pytest.skip("this file system lives in memory")
    assert cached_share([tmp_path]) == 0.0


def test_facts_name_no_host(tmp_path: Path) -> None:
    facts = machine_facts(tmp_path)
    assert facts["cores"] and facts["file_system"] and "torch" in str(facts["packages"])
    assert os.uname().nodename not in json.dumps(facts)


def test_orders_are_random_and_repeatable() -> None:
    names = [*"abcdef"]
    found = orders(names, 20, seed=1)
    assert all(sorted(order) == names for order in found)
    assert len({tuple(order) for order in found}) > 10
    assert found == orders(names, 20, seed=1) != orders(names, 20, seed=2)


USAGE = Usage(0, "", 1.0, 2.0, 3.0, 1.0, 2**29, 2**28, 2**28, 0, 0, (0.0, 0.0, 0.0), 0.0, 0.0)


def a_run(contender: str, number: int, synced: float, **changes: object) -> Run:
    usage = replace(USAGE, synced_seconds=synced, **changes)  # type: ignore[arg-type]
    return Run(contender, number, 0, 1.0, usage, {"ok": True, "max_ulp": 1.0})


def test_ratios_are_taken_within_a_round() -> None:
    runs = [a_run("cp", 0, 2.0), a_run("lorafuse", 0, 3.0), a_run("cp", 1, 10.0), a_run("lorafuse", 1, 11.0)]
    runs += [a_run("cp", 2, 4.0), a_run("lorafuse", 2, 4.5), a_run("lorafuse", 3, 1.0, status=1, tail="out of luck\n")]
    copy, ours = summarise(runs, {"cp": "cp -r", "lorafuse": "lorafuse", "peft": "peft"})
    assert copy.synced_to_copy.low == copy.synced_to_copy.high == 1.0
    assert ours.synced_to_copy == Spread(1.125, 1.1, 1.5)
    assert ours.rounds == 3 and runs[-1].failure == "failed: out of luck"
    by_text = {target.text: target for target in targets(runs, (copy, ours), Floor(1.0, 2.0, 1.0, {}))}
    assert by_text["CPU seconds / (cp + arithmetic) <= 1.5"].measured == 1.0
    assert by_text["peak RSS, GiB <= 0.6"].is_met


def test_peers_that_do_not_fit_are_left_out_with_a_reason() -> None:
    place, gb = Path("x"), 10**9
    job = Job(place, (place,), (place,), place, 41 * gb, gb, 5 * gb)
    reasons = {name: reason_to_skip(make(job), job, None, 24 * gb) for name, make in CONTENDERS.items()}
    assert [name for name, reason in reasons.items() if reason] == ["diffusers", "peft"]
    assert "needs about 56 GB of memory, 24 are available" in str(reasons["peft"])
    assert "PEER_SIZE" in str(reason_to_skip(CONTENDERS["naive"](job), job, 6, 24 * gb))


def test_scaling_has_every_case_once_and_fits_a_line() -> None:
    cases = cases_of(parse_arguments([]))
    assert {size: len(found) for size, found in cases.items()} == {3: 1, 6: 5, 12: 1}
    line = fit([(3, 4.0), (6, 7.0), (12, 13.0)])
    assert line and (line.fixed, line.per_gb, line.most_off) == pytest.approx((1.0, 1.0, 0.0))
    assert fit([(3, 4.0)]) is None


def test_a_workspace_is_left_as_it_was_found(tmp_path: Path) -> None:
    for keep in (True, False):
        with pytest.raises(KeyboardInterrupt), workspace(tmp_path / "out", keep=keep) as folder:
            (folder / "base-x").mkdir(exist_ok=True)
            (folder / "result").mkdir()
            (folder / "log.txt").touch()
            with pytest.raises(BenchmarkError, match="another benchmark"), workspace(tmp_path / "out", keep=False):
                pass
            raise KeyboardInterrupt
        assert [path.name for path in folder.glob("[!.]*")] == (["base-x"] if keep else [])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_of_others_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").touch()
    with pytest.raises(BenchmarkError, match="no benchmark's folder"), workspace(tmp_path, keep=False):
        pass
    assert (tmp_path / "work" / "thesis.txt").exists()


def test_a_full_disk_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="Give a smaller SIZE"):
        require_space(tmp_path, 1 << 60, "a checkpoint")
    with pytest.raises(BenchmarkError, match=r"a benchmark of 1\d{6}\.\d GB needs 2\d{6}"):
        make_inputs(tmp_path, 1.1e6, {})
    assert list(tmp_path.iterdir()) == []


def test_interrupting_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.fuse", "--size", str(TINY), "--out", str(tmp_path / "out")]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while not (tmp_path / "out" / "work" / ".lorafuse-benchmark").exists():
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_a_tiny_benchmark_from_end_to_end(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(inputs, out / "work")  # as --keep leaves it
    (out / "work" / ".lorafuse-benchmark").touch()
    command = [sys.executable, "-m", "benchmarks.fuse", "--size", str(TINY), "--rank", "8", "--rounds", "1"]
    command += ["--only", "lorafuse", "--fuse-args=--workers 1", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "making" not in run.stderr
    for text in ("cp -r", "lorafuse, no hash memory", "x cp", "arithmetic floor", "wall + sync / cp", "fuse-warm.png"):
        assert text in run.stdout
    assert sorted(path.name for path in out.iterdir()) == ["fuse-warm.json", "fuse-warm.png"]
    facts = json.loads((out / "fuse-warm.json").read_text())
    assert {entry["contender"] for entry in facts["runs"]} == {"cp", "lorafuse"}
    assert all(entry["check"]["ok"] and len(entry["usage"]["load_average"]) == 3 for entry in facts["runs"])
    assert all(summary["max_ulp"] == 0.0 for summary in facts["summaries"] if summary["name"] != "cp")
    assert facts["floor"]["edit_seconds"] > 0 and set(facts["floor"]["parts_seconds"]) >= {"product", "figures"}
    assert Image.open(out / "fuse-warm.png").width > 1000
    assert Shape(2, 1).nbytes < facts["base_bytes"] < Shape(2, 1).nbytes + 100_000
