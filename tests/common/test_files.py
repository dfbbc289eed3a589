"""Hashes, publishing and the manifest."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest

from lorafuse_common import hashing
from lorafuse_common.errors import ManifestError, OutputError
from lorafuse_common.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    FileRecord,
    FusedLora,
    Manifest,
    Parent,
    Schedule,
    TensorChange,
    dump_manifest,
    read_manifest,
    verify_manifest,
)
from lorafuse_common.publish import publish


def _old(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    os.utime(path, (1, 1))
    return path


def test_hash_is_sha256_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_RACY_NS", -(10**18))
    path = _old(tmp_path / "x", b"abc" * 10**6)
    assert hashing.remembered(path) is None
    assert hashing.sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert hashing.remembered(path) == hashing.sha256_of(path)
    _old(path, b"abd" * 10**6)  # same size and mtime: the ctime tells
    assert hashing.remembered(path) is None
    assert hashing.sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_fresh_files_are_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    hashing.sha256_of(tmp_path / "x")
    assert hashing.remembered(tmp_path / "x") is None


def test_a_broken_memory_is_harmless(tmp_path: Path) -> None:
    memory = Path(os.environ["XDG_CACHE_HOME"]) / "lorafuse" / "hashes.json"
    memory.parent.mkdir(parents=True)
    memory.write_text('{"x": 3}')
    path = _old(tmp_path / "x", b"abc")
    assert hashing.sha256_of(path) == hashlib.sha256(b"abc").hexdigest()


def test_publish_appears_whole(tmp_path: Path) -> None:
    with publish(tmp_path / "new" / "out") as staging:
        (staging / "a").write_text("1")
        assert not (tmp_path / "new" / "out").exists()
    assert (tmp_path / "new" / "out" / "a").read_text() == "1"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_publish_leaves_nothing_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("kept")
    with pytest.raises(error), publish(tmp_path / "out", replace=True) as staging:
        (staging / "a").write_text("1")
        raise error
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "old"]


def test_publish_replaces_only_when_told(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(OutputError, match="exists"), publish(tmp_path / "out"):
        pass
    with publish(tmp_path / "out", replace=True) as staging:
        (staging / "new").write_text("")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


def _manifest(folder: Path) -> Manifest:
    (folder / "transformer").mkdir(parents=True)
    weights = folder / "transformer" / "model.safetensors"
    weights.write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    scale, ignored = "alpha/rank = 1", {"OTHER_COMPONENT": 1}
    lora = FusedLora("a.safetensors", "0" * 64, 3, "transformer", "kohya", 0.5, scale, 3, 2, ignored)
    outputs = tuple(
        FileRecord(path, hashlib.sha256((folder / path).read_bytes()).hexdigest(), (folder / path).stat().st_size)
        for path in ("config.json", "transformer/model.safetensors")
    )
    return Manifest(
        schema=SCHEMA,
        version="0",
        family="qwen_image",
        layout=None,
        component="transformer",
        base=outputs,
        loras=(lora,),
        allowed=("OTHER_COMPONENT",),
        dtype=None,
        seed=None,
        schedule=Schedule((1.0, 0.5), 1.0, "a"),
        outputs=outputs,
        changes=(TensorChange("x", None, 1.0, 0.1, 0.2, 0.99),),
        parent=Parent("1" * 64, (lora,), Parent("2" * 64, (), None)),
    )


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text(dump_manifest(manifest))
    assert read_manifest(tmp_path) == manifest
    assert read_manifest(tmp_path / "transformer") is None
    verify_manifest(tmp_path, manifest, hashes=True)


def test_every_difference_is_listed(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "transformer" / "model.safetensors").write_bytes(b"WEIGHTS")
    with pytest.raises(ManifestError, match=re.escape("config.json is missing")):
        verify_manifest(tmp_path, manifest, hashes=False)
    with pytest.raises(ManifestError, match=r"missing; transformer/model\.safetensors has another sha256"):
        verify_manifest(tmp_path, manifest, hashes=True)


def test_identity_is_of_the_weights_only(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path)
    config, weights = manifest.outputs
    same = Manifest(**{f: getattr(manifest, f) for f in manifest.__slots__} | {"outputs": (weights,)})
    other = Manifest(
        **{f: getattr(manifest, f) for f in manifest.__slots__}
        | {"outputs": (config, FileRecord(weights.path, "f" * 64, weights.size))}
    )
    assert same.fused_sha256 == manifest.fused_sha256 != other.fused_sha256


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "version": "0"}'])
def test_broken_manifests_name_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(ManifestError, match=MANIFEST_NAME):
        read_manifest(tmp_path)
