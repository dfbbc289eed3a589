"""Names on the hub, against a small hub of our own: what is asked of it, what arrives, and what is said when it cannot.

huggingface_hub reads its environment once, so most tests set what it made of it; those of `World.spawn` run the command
in a process of its own, with the variables that a user would set.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from builders import make_factors, save_model, write_lora
from conftest import ROOT
from hub_server import GOOD_TOKEN, Hub, Request, serving
from huggingface_hub import _tree_cache, constants

from lorafuse_common.dialects.diffsynth import DIFFSYNTH
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.errors import ConfigError, HubError
from lorafuse_common.manifest import Origin, read_manifest
from lorafuse_fuse import cli
from lorafuse_fuse.carry import SMALL_BYTES
from lorafuse_fuse.hub import repository as hub_module
from lorafuse_fuse.hub.errors import explained
from lorafuse_fuse.hub.files import absent_shards, lora_file, model_files, one_set_of_weights, pipeline_files
from lorafuse_fuse.hub.names import HubLora, HubName, base_name, lora_name

NOBODY = "http://127.0.0.1:9"
"""An endpoint at which nothing listens."""


class Ran(NamedTuple):
    """How a command ended, what it printed, and what it asked the hub."""

    code: int
    out: str
    err: str
    asked: list[Request]


@dataclass(frozen=True)
class World:
    """A hub, a cache for it, and a folder to work in."""

    hub: Hub
    cwd: Path
    cache: Path

    def environment(self, **more: str) -> dict[str, str]:
        paths = ":".join(map(str, (ROOT, ROOT / "tools/fuse")))
        return {
            "PATH": os.environ["PATH"], "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HOME": str(self.cwd / "home"),
            "XDG_CACHE_HOME": str(self.cwd / "xdg"), "HF_HOME": str(self.cache), "HF_ENDPOINT": self.hub.url,
        } | more  # fmt: skip

    def spawn(self, *args: object, **more: str) -> Ran:
        """Run the command in its own process."""
        self.hub.asked()
        done = subprocess.run(
            [sys.executable, "-m", "lorafuse_fuse", *map(str, args)],
            cwd=self.cwd, env=self.environment(**more), capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return self._ran(done.returncode, done.stdout, done.stderr)

    def run(
        self, *args: object, endpoint: str = "", cache: Path | None = None, offline: bool = False, token: str = ""
    ) -> Ran:
        """Run the command in this process."""
        self.hub.asked()
        url, home = endpoint or self.hub.url, cache or self.cache
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(constants, "ENDPOINT", url)
            patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
            patch.setattr(constants, "HF_HUB_OFFLINE", offline)
            for name, path in {
                "HF_HUB_CACHE": "hub",
                "HF_TOKEN_PATH": "token",
                "AGENT_HARNESSES_PATH": "agents",
            }.items():
                patch.setattr(constants, name, str(home / path))
            patch.setattr(_tree_cache, "_IN_MEMORY_TREE_CACHE", {})
            patch.setattr(sys, "argv", ["lorafuse", *map(str, args)])
            patch.setenv("XDG_CACHE_HOME", str(self.cwd / "xdg"))
            patch.setenv("HF_TOKEN", token)
            patch.chdir(self.cwd)
            try:
                cli.main()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
        return self._ran(code, out.getvalue(), err.getvalue())

    def _ran(self, code: int, out: str, err: str) -> Ran:
        assert "Traceback" not in err, err
        assert not any(ord(character) < 32 and character != "\n" for character in err), err
        return Ran(code, out, err, self.hub.asked())

    def snapshot(self, repo: str) -> Path:
        """The folder of the only commit that the cache has."""
        (found,) = (self.cache / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots").iterdir()
        return found


def files_in(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub serves, as it would lie on disk."""
    root = tmp_path_factory.mktemp("disk")
    model = root / "model"
    save_model(model / "transformer", sharded=True)
    save_model(model / "transformer_2", seed=1)
    for part in ("vae", "tokenizer"):
        (model / part).mkdir()
    (model / "vae" / "config.json").write_text("{}")
    (model / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"v" * (SMALL_BYTES + 1))
    (model / "tokenizer" / "vocab.txt").write_text("a b c")
    (model / "LICENSE").write_text("yes")
    index = {"_class_name": "QwenImagePipeline", "image_encoder": [None, None], "boundary_ratio": 0.9}
    parts = {"transformer": "Q", "transformer_2": "Q", "vae": "V", "tokenizer": "T"}
    text = json.dumps(index | {name: ["diffusers", kind] for name, kind in parts.items()})
    (model / "model_index.json").write_text(text)
    (root / "loras").mkdir()
    write_lora(root / "loras" / "fast.safetensors", make_factors(), LIGHTNING, 2.0)
    write_lora(root / "loras" / "style.safetensors", make_factors(seed=2), LIGHTNING, 1.0)
    write_lora(root / "loras" / "plain.safetensors", make_factors(seed=3), DIFFSYNTH)
    return root


NOT_NEEDED = {
    ".gitattributes": b"",
    "all-in-one.safetensors": b"1" * 20_000,
    "picture.png": b"2" * 20_000,
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"3" * 20_000,
    "vae/diffusion_pytorch_model.bin": b"4" * 20_000,
    "vae/diffusion_pytorch_model.fp16.safetensors": b"5" * 20_000,
    "vae/model.onnx": b"6" * 20_000,
    "onnx/vae/model.onnx": b"7" * 20_000,
    "image_encoder/model.safetensors": b"8" * 20_000,
}


@pytest.fixture(scope="module")
def hub(disk: Path) -> Iterator[Hub]:
    loras = files_in(disk / "loras")
    with serving() as hub:
        hub.repo("tiny/model").commit(files_in(disk / "model") | NOT_NEEDED)
        hub.repo("me/loras").commit({"sub/fast.safetensors": loras["style.safetensors"]}, ref="v1")
        hub.repo("me/loras").commit(loras)
        training = {"checkpoint-5/pytorch_lora_weights.safetensors": b"", "README.md": b""}
        hub.repo("me/one").commit({"only.safetensors": loras["fast.safetensors"], **training})
        config = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2}).encode()
        hub.repo("me/peft").commit({"x/plain.safetensors": loras["plain.safetensors"], "x/adapter_config.json": config})
        hub.repo("me/text").commit({"README.md": b"", "x.bin": b"", "bad.safetensors": b"<html>"})
        hub.repo("me/gated").gated = True
        hub.repo("me/gated").commit({"fast.safetensors": loras["fast.safetensors"]})
        hub.repo("me/secret").private = True
        hub.repo("me/secret").commit({"fast.safetensors": loras["fast.safetensors"]})
        yield hub


@pytest.fixture
def world(hub: Hub, tmp_path: Path) -> World:
    (tmp_path / "work").mkdir()
    return World(hub, tmp_path / "work", tmp_path / "hf")


@pytest.fixture(scope="module")
def filled(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A cache that has the base and a LoRA, and the checkpoint that was fused from them."""
    root = tmp_path_factory.mktemp("filled")
    (root / "work").mkdir()
    world = World(hub, root / "work", root / "hf")
    ran = world.run("fuse", "tiny/model", "--lora", "hf://me/loras/fast.safetensors", "--out", "out")
    assert ran.code == 0, ran.err
    return world


def origin(hub: Hub, repo: str, path: str = "", ref: str = "main") -> Origin:
    return Origin(repo, hub.repos[repo].refs[ref], path)


def test_fused_by_name_and_from_disk_are_the_same(world: World, disk: Path) -> None:
    loras = ("--lora", "me/loras/fast.safetensors:0.5", "--lora", "hf://me/loras/sub/fast.safetensors@v1:-0.25")
    ran = world.spawn("fuse", "tiny/model", *loras, "--out", "hub", HF_TOKEN=GOOD_TOKEN)
    assert ran.code == 0, ran.err
    assert "BASE tiny/model: no such path; looked up on the hub as hf://tiny/model" in ran.err
    assert "LoRA me/loras/fast.safetensors:0.5: no such path; looked up on the hub" in ran.err
    fetched = {request.path.partition("/resolve/")[2].partition("/")[2] for request in ran.asked} - {""}
    assert fetched == set(files_in(disk / "model")) | {"fast.safetensors", "sub/fast.safetensors"}
    assert {request.token for request in ran.asked if request.path.startswith("/cdn/")} == {None}
    assert {request.token for request in ran.asked if not request.path.startswith("/cdn/")} == {GOOD_TOKEN}

    (world.cwd / "sub").mkdir()
    shutil.copy(disk / "loras" / "style.safetensors", world.cwd / "sub" / "fast.safetensors")
    local = ("--lora", f"{disk}/loras/fast.safetensors:0.5", "--lora", "sub/fast.safetensors:-0.25")
    ran = world.run("fuse", disk / "model", *local, "--out", "disk")
    assert (ran.code, ran.asked) == (0, []), ran.err
    ours, theirs = files_in(world.cwd / "hub"), files_in(world.cwd / "disk")
    record, plain = (json.loads(found.pop("lorafuse.json")) for found in (ours, theirs))
    assert ours == theirs
    assert set(theirs) == set(files_in(disk / "model"))

    manifest = read_manifest(world.cwd / "hub")
    assert manifest
    assert manifest.origin == origin(world.hub, "tiny/model")
    assert [lora.origin for lora in manifest.loras] == [
        origin(world.hub, "me/loras", "fast.safetensors"), origin(world.hub, "me/loras", "sub/fast.safetensors", "v1"),
    ]  # fmt: skip
    assert str(world.cache) not in json.dumps(record)
    for recipe in (record, plain):
        for entry in (recipe, *recipe["loras"]):
            entry.pop("origin")
    assert record == plain
    assert json.loads(world.run("inspect", "hub", "--json").out)["origin"] == manifest.origin.uri
    assert manifest.loras[1].origin
    assert manifest.loras[1].origin.uri in world.run("inspect", "hub").out


def test_large_files_link_to_the_blobs(filled: World) -> None:
    """The fused folder must not lead through the cache's own links."""
    carried = filled.cwd / "out" / "vae" / "diffusion_pytorch_model.safetensors"
    assert carried.stat().st_size == SMALL_BYTES + 1
    if carried.is_symlink():  # where the file system has no reflinks
        target = carried.readlink()
        assert not target.is_absolute()
        assert target.parent.name == "blobs"
        assert not (carried.parent / target).is_symlink()
    assert not (filled.cwd / "out" / "transformer" / "config.json").is_symlink()


def test_the_cache_is_used_again(filled: World) -> None:
    lora = ("--lora", "hf://me/loras/fast.safetensors", "--out", "out")
    ran = filled.run("fuse", "tiny/model", *lora)
    assert ran.code == 0, ran.err
    assert "is up to date" in ran.err
    assert [request.path for request in ran.asked] == ["/api/models/me/loras", "/api/models/tiny/model"]
    base, lora_origin = origin(filled.hub, "tiny/model"), origin(filled.hub, "me/loras", "fast.safetensors")
    pinned = ("fuse", base.uri, "--lora", lora_origin.uri, "--out", "out")
    for offline in (False, True):
        ran = filled.run(*pinned, offline=offline)
        assert (ran.code, ran.asked) == (0, []), ran.err
        assert "is up to date" in ran.err
    ran = filled.spawn("fuse", "tiny/model", *lora, HF_HUB_OFFLINE="1")
    assert (ran.code, ran.asked) == (0, []), ran.err
    assert "Could not reach" not in ran.err
    assert filled.run("fuse", "tiny/model", *lora, endpoint=NOBODY).code == 0


def test_what_else_the_cache_has_is_not_carried(filled: World, disk: Path) -> None:
    vae = filled.snapshot("tiny/model") / "vae"
    (vae / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"put there by another program")
    try:
        ran = filled.run("fuse", "tiny/model", "--lora", "me/one", "--out", "clean")
    finally:
        (vae / "diffusion_pytorch_model.fp16.safetensors").unlink()
    assert ran.code == 0, ran.err
    assert set(files_in(filled.cwd / "clean")) == set(files_in(disk / "model")) | {"lorafuse.json"}


def test_another_commit(world: World) -> None:
    """A branch that moves on is another recipe; the same bytes from another place are the same one."""
    repo = world.hub.repo("moving/lora")
    files = world.hub.repos["me/loras"].commits[world.hub.repos["me/loras"].refs["main"]]
    repo.commit({"fast.safetensors": files["fast.safetensors"]})
    args = ("fuse", "hf://tiny/model/transformer", "--lora", "moving/lora", "--out", "out")
    assert world.run(*args).code == 0
    before = (world.cwd / "out" / "lorafuse.json").read_bytes()
    repo.commit({"fast.safetensors": files["fast.safetensors"], "README.md": b"new"})
    ran = world.run(*args)
    assert "is up to date" in ran.err
    assert (world.cwd / "out" / "lorafuse.json").read_bytes() == before
    repo.commit({"fast.safetensors": files["style.safetensors"]})
    ran = world.run(*args)
    assert ran.code == 1
    assert "of other inputs" in ran.err
    manifest = read_manifest(world.cwd / "out")
    assert manifest
    assert (manifest.component, manifest.origin) == (None, origin(world.hub, "tiny/model", "transformer"))


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


def test_files_and_folders_of_a_repository(world: World, disk: Path) -> None:
    single = save_model(world.cwd / "m") / "diffusion_pytorch_model.safetensors"
    world.hub.repo("tiny/file").commit({"split files/dit.safetensors": single.read_bytes()})
    world.hub.repo("tiny/several").commit({"a.safetensors": b"", "b.safetensors": b""})
    lora = ("--lora", disk / "loras" / "fast.safetensors", "--out", "out", "--dry-run")
    for base in ("hf://tiny/file/split files/dit.safetensors@main", "hf://tiny/file@main/split files"):
        ran = world.run("fuse", base, *lora)
        assert ran.code == 0, ran.err
        assert "Qwen-Image, diffusers layout" in ran.err
    for base, says in {
        "tiny/several": "name what you mean: hf://tiny/several/a.safetensors, hf://tiny/several/b.safetensors",
        "hf://tiny/several/c.safetensors": "no 'c.safetensors'; it has a.safetensors, b.safetensors",
        "hf://tiny/model/vae/config.json": "is no .safetensors file",
        "me/text": "holds a .safetensors file that is none",
        "tiny/file": "name what you mean: hf://tiny/file/split files/dit.safetensors",
    }.items():
        ran = world.run("fuse", base, *lora)
        assert ran.code == 1
        assert says in ran.err
    ran = world.run("fuse", "tiny/model", *lora, "--component", "unet")
    assert ran.code == 1
    assert "no folder 'unet'" in ran.err
    assert "['transformer', 'transformer_2', 'vae']" in ran.err


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


def test_what_is_on_disk_wins(world: World, disk: Path) -> None:
    shutil.copytree(disk / "model", world.cwd / "tiny" / "model")
    shutil.copytree(disk / "loras", world.cwd / "me" / "loras")
    args = ("--lora", "me/loras/fast.safetensors:0.5", "--out", "out", "--dry-run")
    ran = world.run("fuse", "tiny/model", *args)
    assert (ran.code, ran.asked) == (0, []), ran.err
    for absent in ("models/x.safetensors", "./tiny/absent", "/tiny/absent", "absent", "tiny/model/absent"):
        ran = world.run("fuse", absent, *args)
        assert (ran.code, ran.asked) == (1, [])
        assert f"{absent}: no such file or folder" in ran.err
        assert "or a name on the hub (owner/repo, " in ran.err
        ran = world.run("fuse", "tiny/model", "--lora", f"{absent}:0.5", "--out", "out")
        assert (ran.code, ran.asked) == (1, [])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Qwen/Qwen-Image", HubName("Qwen/Qwen-Image", is_bare=True)),
        ("Qwen/Qwen-Image@v1.0", HubName("Qwen/Qwen-Image", "v1.0", is_bare=True)),
        ("hf://o/r", HubName("o/r")),
        ("hf://models/o/r/", HubName("o/r")),
        ("hf://o/r@refs/pr/3/sub/folder", HubName("o/r", "refs/pr/3", "sub/folder")),
        ("hf://o/r/sub/f.safetensors@refs/pr/3", HubName("o/r", "refs/pr/3", "sub/f.safetensors")),
        ("hf://o/r@feature%2Fx/f.safetensors", HubName("o/r", "feature/x", "f.safetensors")),
        ("hf://o/r/f@2x.safetensors", HubName("o/r", None, "f@2x.safetensors")),
        ("models/x.safetensors", None),
        ("models/a/b", None),
        ("models/x/", None),
        ("~/x", None),
        ("a b/c", None),
        ("o/r.git", None),
        ("o--x/r", None),
    ],
)
def test_names_of_bases(text: str, name: HubName | None) -> None:
    assert base_name(text) == name
    assert name is None or base_name(str(name)) in (name, HubName(name.repo, name.revision, name.path))


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("o/r", HubLora(HubName("o/r", is_bare=True), 1.0, None)),
        ("o/r@v1:0.8", HubLora(HubName("o/r", "v1", is_bare=True), 0.8, None)),
        ("o/r/sub/f.safetensors:-2", HubLora(HubName("o/r", None, "sub/f.safetensors", is_bare=True), -2.0, None)),
        ("hf://o/r/f@v1:0.5@transformer_2", HubLora(HubName("o/r", "v1", "f"), 0.5, "transformer_2")),
        ("hf://o/r/f.safetensors@v1@transformer", HubLora(HubName("o/r", "v1", "f.safetensors"), 1.0, "transformer")),
        ("hf://o/r/f@transformer_2:0.5", HubLora(HubName("o/r", None, "f"), 0.5, "transformer_2")),
        ("hf://o/r/f.safetensors@dit", HubLora(HubName("o/r", "dit", "f.safetensors"), 1.0, None)),
        ("hf://o/r/f.safetensors:1@dit", HubLora(HubName("o/r", None, "f.safetensors"), 1.0, "dit")),
        ("hf://o/r@transformer/f.safetensors", HubLora(HubName("o/r", "transformer", "f.safetensors"), 1.0, None)),
        ("loras/x.safetensors:0.5", None),
        ("loras/x.safetensors@transformer_2", None),
        ("o/r/folder", None),
        ("/o/r", None),
    ],
)  # fmt: skip
def test_names_of_loras(text: str, lora: HubLora | None) -> None:
    assert lora_name(text) == lora


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hf://o", "is no name on the hub"),
        ("hf://o/r@/x", "is no name on the hub"),
        ("hf://datasets/o/r", "datasets are no models"),
        ("hf://o/r/../x", "is no path in a repository"),
        ("hf://o/r@a/f.safetensors@b", "has two revisions"),
        ("hf://o/r/f.safetensors@a@b", "has two revisions; a component stands behind the strength: ...:1@b"),
    ],
)
def test_names_that_are_none(text: str, says: str) -> None:
    for read in (base_name, lora_name):
        with pytest.raises(ConfigError, match=says):
            read(text)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        ("model.safetensors model.fp16.safetensors pytorch_model.bin", "model.safetensors"),
        ("diffusion_pytorch_model.safetensors model.safetensors", "diffusion_pytorch_model.safetensors"),
        (
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json "
            "model.safetensors model.fp16-00001-of-00001.safetensors model.safetensors.index.fp16.json",
            "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json",
        ),
        ("pytorch_model.bin pytorch_model.fp16.bin flax_model.msgpack tf_model.h5", "pytorch_model.bin"),
        ("model.fp16.safetensors model.fp16.bin", "model.fp16.safetensors"),
        (
            "own_name.safetensors own_name.safetensors.index.json",
            "own_name.safetensors own_name.safetensors.index.json",
        ),
        ("x.pt x.onnx", "x.pt"),
        ("config.json", ""),
    ],
)
def test_one_set_of_weights(names: str, weights: str) -> None:
    assert one_set_of_weights(names.split()) == set(weights.split())


def test_files_of_a_pipeline() -> None:
    needed = {
        "model_index.json", "README.md", "LICENSE.txt", "pipeline.py", "text_encoder/config.json",
        "text_encoder/pytorch_model.bin", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
        "tokenizer/added/merges.txt", "tokenizer/spiece.model", "custom/block.py",
    }  # fmt: skip
    other = {
        "demo.mp4",
        ".gitattributes",
        "flux.safetensors",
        "flux.gguf",
        "assets/a.json",
        "transformer/x.fp8.safetensors",
    }
    parts = ("transformer", "text_encoder", "tokenizer", "custom")
    assert set(pipeline_files(needed | other, parts, ["transformer"], "hf://o/r")) == needed
    with pytest.raises(HubError, match=r"no folder 'text_encoder' with .safetensors weights.*\['transformer'\]"):
        pipeline_files(needed, parts, ["text_encoder"], "hf://o/r")
    assert absent_shards(["a-00002-of-00003.safetensors"]) == [f"a-0000{i}-of-00003.safetensors" for i in (1, 3)]
    with pytest.raises(HubError, match="at all"):
        model_files(["config.json", "model.bin"], "hf://o/r")


def test_the_lora_of_a_repository() -> None:
    assert (
        lora_file(["a.safetensors", "pytorch_lora_weights.safetensors"], "", "o/r")
        == "pytorch_lora_weights.safetensors"
    )
    assert (
        lora_file(["checkpoint-9/a.safetensors", "b.safetensors"], "checkpoint-9", "o/r")
        == "checkpoint-9/a.safetensors"
    )
    with pytest.raises(HubError, match="file that could be a LoRA"):
        lora_file(["a.bin"], "", "o/r")


def test_a_manifest_from_before_origins(filled: World, tmp_path: Path) -> None:
    raw = json.loads((filled.cwd / "out" / "lorafuse.json").read_text())
    del raw["origin"], raw["loras"][0]["origin"]
    (tmp_path / "lorafuse.json").write_text(json.dumps(raw))
    manifest = read_manifest(tmp_path)
    assert manifest
    assert (manifest.origin, manifest.loras[0].origin) == (None, None)


def test_verified_and_reported_by_name(filled: World) -> None:
    """`verify` takes the same names; the report says how to fuse from them again."""
    inputs = ("--base", "tiny/model", "--lora", "hf://me/loras/fast.safetensors:1")
    ran = filled.run("verify", "out", *inputs, "--deep")
    assert ran.code == 0, ran.err
    assert "lorafuse: verified out: good" in ran.err
    ran = filled.run("verify", "out", "--lora", "hf://me/loras/fast.safetensors:0.5")
    assert (ran.code, "OTHER_STRENGTH" in ran.err) == (1, True)
    ran = filled.run("verify", "out", "--lora", "me/loras/style.safetensors")
    assert (ran.code, "OTHER_LORA" in ran.err) == (1, True)
    assert filled.run("report", "out", "--out", "page.html").code == 0
    page = (filled.cwd / "page.html").read_text()
    base, lora = (origin(filled.hub, *of).uri for of in (("tiny/model",), ("me/loras", "fast.safetensors")))
    assert f"lorafuse fuse {base} \\\n  --lora {lora} \\\n" in page
