"""Names of things on the hub: `owner/repo@revision` and `hf://owner/repo@revision/path`, told apart from paths.

The revision stands behind the repository, as in the hub's own spelling, or at the end of the name. Whether a name is
looked up at all is decided by its form alone: `hf://` always is, and so is `owner/repo` where no such path exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lorafuse_common.errors import ConfigError

SCHEME = "hf://"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json")
_OTHER_KINDS = ("datasets", "spaces", "kernels", "buckets")
_SEGMENT = r"[A-Za-z0-9](?:[\w.-]*\w)?"
_REVISION = r"refs/pr/\d+|refs/convert/[\w.-]+|[^/@]+"
_NAME = re.compile(rf"({_SEGMENT}/{_SEGMENT})(?:@({_REVISION}))?(?:/(.+))?")
_COMPONENT = re.compile(r"transformer(?:_\w+)?")
"""What stands behind an @ is one of these, or else a revision; behind a strength any word is a component."""
_EXPECTED = "expected hf://owner/repo[@REVISION][/PATH]"


@dataclass(frozen=True, slots=True)
class HubName:
    """A model repository on the hub, or a file or folder in one."""

    repo: str
    revision: str | None = None
    """A branch, tag or commit; None for the default branch."""
    path: str = ""
    """A file or folder in it; empty for the whole."""
    is_bare: bool = False
    """Whether it was written without `hf://`, so that it might be a mistyped path."""

    def __str__(self) -> str:
        revision = self.revision or ""
        if not revision.startswith("refs/"):
            revision = revision.replace("/", "%2F")
        return f"{SCHEME}{self.repo}{'@' if revision else ''}{revision}{'/' if self.path else ''}{self.path}"


class HubLora(NamedTuple):
    """What `--lora` asks for, where it is on the hub."""

    name: HubName
    strength: float
    component: str | None


def base_name(text: str) -> HubName | None:
    """The hub name that BASE is, or None where it is a path: one that exists, or has another form than owner/repo.

    Raises:
        ConfigError: it begins with hf:// and goes on otherwise than expected.
    """
    if text.startswith(SCHEME):
        return _parse(text.removeprefix(SCHEME), text)
    return None if Path(text).exists() else _bare(text)


def lora_name(text: str) -> HubLora | None:
    """What `--lora` asks the hub for, or None where it is a path.

    `NAME[:STRENGTH][@COMPONENT]`: behind a strength, @ is followed by a component. Without one, `@transformer` and
    `@transformer_2` are components and everything else is a revision; a revision of such a name is written behind the
    repository, `hf://owner/repo@transformer/file.safetensors`.

    Raises:
        ConfigError: it begins with hf:// and goes on otherwise than expected, or a name on the hub has no strength
            behind its colon or more than one revision.
    """
    is_uri = text.startswith(SCHEME)
    parts = re.fullmatch(r"(.+?)(?::([^:/@]*))?(?:@([A-Za-z]\w*))?", text.removeprefix(SCHEME))
    if parts is None or (not is_uri and Path(text).exists()):
        return None
    body, strength, component = parts.groups()
    if strength is None and component and not _COMPONENT.fullmatch(component):
        body, component = f"{body}@{component}", None
    earlier, _, last = body.rpartition("@")
    if component is None and earlier and _COMPONENT.fullmatch(last):
        body, component = earlier, last  # FILE@COMPONENT:STRENGTH
    name = _parse(body, text) if is_uri else None if Path(body).exists() else _bare(body, in_it=".safetensors")
    return HubLora(name, _strength(strength, text), component) if name else None


def _parse(body: str, text: str) -> HubName:
    kind = body.partition("/")[0]
    if kind in _OTHER_KINDS:
        raise ConfigError(f"{text}: {kind} are no models; {_EXPECTED}")
    if body.count("/") > 1:
        body = body.removeprefix("models/")
    found = _NAME.fullmatch(body.removesuffix("/"))
    if not found or not _is_repo(found[1]):
        raise ConfigError(f"{text}: is no name on the hub; {_EXPECTED}")
    revision, path = found[2], found[3] or ""
    before, _, behind = path.rpartition("@")
    if before and re.fullmatch(_REVISION, behind) and not behind.endswith(_WEIGHTS):
        if revision or ("@" in before and not before.endswith(_WEIGHTS)):
            raise ConfigError(f"{text}: has two revisions; a component stands behind the strength: ...:1@{behind}")
        revision, path = behind, before
    if any(part in ("", ".", "..") for part in path.split("/")) and path:
        raise ConfigError(f"{text}: {path!r} is no path in a repository; {_EXPECTED}")
    return HubName(found[1], revision.replace("%2F", "/") if revision else None, path)


def _bare(text: str, in_it: str | None = None) -> HubName | None:
    """`owner/repo[@revision]` and, for a file that ends in `in_it`, `owner/repo[@revision]/path`."""
    found = _NAME.fullmatch(text)
    if not found or not _is_repo(found[1]) or (found[3] and in_it is None):
        return None
    if found[1].endswith(_WEIGHTS):
        return None  # a file in a folder
    name = _parse(text, text)
    if name.path and not name.path.endswith(in_it or ""):
        return None
    return HubName(name.repo, name.revision, name.path, is_bare=True)


def _is_repo(repo: str) -> bool:
    return not any(part in repo for part in ("--", "..")) and not repo.endswith(".git")


def _strength(tail: str | None, text: str) -> float:
    if tail is None:
        return 1.0
    try:
        strength = float(tail)
    except ValueError:
        raise ConfigError(f"--lora {text}: {tail!r} is no strength; expected NAME[:STRENGTH][@COMPONENT]") from None
    if not -1e3 < strength < 1e3:
        raise ConfigError(f"--lora {text}: strength {tail} is out of range; strengths are about 1")
    return strength
