"""Headers, indexes and files that mean harm, or were merely cut, mistaken or mislabelled: refused by name, in time.

Where our reading of a header differs from the reference implementation's, `DELIBERATE` says so.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from builders import make_factors, save_model, write_lora
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mutations import MUTATIONS, Draft, damaged, mutated
from safetensors.torch import save_file

from lorafuse_common.checkpoint import open_checkpoint
from lorafuse_common.dialects.lightning import LIGHTNING
from lorafuse_common.errors import CheckpointError, LoraFileError, LorafuseError, ManifestError
from lorafuse_common.header import HeaderError, parse_header
from lorafuse_common.lora import read_lora
from lorafuse_common.manifest import MANIFEST_NAME, read_manifest
from lorafuse_common.scale import read_scale_sources
from lorafuse_common.tensorfile import read_bytes, read_header

DELIBERATE = (
    "occurs twice",  # the reference takes the last of two entries, and of two metadata keys
    "and no more, has",  # it drops fields that it does not know, and reads `["F32", [1], [0, 4]]` as an entry
    "must be whole numbers",
    "has a name of",  # longer than 512 characters
    "beyond what can be counted",  # [0, 2^62, 2^62], which torch does not take
)
"""What we refuse though the reference reads it, by words of our messages; nothing is read that it refuses."""


def encoded(text: str | bytes, data: bytes = b"") -> bytes:
    raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw + data


def agree(raw: bytes, path: Path) -> str:
    """Read a file as we do and as the reference does; `same`, `refused` or `stricter`."""
    path.write_bytes(raw)
    try:
        found = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
        theirs = {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in found}
    except safetensors.SafetensorError:
        theirs = None
    try:
        file = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        assert theirs is None or any(words in str(error) for words in DELIBERATE), error
        return "refused" if theirs is None else "stricter"
    ours = {name: (ref.dtype, list(ref.shape), read_bytes(ref)) for name, ref in file.tensors.items()}
    assert ours == theirs
    return "same"


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
PIECES = [
    *'{}[],:" \n\t\r0123456789-+.eE\\u/', "\0", "\ud800", "\ufeff", "ä", "null", "true", "NaN", "Infinity", "1e5", "-0",
    '"a"', '"b"', '"dtype"', '"shape"', '"data_offsets"', '"__metadata__"', '"F32"', '"U8"', '"F4"', "[0,4]", "[1]",
    "[]", ENTRY, '"a":' + ENTRY, '{"x":"y"}', "18446744073709551616", "9223372036854775807", '"\\ud800"', '"\\u0061"',
]  # fmt: skip


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.integers(0, 9))
@example("", 0)
@example(" {} \n", 0)
@example('{"__metadata__":null}', 0)
@example('{"__metadata__":{},"__metadata__":{}}', 0)
@example('{"__metadata__":{"a":"1","a":"2"}}', 0)
@example(f'{{"a":{ENTRY},"a":{ENTRY}}}', 4)
@example(f'{{"\\ud83d\\ude00\\u0000":{ENTRY}}}', 4)
@example(f'{{"\\ud800":{ENTRY}}}', 4)
@example('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0)
@example('{"a":{"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}', 0)
@example('{"a":{"dtype":"F32","shape":[4611686018427387904,4611686018427387904,0],"data_offsets":[0,0]}}', 0)
@example('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}', 1)
@example(f'{{"a":{{"dtype":"F32","shape":[0],"data_offsets":[2,2]}},"b":{ENTRY}}}', 4)
@example(f'{{"a":{{"dtype":"F32","shape":[0],"data_offsets":[4,4]}},"b":{ENTRY}}}', 4)
@example('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":[-1.5]}}', 4)
@example('{"a":["F32",[1],[0,4]]}', 4)
def test_reads_what_the_reference_reads_or_less(tmp_path: Path, text: str, size: int) -> None:
    agree(encoded(text, bytes(range(size))), tmp_path / "x.safetensors")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_edited_headers_agree_with_the_reference(tmp_path: Path, data: st.DataObject) -> None:
    """A valid file, whose header has a few characters replaced by others."""
    tensors = {"a": torch.ones(2, 3), "b.weight": torch.ones(4, dtype=torch.float16), "c": torch.ones(0, 5)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, body = raw[8 : 8 + length], raw[8 + length :]
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(header)))
        new = data.draw(
            st.one_of(st.sampled_from(PIECES).map(lambda t: t.encode("utf-8", "surrogatepass")), st.binary(max_size=2))
        )
        header = header[:at] + new + header[at + data.draw(st.integers(0, 3)) :]
    agree(encoded(header, body), tmp_path / "x.safetensors")


def test_mutated_files_agree_with_the_reference(tmp_path: Path) -> None:
    source = write_lora(tmp_path / "lora.safetensors", make_factors(), LIGHTNING, 2.0)
    found = [agree(mutated(source, seed), tmp_path / "x.safetensors") for seed in range(600)]
    assert all(found.count(kind) > 5 for kind in ("same", "refused", "stricter"))


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("[" * 1000000, "no JSON object"),
        ('{"a":' + "[" * 1000000, "needs dtype, shape"),
        ('{"a":' * 100000, "needs dtype, shape"),
        ('{"__metadata__":' + "[" * 1000000, "strings to strings"),
        ('{"' + "a" * 1000000 + '":' + ENTRY + "}", "a name of 1000000 characters"),
        ('{"a":{"dtype":"U8","shape":[' + "9" * 1000000 + "]}}", "needs dtype"),
        ('{"a":{"dtype":"U8","shape":[' + "1," * 1000000 + "1]}}", "needs dtype"),
        ('{"a":{"dtype":"U8","shape":[' + "9" * 3000 + '],"data_offsets":[0,1]}}', "must be whole numbers"),
        ('{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', "must be whole numbers"),
        ('{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', "is no whole number"),
        ('{"a":{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,1]}}', "must be whole numbers"),
        ('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', "is no whole number"),
        ('{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}', "needs dtype"),
        ('{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "occurs twice"),
        ('{"\\ud800":' + ENTRY + "}", "no valid JSON"),
        (b'{"\xff":3}', "no valid JSON"),
        ("{}".encode("utf-16"), "no valid JSON"),
        ("\ufeff{}", "no JSON object"),
        ("{},", "no valid JSON"),
        ("{", "no valid JSON"),
        ('{"a"', "no valid JSON"),
    ],
)
def test_what_is_wrong_with_a_header(header: str | bytes, says: str) -> None:
    raw = header.encode() if isinstance(header, str) else header
    with pytest.raises(HeaderError, match=says) as error:
        parse_header(raw)
    assert len(str(error.value)) < 400


def test_names_are_only_names(tmp_path: Path) -> None:
    """A path, a NUL or a line break in a tensor's name are read and written back, and lead nowhere."""
    names = ["../../etc/passwd", "/etc/passwd", "a\0b", "a\nb", "..", ""]
    entries = {name: {"dtype": "U8", "shape": [1], "data_offsets": [n, n + 1]} for n, name in enumerate(names)}
    draft = Draft(entries, bytearray(b"abcdef"), {"format": "pt"})
    assert agree(draft.encode(), tmp_path / "x.safetensors") == "same"
    assert list(read_header(tmp_path / "x.safetensors").tensors) == names


HOSTILE_100_MB = {
    "opened": (b"[", b"", b""),
    "nested": (b"[", b'{"a":', b""),
    "objects": (b'{"a":', b"", b""),
    "empty lists": (b"[],", b'{"__metadata__":[', b"]}"),
    "one name": (b"a", b'{"', b'":1}'),
    "one number": (b"9", b'{"a":{"dtype":"U8","shape":[', b"]}}"),
    "blanks": (b" ", b"", b""),
    "zeros": (b"\0", b"", b""),
    "many names": (b'"%07x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b"{", b""),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE_100_MB)
def test_100_mb_of_header_cost_little_memory_and_time(tmp_path: Path, kind: str) -> None:
    piece, before, after = HOSTILE_100_MB[kind]
    count = (100_000_000 - 100) // (len(piece) + 4 * (b"%" in piece))
    body = b"".join(piece % n for n in range(count)) if b"%" in piece else piece * count
    path = tmp_path / "x.safetensors"
    path.write_bytes(encoded(before + body + after))
    code = rf"""
import re
from pathlib import Path
from lorafuse_common.errors import CheckpointError
from lorafuse_common.tensorfile import read_header
try:
    read_header(Path({str(path)!r}))
except CheckpointError as error:
    print(str(error)[:300])
print(int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) >> 10)
"""
    started = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    message, megabytes = run.stdout.splitlines()
    assert str(path) in message
    assert int(megabytes) < 500, message
    assert time.monotonic() - started < 60  # a few seconds on an idle machine
    path.unlink()


def test_lengths_beyond_the_file_allocate_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for length in (1, 2**31, 2**63, 2**64 - 1, 100_000_001):
        path.write_bytes(struct.pack("<Q", length))
        with pytest.raises(CheckpointError, match=re.escape(str(length))):
            read_header(path)
    with path.open("wb") as file:  # as long as it says, and longer than any header may be
        file.write(struct.pack("<Q", 10**12))
        file.truncate(10**12 + 8)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(path)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


STRANGERS: dict[str, tuple[Any, str]] = {
    "torch.save": (lambda path: torch.save({"a": torch.ones(2)}, path), "pickle"),
    "old torch.save": (
        lambda path: torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        "is a pickle",
    ),
    "pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94.", "is a pickle"),
    "zip": (_zip, "zip archive"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(100), "GGUF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n", "git-lfs pointer"),
    "html": (b"\n<!DOCTYPE html><html><head>", "web page"),
    "lower html": (b"<html lang=en>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "XML"),
    "json": (b'{"error": "Invalid username or password."}', "JSON text"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(20), "gzip"),
    "zeros": (bytes(1000), "begins with zeros"),
    "numpy": (b"\x93NUMPY\x01\0v\0{'descr'", "numpy"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(20), "picture"),
    "empty": (b"", "0 bytes long"),
    "cut": (encoded('{"a":' + ENTRY + "}", b"1234")[:20], "truncated"),
    "damaged": (encoded('{"a";' + ENTRY + "}", b"1234"), "no valid JSON"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_files_that_are_something_else_say_what_they_are(tmp_path: Path, kind: str) -> None:
    content, says = STRANGERS[kind]
    path = tmp_path / "x.safetensors"
    content(path) if callable(content) else path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(says)) as error:
        read_header(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".pkl", ".PT"])
def test_pickles_are_refused_with_the_reason(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save({"a": torch.ones(2)}, path)
    for read in (read_header, open_checkpoint):
        with pytest.raises(CheckpointError, match="can run code when loaded"):
            read(path)
    with pytest.raises(LoraFileError, match="can run code when loaded"):
        read_lora(path)
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / path.name)
    with pytest.raises(CheckpointError, match="can run code when loaded"):
        open_checkpoint(tmp_path / "folder")


def _special(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(path.parent)  # the path of a socket may not be long
            listener.bind(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "terminal":
        path.symlink_to("/dev/tty")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to("absent")


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "terminal", "folder", "loop", "dangling"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.safetensors"
    _special(path, kind)
    for read in (read_header, read_lora, open_checkpoint):
        with pytest.raises(LorafuseError, match=r"x\.safetensors"):
            read(path)
    with pytest.raises(CheckpointError):  # as the only weights in a folder
        open_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": path.name}}))
    with pytest.raises(CheckpointError, match="missing"):  # as a shard
        open_checkpoint(tmp_path)
    index.unlink()
    _special(tmp_path / "model.safetensors.index.json", kind)
    _special(tmp_path / "adapter_config.json", kind)
    _special(tmp_path / MANIFEST_NAME, kind)
    assert read_scale_sources(path, {}).config is None
    assert read_manifest(tmp_path) is None
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
def test_what_may_not_be_read() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        base = Path(name) / "base"
        file = save_model(base) / "diffusion_pytorch_model.safetensors"
        Path(name).chmod(0o755)
        for closed in (file, base):
            closed.chmod(0)
            os.seteuid(65534)
            try:
                for read in (lambda: open_checkpoint(base), lambda: open_checkpoint(file), lambda: read_lora(file)):
                    with pytest.raises(LorafuseError, match="Permission denied"):
                        read()
            finally:
                os.seteuid(0)
                closed.chmod(0o755)


def sharded(folder: Path) -> tuple[Path, dict[str, Any]]:
    save_model(folder, sharded=True)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    return index, json.loads(index.read_text())


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x.safetensors", "/etc/passwd", "a/b.safetensors", "x\0y", "\ud800", "./x.safetensors",
     "x" * 300, "x.bin", "config.json", "diffusion_pytorch_model.safetensors.index.json"],
)  # fmt: skip
def test_shards_outside_the_folder_or_of_no_kind(tmp_path: Path, name: str) -> None:
    index, good = sharded(tmp_path / "base")
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    first = next(iter(good["weight_map"]))
    index.write_text(json.dumps(good | {"weight_map": good["weight_map"] | {first: name}}))
    with pytest.raises(CheckpointError, match="base"):
        open_checkpoint(tmp_path / "base")


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "{", "[" * 100000, '{"a":' * 100000, "\0", '{"weight_map": 3}', '{"weight_map": {"a": 3}}',
     '{"weight_map": {"a": null}}', '{"weight_map": {}}', '{"metadata": [], "weight_map": {"a": "b"}}',
     '{"metadata": {"total_size": "x"}, "weight_map": {"a": "b"}}', '{"x": ' + "9" * 10000 + "}", "\ud800"],
)  # fmt: skip
def test_broken_indexes_and_configurations(tmp_path: Path, text: str) -> None:
    index, _ = sharded(tmp_path / "base")
    for path in (index, tmp_path / "base" / "config.json"):
        kept = path.read_bytes()
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if path == index or not text.startswith(('{"w', '{"m')):
            with pytest.raises(CheckpointError, match=path.name):
                open_checkpoint(tmp_path / "base")
        path.write_bytes(kept)
    (tmp_path / MANIFEST_NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ManifestError, match=MANIFEST_NAME):
        read_manifest(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(LoraFileError, match="adapter_config"):
        read_scale_sources(tmp_path / "x.safetensors", {})


def test_side_files_of_any_size_are_not_loaded(tmp_path: Path) -> None:
    index, _ = sharded(tmp_path / "base")
    for path in (index, tmp_path / "base" / "config.json", tmp_path / MANIFEST_NAME, tmp_path / "adapter_config.json"):
        kept = path.read_bytes() if path.exists() else b""
        with path.open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(LorafuseError, match="are more than any"):
            if path.parent == tmp_path:
                read_manifest(tmp_path) if path.name == MANIFEST_NAME else read_scale_sources(tmp_path / "x", {})
            else:
                open_checkpoint(tmp_path / "base")
        path.write_bytes(kept)


def test_the_hub_s_links_are_followed_and_circles_are_not(tmp_path: Path) -> None:
    """The hub's cache keeps files as blobs, and links to them; a folder may also link to where it lies."""
    _, good = sharded(tmp_path / "blobs")
    snapshot = tmp_path / "models--x--y" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../..") / "blobs" / path.name)
    (snapshot / "up").symlink_to("..")
    checkpoint = open_checkpoint(snapshot)
    assert set(checkpoint.tensors) == set(good["weight_map"])
    assert open_checkpoint(snapshot / "up" / "1").tensors.keys() == checkpoint.tensors.keys()


@pytest.mark.parametrize("component", ["..", ".", "", "../other", "/etc", "transformer/..", "a\0b"])
def test_components_outside_the_pipeline(tmp_path: Path, component: str) -> None:
    save_model(tmp_path / "p" / "transformer")
    save_model(tmp_path / "other")
    (tmp_path / "p" / "model_index.json").write_text("{}")
    if component:
        with pytest.raises(CheckpointError, match="can be one of"):
            open_checkpoint(tmp_path / "p", component)


@pytest.mark.parametrize(
    "config",
    ['{"r": 0}', '{"r": -1}', '{"r": Infinity}', '{"r": 1e400, "lora_alpha": 1}', '{"r": 4, "lora_alpha": NaN}',
     '{"r": 4, "rank_pattern": {"(": 1}}', '{"r": 4, "rank_pattern": {"(a+)+$": 1}}', '{"r": 4, "alpha_pattern": [1]}',
     '{"r": 4, "rank_pattern": {"x": 0}}', '{"r": 4, "modules_to_save": 3}', '{"r": [4]}', '{"r": true}'],
)  # fmt: skip
def test_configurations_that_no_trainer_writes(tmp_path: Path, config: str) -> None:
    with pytest.raises(LoraFileError, match="no LoRA configuration"):
        read_scale_sources(tmp_path / "x.safetensors", {"lora_adapter_metadata": config})


@pytest.mark.parametrize(
    "change",
    [{"outputs": [{"path": "../x", "sha256": "0", "size": 1}]}, {"outputs": [{"path": 3, "sha256": "0", "size": 1}]},
     {"base": [{"path": "/etc/passwd", "sha256": "0", "size": 1}]}, {"outputs": "abc"}, {"loras": [3]}, {"loras": {}},
     {"schedule": []}, {"schedule": {"sigmas": ["x"], "guidance_scale": 1, "source": ""}}, {"family": 3}, {"seed": "x"},
     {"parent": {"parent": {}}}, {"schema": "2"}, {"changes": [[]]}, {"origin": 1}, {"allowed": [None]},
     {"role": "x"}, {"role": 1}, {"role": None},
     {"schedule": {"sigmas": [1.0], "guidance_scale": 1.0, "source": "", "scheduler": []}}],
)  # fmt: skip
def test_manifests_with_wrong_values(tmp_path: Path, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "schema": 2, "version": "0", "family": None, "layout": None, "component": None, "base": [], "loras": [],
        "allowed": [], "dtype": None, "seed": None, "schedule": None, "outputs": [], "changes": [], "parent": None,
    }  # fmt: skip
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(good))
    assert read_manifest(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(good | change))
    with pytest.raises(ManifestError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def test_every_mutation_is_drawn() -> None:
    """The corpus reaches all of them; the seeds are fixed, so it is the same everywhere."""
    drawn = {id(mutation) for seed in range(600) for mutation in random.Random(seed).sample(MUTATIONS, 1)}
    assert len(drawn) == len(MUTATIONS)
    assert len({damaged(bytes(range(256)), random.Random(seed)) for seed in range(100)}) > 50
