"""The LoRA files that are kept in a fused folder, so that export and training find them again.

    models/fused/lorafuse/loras/<first 12 digits of sha256>/style.safetensors

A `adapter_config.json` that stands beside a LoRA says what its scale is, so it is kept beside the copy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorafuse_common.hashing import sha256_of
from lorafuse_common.manifest import KEPT_FOLDER, FusedLora, Manifest, Parent, find_lora
from lorafuse_common.scale import ADAPTER_CONFIG

from .carry import reflink
from .choices import KeepLoras
from .plan import FusePlan

NEAR = 3
"""How many folders up from the fused one a file may lie to count as near."""


@dataclass(frozen=True, slots=True)
class Keeper:
    """Puts copies of LoRA files into a staging folder that will lie at `final`."""

    how: KeepLoras
    staging: Path
    final: Path
    _copied: set[Path] = field(default_factory=set)

    def file_of(self, lora: FusedLora, path: Path) -> FusedLora:
        """The entry of a LoRA that lies at `path`, with where its file can be found again; copies it where asked."""
        if self.how is KeepLoras.NONE:
            return replace(lora, file=path_hint(path, self.final))
        place = kept_place(path, lora.sha256)
        target = self.staging / place
        if place not in self._copied:
            target.parent.mkdir(parents=True, exist_ok=True)
            for source, copy in _pairs(path, target):
                if not reflink(source.resolve(), copy):
                    shutil.copyfile(source, copy)
            self._copied.add(place)
        return replace(lora, file=place.as_posix())

    def parent_of(self, parent: Parent | None, folder: Path) -> Parent | None:
        """The record of the earlier fuses that led to the base in `folder`, with where their LoRAs are found now."""
        if parent is None:
            return None
        loras = tuple(self._inherited(lora, folder) for lora in parent.loras)
        return replace(parent, loras=loras, parent=self.parent_of(parent.parent, folder))

    def _inherited(self, lora: FusedLora, folder: Path) -> FusedLora:
        path = find_lora(lora, folder)
        return replace(lora, file=None) if path is None else self.file_of(lora, path)


def kept_place(path: Path, sha256: str) -> Path:
    """Where a LoRA is kept, relative to the fused folder; the same bytes with another scale lie elsewhere."""
    config = path.parent / ADAPTER_CONFIG
    if config.is_file():
        sha256 = hashlib.sha256(f"{sha256} {sha256_of(config)}".encode()).hexdigest()
    return Path(KEPT_FOLDER, "loras", sha256[:12], path.name)


def _pairs(path: Path, target: Path) -> Iterator[tuple[Path, Path]]:
    yield path, target
    if (config := path.parent / ADAPTER_CONFIG).is_file():
        yield config, target.parent / ADAPTER_CONFIG


def path_hint(path: Path, folder: Path) -> str | None:
    """Where a file lies as seen from `folder`, if that is near."""
    found = Path(os.path.relpath(path.absolute(), folder.absolute()))
    return None if found.parts[: NEAR + 1] == ("..",) * (NEAR + 1) else found.as_posix()


def kept_nbytes(plan: FusePlan, manifest: Manifest | None, how: KeepLoras) -> int:
    """The bytes that copies of the LoRAs need, with those of the base's earlier fuses."""
    if how is KeepLoras.NONE:
        return 0
    sizes: Mapping[Path, int] = {lora.request.path: lora.request.path.stat().st_size for lora in plan.loras}
    earlier = {lora.sha256: lora.size for _, loras in manifest.lineage for lora in loras} if manifest else {}
    return sum(sizes.values()) + sum(earlier.values())
