"""What is asked of the hub, and what is said when something cannot be had."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders import make_factors, write_lora
from hub_server import GOOD_TOKEN
from hub_world import NOBODY, World, disk, filled, hub, origin, world

from lorafuse_common.dialects.diffsynth import DIFFSYNTH
from lorafuse_common.errors import HubError
from lorafuse_fuse.hub import repository as hub_module
from lorafuse_fuse.hub.errors import explained
from lorafuse_fuse.hub.names import HubName

__all__ = ["disk", "filled", "hub", "world"]
"""The fixtures, which pytest finds here."""


def test_a_dry_run_downloads_headers_alone(world: World) -> None:
    ran = world.run("fuse", "tiny/model", "--lora", "me/one:0.5@transformer_2", "--out", "out", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["origin"] == origin(world.hub, "tiny/model").uri
    assert facts["loras"][0]["origin"] == origin(world.hub, "me/one", "only.safetensors").uri
    assert facts["loras"][0]["component"] == "transformer_2"
    large = [r for r in ran.asked if r.path.startswith("/cdn/") and not r.path.endswith("/only.safetensors")]
    assert large
    assert all(request.byte_range for request in large)
    assert not any("/vae/" in request.path for request in ran.asked)
    ran = world.run("fuse", "tiny/model", "--lora", "me/one:0.5", "--out", "out", "--dry-run")
    assert ran.code == 0, ran.err
    assert not list(Path(world.cache).rglob("*.incomplete"))


def test_what_does_not_fit_costs_no_download(world: World) -> None:
    write_lora(world.cwd / "x.safetensors", {"nowhere": make_factors()["transformer_blocks.0.attn.to_q"]}, DIFFSYNTH)
    ran = world.run("fuse", "tiny/model", "--lora", "x.safetensors", "--out", "out")
    assert ran.code == 1
    assert f"0 of 1 modules can be applied to {origin(world.hub, 'tiny/model').uri}" in ran.err
    assert "lorafuse-headers" not in ran.err
    assert all(request.byte_range for request in ran.asked if request.path.startswith("/cdn/"))
    ran = world.run("fuse", "tiny/model", "--lora", "absent.safetensors", "--out", "out")
    assert ran.code == 1
    assert "absent.safetensors" in ran.err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("me/loras", "has 3 .safetensors files; name the LoRA: hf://me/loras/fast.safetensors, "),
        ("me/absent", "(and there is no such path on disk): there is no repository me/absent"),
        ("hf://me/secret/fast.safetensors", "there is no repository me/secret"),
        ("hf://me/loras/fast.safetensors@v9", "no revision 'v9' (a component stands behind the strength: :1@v9)"),
        ("hf://me/loras@" + "0" * 40, "no revision '" + "0" * 40),
        ("hf://me/loras/fsat.safetensors", "no 'fsat.safetensors'; it has fast.safetensors"),
        ("hf://me/loras/sub/", "no 'sub'"),
        ("hf://me/text/x.bin", "no other kind is read"),
        ("hf://me/text", "not a safetensors file"),
        ("hf://me/gated/fast.safetensors", "is gated; ask for access at"),
        ("hf://me", "is no name on the hub; expected hf://owner/repo"),
        ("hf://me/" + "x" * 100, "is no name of a repository"),
        ("hf://me/loras/fast.safetensors:strong", "'strong' is no strength"),
    ],
)
def test_loras_that_cannot_be_had(world: World, disk: Path, name: str, says: str) -> None:
    ran = world.run("fuse", disk / "model", "--lora", name, "--out", "out")
    assert ran.code == 1
    errors = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in ran.err
    assert not (world.cwd / "out").exists()


def test_tokens(world: World) -> None:
    args = ("inspect", "hf://me/gated/fast.safetensors", "--json")
    ran = world.run(*args, token="hf_stranger")
    assert ran.code == 1
    assert "is gated, and the account of your token has no access yet" in ran.err
    ran = world.run(*args, token="hf_wrong")
    assert ran.code == 1
    assert "refuses your token (401)" in ran.err
    (world.cache / "token").parent.mkdir(exist_ok=True)
    (world.cache / "token").write_text(GOOD_TOKEN)  # as `hf auth login` leaves it
    ran = world.run(*args)
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert (facts["kind"], facts["origin"]) == ("lora", origin(world.hub, "me/gated", "fast.safetensors").uri)
    assert world.run("inspect", "me/secret").code == 0


def test_the_configuration_beside_a_lora_comes_along(world: World) -> None:
    for name in ("me/peft", "hf://me/peft/x", "me/peft/x/plain.safetensors"):
        ran = world.run("inspect", name, "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["scales"] == {"adapter_config.json = 0.5": 5}


def test_offline_without_what_is_needed(filled: World, world: World, disk: Path, tmp_path: Path) -> None:
    lora = ("--lora", disk / "loras" / "fast.safetensors", "--out", "out")
    ran = world.run("fuse", "tiny/model", *lora, offline=True)
    assert (ran.code, ran.asked) == (1, [])
    assert f"the hub's cache ({world.cache}/hub) does not have it, and HF_HUB_OFFLINE=1 forbids downloads" in ran.err
    shutil.copytree(filled.cache, world.cache, symlinks=True)
    snapshot = world.snapshot("tiny/model")
    lost = next((snapshot / "transformer").glob("*-00002-of-*"))
    lost.unlink()
    ran = world.run("fuse", "tiny/model", *lora, offline=True)
    assert ran.code == 1
    assert "HF_HUB_OFFLINE=1 forbids downloads" in ran.err
    for listing in world.cache.rglob("trees/*.json"):  # as where single files were downloaded by an older program
        listing.unlink()
    ran = world.run("fuse", "tiny/model", *lora, offline=True)
    assert ran.code == 1
    assert f"does not have all of it (it lacks transformer/{lost.name})" in ran.err
    ran = world.run("fuse", "tiny/model", *lora, "--component", "transformer_2", offline=True)
    assert ran.code == 1  # it would be carried over incomplete
    ran = world.run("fuse", "tiny/model", *lora)
    assert ran.code == 0, ran.err
    assert "downloading 1 of " in ran.err
    shutil.rmtree(world.cwd / "out")
    for listing in world.cache.rglob("trees/*.json"):
        listing.unlink()
    ran = world.run("fuse", "tiny/model", *lora, "--dry-run", offline=True)
    assert ran.code == 0, ran.err
    shutil.rmtree(snapshot / "tokenizer")
    ran = world.run("fuse", "tiny/model", *lora, offline=True)
    assert "(it lacks tokenizer)" in ran.err


def test_no_hub(world: World) -> None:
    for name in ("me/one", f"hf://me/one@{origin(world.hub, 'me/one').revision}"):
        ran = world.run("inspect", name, endpoint=NOBODY)
        assert ran.code == 1
        assert f"{NOBODY} cannot be reached" in ran.err
        assert "check the network" in ran.err
    try:
        for status, says in {503: "is out of order (503)", 429: "too often (429)", 418: "the hub answers 418"}.items():
            world.hub.status = status
            ran = world.run("inspect", "me/one")
            assert ran.code == 1
            assert says in ran.err
        world.hub.status = None
        for world.hub.page in (b"<html>log in</html>", b"[]", b"{}"):
            ran = world.run("inspect", "me/one")
            assert ran.code == 1
            assert "does not answer as a hub does" in ran.err
    finally:
        world.hub.status = world.hub.page = None


def test_a_broken_connection_is_taken_up_again(world: World) -> None:
    world.hub.cut.add("only.safetensors")
    ran = world.run("inspect", "me/one")
    assert ran.code == 0, ran.err
    assert not world.hub.cut
    assert len([request for request in ran.asked if request.path.startswith("/cdn/")]) == 2


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_download_can_be_interrupted(world: World, sent: signal.Signals, code: int) -> None:
    world.hub.asked()
    world.hub.go_on.clear()
    world.hub.stalled.add("diffusion_pytorch_model.safetensors")
    command = [sys.executable, "-m", "lorafuse_fuse", "fuse", "tiny/model", "--lora", "me/one", "--out", "out"]
    running = subprocess.Popen(
        command, cwd=world.cwd, env=world.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + 60
        while not list(world.cache.rglob("*.incomplete")) or not any(
            r.path.endswith("/diffusion_pytorch_model.safetensors") and not r.byte_range and r.method == "GET"
            for r in world.hub.requests
        ):
            assert time.monotonic() < until
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.05)
        running.send_signal(sent)
        _, err = running.communicate(timeout=60)
    finally:
        running.kill()
        world.hub.go_on.set()
        world.hub.stalled.clear()
    assert running.returncode == code, err
    assert "Traceback" not in err
    assert not list(world.cache.rglob("*.incomplete"))
    assert not (world.cwd / "out").exists()


def test_disks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    (world.cwd / "file").write_text("")
    ran = world.run("inspect", "me/one", cache=world.cwd / "file")
    assert ran.code == 1
    assert "cannot be used" in ran.err
    assert "set HF_HOME" in ran.err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(HubError, match=r"1.0 MB have to be downloaded.* has 0.0 MB free; make room"):
        hub_module._check_space(HubName("a/b"), 1_000_000, world.cache / "absent")
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("hf_xet: No space left on device")):
        with pytest.raises(HubError, match="disk of the hub's cache is full"), explained(HubName("a/b")):
            raise error
    with pytest.raises(ZeroDivisionError), explained(HubName("a/b")):
        raise ZeroDivisionError
