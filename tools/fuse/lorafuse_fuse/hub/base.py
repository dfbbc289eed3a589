"""BASE as the user gives it: a path, or a model on the hub that is checked by its headers before it is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lorafuse_common.checkpoint import DEFAULT_COMPONENT, Checkpoint
from lorafuse_common.errors import CheckpointError, HubError, LorafuseError
from lorafuse_common.manifest import Origin

from .errors import not_cached
from .files import MODEL_INDEX, absent_shards, model_files, no_such_file, parts_of, pipeline_files
from .names import base_name
from .repository import Say, Snapshot, open_snapshot


@dataclass(frozen=True, slots=True)
class Found:
    """A base that can be opened: the model itself, or its stand-in."""

    path: Path
    origin: Origin | None = None
    only: frozenset[Path] | None = None
    """The files that belong to it, where its folder may hold others."""

    def mark(self, bases: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
        """The opened bases, told where they come from."""
        return tuple(replace(base, origin=self.origin, only=self.only) for base in bases)


@dataclass(frozen=True, slots=True)
class LocalBase:
    """A path."""

    path: Path
    is_here: bool = True

    @contextmanager
    def headers(self) -> Iterator[Found]:
        """What planning needs, here the model itself."""
        yield Found(self.path)

    def fetch(self) -> Found:
        """The model itself."""
        return Found(self.path)


@dataclass(frozen=True, slots=True)
class HubBase:
    """A model on the hub."""

    snapshot: Snapshot
    files: tuple[str, ...]
    """What is needed of it, as the repository names it."""
    planned: frozenset[str]
    """Those of them that a plan looks at."""
    say: Say

    @property
    def is_here(self) -> bool:
        """Whether nothing has to be downloaded."""
        return not self.snapshot.missing(self.files)

    @contextmanager
    def headers(self) -> Iterator[Found]:
        """What planning needs: true headers with holes for data, so that what does not fit costs no download."""
        if self.is_here:
            yield self.fetch()
            return
        small = [path for path in sorted(self.planned) if not path.endswith(".safetensors")]
        if small:
            self.snapshot.fetch(small)
        with tempfile.TemporaryDirectory(prefix="lorafuse-headers-") as folder:
            root = Path(folder) / self.snapshot.commit
            for path in self.files:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                if path not in self.planned:
                    continue
                if there := self.snapshot.cached(path):
                    (root / path).symlink_to(there)
                else:
                    self.snapshot.stand_in(path, root / path)
            found = self._found(root)
            try:
                yield found
            except LorafuseError as error:
                name = self.snapshot.origin(self.snapshot.name.path).uri
                raise type(error)(str(error).replace(str(found.path), name)) from error

    def fetch(self) -> Found:
        """The model itself, downloaded if need be."""
        return self._found(self.snapshot.fetch(self.files, self.say))

    def _found(self, root: Path) -> Found:
        path = self.snapshot.name.path
        folder = f"{path}/" if path and path not in self.snapshot.sizes else ""
        only = frozenset(Path(file.removeprefix(folder)) for file in self.files)
        return Found(root / path, self.snapshot.origin(path), only)


def locate_base(text: str, components: Collection[str | None], say: Say) -> LocalBase | HubBase:
    """BASE as it was given; of a pipeline on the hub, the `components` are to be fused (None: the usual one).

    Raises:
        ConfigError: it begins with hf:// and goes on wrongly.
        CheckpointError: it is a path to nothing.
        HubError: it cannot be had from the hub.
    """
    name = base_name(text)
    if name is None:
        if not Path(text).exists():
            raise CheckpointError(
                f"{text}: no such file or folder; expected a .safetensors file, a model folder or a pipeline folder "
                "on disk, or a name on the hub (owner/repo, hf://owner/repo/file.safetensors)"
            )
        return LocalBase(Path(text))
    if name.is_bare:
        say(f"BASE {text}: no such path; looked up on the hub as {name}")
    return _hub_base(open_snapshot(name, say), [component or DEFAULT_COMPONENT for component in components], say)


def _hub_base(snapshot: Snapshot, components: Collection[str], say: Say) -> HubBase:
    path, where = snapshot.name.path, str(snapshot.name)
    if path in snapshot.sizes:
        if not path.endswith(".safetensors"):
            raise HubError(f"{where}: is no .safetensors file, and no other kind is read")
        return HubBase(snapshot, (path,), frozenset({path}), say)
    folder = f"{path}/" if path else ""
    listing = [name.removeprefix(folder) for name in snapshot.sizes if name.startswith(folder)]
    if not listing:
        raise no_such_file(snapshot.sizes, path, where)
    is_pipeline = MODEL_INDEX in listing
    parts = parts_of(snapshot.read_json(folder + MODEL_INDEX)) if is_pipeline else ()
    files = pipeline_files(listing, parts, components, where) if is_pipeline else model_files(listing, where)
    if not snapshot.is_whole:
        absent = [part for part in parts if not any(name.startswith(f"{part}/") for name in files)]
        if absent := absent or absent_shards(files):
            some = f"all of it (it lacks {', '.join(absent[:3])})"
            raise HubError(f"{where}: {not_cached(some)}")
    planned = {name for name in files if "/" not in name or name.partition("/")[0] in components}
    return HubBase(snapshot, tuple(folder + n for n in files), frozenset(folder + n for n in planned), say)
