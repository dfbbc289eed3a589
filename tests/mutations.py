"""Safetensors files broken in every way that one can think of, each drawn from a seed."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DTYPES = ("F32", "BF16", "F16", "F64", "U8", "I8", "I64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "U16")
BITS = {"F4": 4, "F32": 32, "F64": 64, "I64": 64, "C64": 64, "BF16": 16, "F16": 16, "U16": 16}
NAMES = (
    "", ".", "..", "/etc/passwd", "../../x", "a\0b", "a\nb", "\x1b[2J\x1b]0;title\x07", "\u202egnp.x", "x" * 400,
    "x" * 5000, "__metadata__ ", ".weight", "lora_A.weight", ".alpha", "a.lora_up.weight", "transformer.", "ä.weight",
    "transformer_blocks.0.attn.to_q.alpha", "lora_unet_.alpha", "%s%n{0}", "a.lora_A.b.lora_B.weight", "x.diff_b",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0,
    1,
    -1,
    2,
    3,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    0.5,
    1e400,
    float("nan"),
    True,
    None,
    "1",
    [1],
    {},
)
METADATA: tuple[tuple[str, str], ...] = (
    ("lora_adapter_metadata", "[" * 5000),
    ("lora_adapter_metadata", '{"r": 0, "lora_alpha": 1}'),
    ("lora_adapter_metadata", '{"r": 4, "lora_alpha": Infinity}'),
    ("lora_adapter_metadata", '{"r": Infinity, "lora_alpha": 1}'),
    ("lora_adapter_metadata", '{"r": 4, "lora_alpha": 4, "rank_pattern": {"(": 2}}'),
    ("lora_adapter_metadata", '{"r": 4, "lora_alpha": 4, "rank_pattern": {"(a|a|t|r|.+)+_$": 2}}'),
    ("lora_adapter_metadata", '{"r": 4, "lora_alpha": 4, "rank_pattern": {"transformer_blocks": 0}}'),
    ("lora_adapter_metadata", '{"r": 4, "lora_alpha": 4, "rank_pattern": [1], "alpha_pattern": 3}'),
    ("lora_adapter_metadata", '{"r": 4, "lora_alpha": 4, "peft_type": {"a": [1]}, "modules_to_save": 3}'),
    ("lora_adapter_metadata", '{"r": 4, "lora_alpha": 4, "init_lora_weights": [], "modules_to_save": [[1]]}'),
    ("lora_adapter_metadata", '{"r": null}'), ("lora_adapter_metadata", "7"), ("lora_adapter_metadata", ""),
    ("few_step_schedule", "[" * 5000), ("few_step_schedule", '{"sigmas": 3}'), ("few_step_schedule", '{"sigmas": {}}'),
    ("few_step_schedule", '{"sigmas": [1, 0.5], "guidance_scale": 1' + "0" * 400 + "}"),
    ("few_step_schedule", '{"sigmas": [1, NaN]}'), ("few_step_schedule", '{"sigmas": [1], "guidance_scale": NaN}'),
    ("ss_network_alpha", "nan"), ("ss_network_dim", "1e999"), ("network_alpha", "-3"), ("alpha", "Dynamic"),
    ("rank", "0"), ("lorafuse", "{"), ("modelspec.architecture", "\x1b[31m"), ("format", "tf"),
)  # fmt: skip
"""What headers may carry that is read besides the tensors."""


@dataclass
class Draft:
    """A safetensors file that may be wrong."""

    entries: dict[str, Any]
    data: bytearray
    metadata: Any = None
    replaced: list[tuple[bytes, bytes]] = field(default_factory=list)
    """What is replaced in the text of the header, once each."""

    def encode(self) -> bytes:
        """The file's bytes."""
        header = ({} if self.metadata is None else {"__metadata__": self.metadata}) | self.entries
        raw = json.dumps(header).encode("utf-8", "surrogatepass")
        for old, new in self.replaced:
            raw = raw.replace(old, new, 1)
        return struct.pack("<Q", len(raw)) + raw + bytes(self.data)


def draft_of(path: Path) -> Draft:
    """A file as it is."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", None)
    return Draft(header, bytearray(raw[8 + length :]), metadata)


def _entry(draft: Draft, rng: random.Random) -> dict[str, Any]:
    found: dict[str, Any] = draft.entries[rng.choice(list(draft.entries))]
    return found


def _another_dtype(draft: Draft, rng: random.Random) -> None:
    _entry(draft, rng)["dtype"] = rng.choice([*DTYPES, "F31", "", None, 3, ["F32"], "f32", "BF16 "])


def _another_dtype_that_fits(draft: Draft, rng: random.Random) -> None:
    """Consistent, and yet no dtype that factors have."""
    entry = _entry(draft, rng)
    entry["dtype"] = dtype = rng.choice(DTYPES)
    begin, end = entry["data_offsets"]
    entry["shape"] = rng.choice(
        [[(end - begin) * 8 // BITS.get(dtype, 8)], [1, (end - begin) * 8 // BITS.get(dtype, 8)]]
    )


def _another_shape(draft: Draft, rng: random.Random) -> None:
    entry = _entry(draft, rng)
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        [
            shape[::-1], [*shape, 1], [1, *shape], [*shape, 0], [0], [], [-n for n in shape], [0.5], "4", [[1]], {},
            [2**32, 2**32], [2**62, 2**62, 0], [2**63 - 1], [2**63], [True], [1e2], [None], [1] * 300, [1] * 5000,
        ]
    )  # fmt: skip


def _another_size(draft: Draft, rng: random.Random) -> None:
    entry = _entry(draft, rng)
    if entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(NUMBERS)


def _other_offsets(draft: Draft, rng: random.Random) -> None:
    entry, other = _entry(draft, rng), _entry(draft, rng)
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        [
            [end, begin], [begin, end + 4], [begin - 4, end], [begin + 4, end + 4], [begin, 2**63], [0, end - begin],
            [begin], [begin, end, end], [], None, "0", [begin, rng.choice(NUMBERS)], [2**62, 2**62 + end - begin],
            [2**64 - 1, end - begin - 1], other["data_offsets"],
        ]
    )  # fmt: skip


def _swapped_data(draft: Draft, rng: random.Random) -> None:
    one, other = _entry(draft, rng), _entry(draft, rng)
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def _empty_tensors(draft: Draft, rng: random.Random) -> None:
    """Zero-size tensors, consistent: every dimension of one kind becomes 0, and the data is cut."""
    axis, at, data = rng.choice([0, 1, -1]), 0, bytearray()
    for entry in sorted(draft.entries.values(), key=lambda entry: entry["data_offsets"]):
        begin, end = entry["data_offsets"]
        if len(entry["shape"]) > max(axis, 0) and rng.random() < 0.7:
            entry["shape"][axis] = 0
            end = begin
        data += draft.data[begin:end]
        entry["data_offsets"] = [at, at + end - begin]
        at += end - begin
    draft.data = data


def _without_a_field(draft: Draft, rng: random.Random) -> None:
    entry = _entry(draft, rng)
    del entry[rng.choice(list(entry))]


def _with_a_field(draft: Draft, rng: random.Random) -> None:
    _entry(draft, rng)[rng.choice(["x", "offset", "Dtype"])] = rng.choice(NUMBERS)


def _another_entry(draft: Draft, rng: random.Random) -> None:
    draft.entries[rng.choice(list(draft.entries))] = rng.choice(
        [None, 3, [], "x", [["F32"], [1], [0, 4]], {}, {"a": {}}]
    )


def _another_name(draft: Draft, rng: random.Random) -> None:
    old = rng.choice(list(draft.entries))
    draft.entries[rng.choice([*NAMES, old + rng.choice(NAMES), old[: rng.randrange(len(old))]])] = draft.entries.pop(
        old
    )


def _a_surrogate(draft: Draft, rng: random.Random) -> None:
    _another_name(draft, rng)
    draft.replaced.append((b'": {"dtype"', b'\\ud800": {"dtype"'))


def _no_tensors(draft: Draft, rng: random.Random) -> None:
    draft.entries = {}
    draft.data = rng.choice([bytearray(), draft.data])


def _fewer_tensors(draft: Draft, rng: random.Random) -> None:
    """Consistent, but many tensors are gone."""
    kept = {name: entry for name, entry in draft.entries.items() if rng.random() < 0.5}
    data = bytearray()
    for entry in kept.values():
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [len(data), len(data) + end - begin]
        data += draft.data[begin:end]
    draft.entries, draft.data = kept, data


def _a_name_twice(draft: Draft, rng: random.Random) -> None:
    names = list(draft.entries)
    old, new = (json.dumps(name).encode() for name in rng.sample(names, 2))
    draft.replaced.append((old, new))


def _other_metadata(draft: Draft, rng: random.Random) -> None:
    draft.metadata = rng.choice(
        [[], "x", 3, {"a": 1}, {"a": None}, {"a": {}}, {"a": "x" * 10**6}, {}, {"": ""}, {"\0": "\n"}]
    )


def _hostile_metadata(draft: Draft, rng: random.Random) -> None:
    draft.metadata = dict([rng.choice(METADATA), rng.choice(METADATA)])


def _other_values(draft: Draft, rng: random.Random) -> None:
    """NaN, infinities, zeros or noise in one tensor, so in an alpha, too."""
    begin, end = (min(at, len(draft.data)) for at in _entry(draft, rng)["data_offsets"])
    pattern = rng.choice([b"\xff", b"\0\0\x80\x7f", b"\0", b"\x80\x7f", b"\xff\xff\x7f\x7f", rng.randbytes(64)])
    draft.data[begin:end] = (pattern * (end - begin))[: end - begin]


def _other_text(draft: Draft, rng: random.Random) -> None:
    draft.replaced.append(
        rng.choice(
            [
                (b"{", b"["), (b"{", b"{,"), (b"{", b"\xef\xbb\xbf{"), (b"{", b" \n\t{"), (b"}}", b"}},"), (b":", b"="),
                (b'"dtype"', b"'dtype'"), (b'"', b'"\xff'), (b'"', b'"\0'), (b"[", b"[NaN,"), (b"[", b"[-0,"),
                (b"[0,", b"[00,"), (b"[0,", b"[0.0,"), (b"[0,", b"[0e0,"), (b'"shape"', b'"shap\\u0065"'),
                (b"{", b'{"a":' + b"[" * 100000), (b"{", b'{"a":' + b'{"a":' * 100000), (b"[", b"[" + b"9" * 100000),
            ]
        )
    )  # fmt: skip


CONSISTENT: tuple[Callable[[Draft, random.Random], None], ...] = (
    _another_dtype_that_fits,
    _empty_tensors,
    _fewer_tensors,
    _other_values,
    _hostile_metadata,
    _another_name,
    _swapped_data,
)
"""Those that leave most files well-formed, so that what comes after the header has to deal with them."""
MUTATIONS = (
    *CONSISTENT,
    _another_dtype,
    _another_shape,
    _another_size,
    _other_offsets,
    _without_a_field,
    _with_a_field,
    _another_entry,
    _a_surrogate,
    _no_tensors,
    _a_name_twice,
    _other_metadata,
    _other_text,
)


def mutated(path: Path, seed: int) -> bytes:
    """The bytes of a file with one to three mutations, and sometimes damage to its bytes."""
    rng = random.Random(seed)
    draft = copy.deepcopy(draft_of(path))
    for mutation in rng.sample(rng.choice([MUTATIONS, CONSISTENT]), rng.choice([1, 1, 1, 2, 3])):
        if draft.entries and all(isinstance(e, dict) and len(e) >= 3 for e in draft.entries.values()):
            try:
                mutation(draft, rng)
            except (TypeError, ValueError, LookupError, AttributeError):  # two mutations that exclude each other
                continue
    return damaged(draft.encode(), rng) if rng.random() < 0.2 else draft.encode()


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Bytes cut off, added, changed or swapped, mostly in the header."""
    at = rng.randrange(min(len(raw), 3000))
    return rng.choice(
        [
            raw[:at],
            raw[: len(raw) - 1 - at],
            raw + raw[:at],
            raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :],
            raw[:at] + raw[at + 1 :],
            struct.pack("<Q", rng.choice([0, 1, 2, at, len(raw), 2**63, 2**64 - 1, 10**8 + 1])) + raw[8:],
        ]
    )
