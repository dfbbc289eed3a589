"""Names on the hub in place of paths: the same result as from disk, and where it came from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from builders import save_model
from hub_server import GOOD_TOKEN
from hub_world import NOBODY, World, disk, files_in, filled, hub, origin, world

from lorafuse_common.manifest import read_manifest
from lorafuse_fuse.carry import SMALL_BYTES

__all__ = ["disk", "filled", "hub", "world"]
"""The fixtures, which pytest finds here."""


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
    kept = {name for name in theirs if name.startswith("lorafuse/loras/")}
    assert {name.rpartition("/")[2] for name in kept} == {"fast.safetensors"}
    assert (len(kept), set(theirs) - kept) == (2, set(files_in(disk / "model")))

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
    found = {name for name in files_in(filled.cwd / "clean") if not name.startswith("lorafuse/loras/")}
    assert found == set(files_in(disk / "model")) | {"lorafuse.json"}


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
