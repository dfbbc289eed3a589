"""Repositories on the hub: a revision resolved, its files listed, and what is needed downloaded.

huggingface_hub is imported only where a name is looked up. Its cache, tokens, endpoint and offline mode apply.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafuse_common import __version__
from lorafuse_common.errors import HubError
from lorafuse_common.manifest import Origin
from lorafuse_fuse.choices import LoraRequest
from lorafuse_fuse.progress import ByteProgress, size_text

from .errors import explained, not_cached
from .files import lora_file
from .names import HubLora, HubName, lora_name

ADAPTER_CONFIG = "adapter_config.json"
_SECONDS = 30.0
_LIBRARY: dict[str, Any] = {"library_name": "lorafuse", "library_version": __version__}
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit: what it holds, of which the cache may hold nothing yet."""

    name: HubName
    commit: str
    sizes: Mapping[str, int]
    """Its files with their bytes."""
    is_whole: bool
    """Whether these are all its files, and not just those that the cache has because the hub could not be asked."""

    def origin(self, path: str) -> Origin:
        """The record of a file or folder of it."""
        return Origin(self.name.repo, self.commit, path)

    def cached(self, path: str) -> Path | None:
        """Where the cache has a file."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name.repo, path, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def missing(self, paths: Collection[str]) -> list[str]:
        """Which of some files the cache does not have."""
        return [path for path in paths if self.cached(path) is None]

    def read_json(self, path: str) -> dict[str, Any]:
        """A small JSON object, downloaded if need be."""
        text = (self.fetch([path]) / path).read_text(encoding="utf-8", errors="replace")
        try:
            found = json.loads(text)
        except ValueError as error:
            raise HubError(f"{self.name}: {path} is not readable as JSON: {error}") from error
        return found if isinstance(found, dict) else {}

    def fetch(self, paths: Sequence[str], say: Say | None = None) -> Path:
        """Download the files that the cache does not have, and tell it through `say`; the folder that they lie in.

        One after the other and in this thread, so that Ctrl-C ends a download at once and leaves no half file behind.

        Raises:
            HubError: one cannot be had.
        """
        from huggingface_hub import is_offline_mode, snapshot_download

        if missing := self.missing(paths):
            if is_offline_mode():
                some = f"{len(missing)} of {len(paths)} files (first: {missing[0]})"
                raise HubError(f"{self.name}: {not_cached(some)}")
            self._download(missing, len(paths), say)
        with explained(self.name):
            # All of them are here, so this downloads nothing: it keeps the listing, for diffusers and offline mode.
            names = ["".join(f"[{c}]" if c in "*?[" else c for c in path) for path in paths]
            silent = _counting(lambda _: None)
            return Path(
                snapshot_download(
                    self.name.repo, revision=self.commit, allow_patterns=names, tqdm_class=silent, **_LIBRARY
                )
            )

    def _download(self, paths: Sequence[str], of: int, say: Say | None) -> None:
        from huggingface_hub import constants, hf_hub_download

        nbytes = sum(self.sizes[path] for path in paths)
        _check_space(self.name, nbytes, Path(constants.HF_HUB_CACHE))
        if say:
            say(f"downloading {len(paths)} of {of} files of {self.name}, {size_text(nbytes)}")
        with explained(self.name), ByteProgress("downloading", nbytes) as progress:
            counting = _counting(progress)
            for path in paths:
                hf_hub_download(self.name.repo, path, revision=self.commit, tqdm_class=counting, **_LIBRARY)

    def stand_in(self, path: str, target: Path) -> None:
        """Write a safetensors file that has the true header and a hole for data; only the header is downloaded.

        Raises:
            HubError: it cannot be had, or is no safetensors file.
        """
        from huggingface_hub import HfApi

        with explained(self.name):
            found = HfApi(**_LIBRARY).parse_safetensors_file_metadata(self.name.repo, path, revision=self.commit)
        header: dict[str, object] = {"__metadata__": found.metadata}
        for name, info in found.tensors.items():
            header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
        raw = json.dumps(header).encode()
        end = max((info.data_offsets[1] for info in found.tensors.values()), default=0)
        with target.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)


def open_snapshot(name: HubName, say: Say) -> Snapshot:
    """Resolve a revision and list its files, asking the hub for no more than the cache does not know.

    Raises:
        HubError: there is no such repository or revision, or it cannot be had now.
    """
    from huggingface_hub import HfApi, get_cached_repo_tree, is_offline_mode
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    api, is_whole = HfApi(**_LIBRARY), True
    with explained(name):
        commit = api.resolve_revision(name.repo, revision=name.revision, local_files_only=is_offline_mode()).resolved
        try:
            sizes = {file.path: file.size for file in get_cached_repo_tree(name.repo, revision=commit)}
        except CachedRepoTreeNotFoundError:
            if is_offline_mode():
                sizes, is_whole = _cached_files(name, commit), False
            else:
                info = api.model_info(name.repo, revision=commit, files_metadata=True, timeout=_SECONDS)
                sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if name.revision != commit:
        say(f"{name} is at commit {commit}")
    return Snapshot(name, commit, sizes, is_whole)


def locate_lora(text: str, say: Say) -> HubLora | None:
    """What `--lora` asks the hub for; None where it is a path. Nothing is looked up yet.

    Raises:
        ConfigError: it is a name on the hub and goes on wrongly.
    """
    found = lora_name(text)
    if found and found.name.is_bare:
        say(f"LoRA {text}: no such path; looked up on the hub as {found.name}")
    return found


def fetch_lora(asked: HubLora, say: Say) -> LoraRequest:
    """A LoRA from the hub, downloaded with the configuration beside it.

    Raises:
        HubError: it cannot be had.
    """
    snapshot = open_snapshot(asked.name, say)
    path = lora_file(snapshot.sizes, asked.name.path, str(asked.name))
    beside = Path(path).with_name(ADAPTER_CONFIG).as_posix()
    folder = snapshot.fetch([path, *([beside] if beside in snapshot.sizes else [])], say)
    return LoraRequest(folder / path, asked.strength, asked.component, origin=snapshot.origin(path))


def _cached_files(name: HubName, commit: str) -> dict[str, int]:
    """What the cache has of a commit whose listing it does not know."""
    from huggingface_hub import snapshot_download

    root = Path(snapshot_download(name.repo, revision=commit, local_files_only=True))
    return {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}


def _check_space(name: HubName, nbytes: int, cache: Path) -> None:
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if nbytes > free:
        raise HubError(
            f"{name}: {size_text(nbytes)} have to be downloaded, and the disk of the hub's cache ({cache}) has "
            f"{size_text(free)} free; make room (`hf cache ls`, `hf cache rm`), or set HF_HOME to a larger disk"
        )


def _counting(count: Callable[[int], object]) -> type[Any]:
    """A class that huggingface_hub takes for its progress bar and that only counts bytes."""
    from tqdm import tqdm

    class Counting(tqdm):  # type: ignore[type-arg]
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(disable=True)

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes from the network, before hf_xet has put a file together; those written are counted."""

        def set_transfer_postfix_str(self, *_: object, **__: object) -> None:
            """The network's speed."""

    return Counting
