"""What a file is that was meant to be a safetensors file, by its first bytes, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
SNIFFED_BYTES = 512
_PICKLE_PROTOCOLS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

_PICKLE = (
    "is a pickle, as torch.save writes it. Pickles can run code when loaded and are not read: "
    "convert the file to .safetensors with the program that wrote it."
)
_GGUF = (
    "is a GGUF file: it holds packed weights, which cannot be edited. "
    "Fuse into the bf16 or fp16 checkpoint (.safetensors) and quantise the result."
)
_PAGE = "is a web page, saved instead of the file: download the file itself, with the login that it may need."
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (
        b"PK\x03\x04",
        "is a zip archive; mostly that is a pickle, as torch.save writes it. Pickles can run code when loaded and are "
        "not read: convert the file to .safetensors with the program that wrote it, or unpack it.",
    ),
    (b"GGUF", _GGUF),
    (b"version https://git-lfs", "is a git-lfs pointer: the file itself was not downloaded. Run git lfs pull."),
    (b"\x89HDF", "is an HDF5 file; expected .safetensors."),
    (b"\x93NUMPY", "is a numpy array; expected .safetensors."),
    (b"\x1f\x8b", "is compressed (gzip): unpack it first."),
    (b"\xfd7zXZ", "is compressed (xz): unpack it first."),
    (b"(\xb5/\xfd", "is compressed (zstd): unpack it first."),
    (b"7z\xbc\xaf", "is a 7z archive: unpack it first."),
    (b"Rar!", "is a rar archive: unpack it first."),
    (b"\x89PNG", "is a picture (PNG); expected .safetensors."),
    (b"\xff\xd8\xff", "is a picture (JPEG); expected .safetensors."),
)
_TEXTS: Mapping[bytes, str] = {
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"<?xml": "is an XML text, such as the error message of a download: download the file again.",
    b"{": "is a JSON text, such as the error message of a download or an index; expected .safetensors.",
}


def refusal_of(suffix: str) -> str | None:
    """Why files of this suffix are not opened at all; None for those that may be read."""
    if suffix.lower() in PICKLES:
        return (
            f"pickle files ({suffix}) can run code when loaded and are not read. "
            "Convert the file to .safetensors with the program that wrote it."
        )
    return _GGUF if suffix.lower() == ".gguf" else None


def identify(start: bytes) -> str | None:
    """What a file is whose first bytes are `start`; None where nothing better is known than that it is damaged."""
    if start[4:9] == b"\0\0\0\0{":
        return None  # begins as a safetensors file does, whatever the length of its header happens to spell
    found = next((what for magic, what in _MAGIC if start.startswith(magic)), None)
    if found is None and start.startswith(_PICKLE_PROTOCOLS):
        found = _PICKLE
    if found is None and b"\0" not in start[:8]:
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        found = next((what for beginning, what in _TEXTS.items() if text.startswith(beginning)), None)
    if found is None and len(start) >= 8 and not start.strip(b"\0"):
        found = "begins with zeros, as an unfinished download does: download it again."
    return found
