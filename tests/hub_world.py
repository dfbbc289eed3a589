"""A small hub of our own, a cache for it, and the command run against them.

huggingface_hub reads its environment once, so most tests set what it made of it; those of `World.spawn` run the command
in a process of its own, with the variables that a user would set.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
from builders import make_factors, save_model, write_lora
from conftest import ROOT
from hub_server import Hub, Request, serving
from huggingface_hub import _tree_cache, constants

from lorafuse_common.dialects.diffsynth import DIFFSYNTH
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.manifest import Origin
from lorafuse_fuse import cli
from lorafuse_fuse.carry import SMALL_BYTES

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
