"""Headers: read as safetensors writes them, refused where they lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorafuse_common.errors import CheckpointError
from lorafuse_common.tensorfile import encode_header, is_scalar, read_header, read_scalar, read_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,  # with no tensors and empty metadata, safetensors itself writes a broken header
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_reads_what_safetensors_wrote(
    tmp_path: Path, spec: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, (dtype, shape) in spec.items()}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata=metadata)
    file = read_header(path)
    assert dict(file.metadata) == metadata
    assert set(file.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(read_tensor(file.tensors[name]), tensor)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_without_torch(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    save_file({"alpha": torch.full(shape, 8, dtype=dtype)}, tmp_path / "x.safetensors")
    ref = read_header(tmp_path / "x.safetensors").tensors["alpha"]
    assert is_scalar(ref)
    assert read_scalar(ref) == 8.0


def test_new_metadata_keeps_the_data(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    source = read_header(tmp_path / "x.safetensors")
    data = source.path.read_bytes()[source.data_start :]
    copy = tmp_path / "y.safetensors"
    copy.write_bytes(encode_header(source, {"format": "pt", "lorafuse": '{"ä": 1}'}) + data)
    with safe_open(copy, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "lorafuse": '{"ä": 1}'}
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(copy).items())
    assert list(read_header(copy).tensors) == list(source.tensors)


def _file(path: Path, header: object, data: bytes = b"", raw: bytes | None = None) -> Path:
    text = raw if raw is not None else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": F32}, b"\0" * 3, "truncated"),
        ({"a": F32}, b"\0" * 9, "past its last tensor"),
        ({"a": F32 | {"dtype": "F31"}}, b"\0" * 4, "unknown dtype"),
        ({"a": F32 | {"shape": [2]}}, b"\0" * 4, "do not hold shape"),
        ({"a": F32 | {"shape": [-1]}}, b"\0" * 4, "whole numbers"),
        ({"a": F32 | {"data_offsets": [4, 8]}}, b"\0" * 8, "overlap or leave holes"),
        ({"a": F32, "b": F32}, b"\0" * 4, "overlap or leave holes"),
        ({"a": {"dtype": "F32"}}, b"", "needs dtype, shape and data_offsets"),
        ({"a": 3}, b"", "needs dtype, shape and data_offsets"),
        ([1], b"", "no JSON object"),
        ({"__metadata__": {"a": 1}}, b"", "strings to strings"),
    ],
)
def test_inconsistent_headers_are_refused(tmp_path: Path, header: object, data: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as error:
        read_header(_file(tmp_path / "x.safetensors", header, data))
    assert "x.safetensors" in str(error.value)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    cases = {
        "empty.safetensors": b"",
        "lfs.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
        "page.safetensors": b"<!DOCTYPE html><html></html>",
        "twice.safetensors": struct.pack("<Q", 15) + b'{"a":{},"a":{}}',
        "deep.safetensors": struct.pack("<Q", 100000) + b"[" * 100000,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_header(tmp_path / name)
    with pytest.raises(CheckpointError, match="pickle"):
        read_header(tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "absent.safetensors")
