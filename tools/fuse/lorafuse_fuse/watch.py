"""The input files of a fuse, watched from when they were first looked at: what changes meanwhile makes no result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorafuse_common.checkpoint import side_files
from lorafuse_common.errors import CheckpointError
from lorafuse_common.hashing import stat_identity
from lorafuse_common.manifest import MANIFEST_NAME
from lorafuse_common.scale import ADAPTER_CONFIG

from .plan import FusePlan
from .record import input_paths

_SHOWN = 3


def require_names_of_text(plan: FusePlan) -> None:
    """Refuse files that the manifest cannot name: Linux's names are bytes, and may be no UTF-8.

    Raises:
        CheckpointError: naming the first of them.
    """
    for name in (*input_paths(plan.bases), *(Path(lora.request.path.name) for lora in plan.loras)):
        if str(name).encode(errors="replace").decode() != str(name):
            raise CheckpointError(f"{name}: its name is no UTF-8, so the manifest cannot hold it; rename the file")


def watch_inputs(plan: FusePlan) -> dict[Path, str]:
    """Every file that takes part and its `stat_identity`.

    That of weights and LoRAs is from when their headers were read, of the others from now. A file that is read along
    if it is there, and is not, has the identity `absent`.
    """
    base = plan.base
    beside = [lora.request.path.parent / ADAPTER_CONFIG for lora in plan.loras]
    others = [base.root / path for path in side_files(plan.bases)]
    watched = {path: _identity(path) for path in (*beside, base.folder / MANIFEST_NAME, *others)}
    watched |= {file.path: file.identity for checkpoint in plan.bases for file in checkpoint.files}
    return watched | {lora.request.path: lora.identity for lora in plan.loras}


def require_unchanged(watched: Mapping[Path, str]) -> None:
    """Compare the inputs with what they were.

    Raises:
        CheckpointError: naming those that were changed, replaced, removed or added.
    """
    changed = [str(path) for path, identity in watched.items() if _identity(path) != identity]
    if changed:
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise CheckpointError(
            f"{', '.join(changed[:_SHOWN])}{more}: changed while being read; nothing was written. Fuse again."
        )


def _identity(path: Path) -> str:
    try:
        return stat_identity(path)
    except OSError:
        return "absent"
