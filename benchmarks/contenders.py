"""Who takes part: the commands, what they need, and why one may have to stay out."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.jobs import Job

PEERS = Path(__file__).parent / "peers"
_GB = 10**9


@dataclass(frozen=True, slots=True)
class Contender:
    """A program that makes `Job.out`."""

    name: str
    label: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    loads: str = ""
    """A Python statement that loads the program but does nothing: cold runs are of cold data, not of cold programs."""
    environment: Mapping[str, str] = field(default_factory=dict)
    is_copy: bool = False
    knows_base: bool = False
    """Starts with a memory of the base's hash."""
    peer_bytes: int | None = None
    """A peer's need of memory, as an estimate; None for no peer."""


def lorafuse_command() -> list[str]:
    """The console script beside this Python, or the module."""
    script = Path(sys.executable).parent / "lorafuse"
    return [str(script)] if script.exists() else [sys.executable, "-m", "lorafuse_fuse"]


def _copy(job: Job) -> Contender:
    command = ("cp", "-r", "--reflink=never", str(job.base), str(job.out))
    return Contender("cp", "cp -r", command, (job.base,), is_copy=True)


def _lorafuse(name: str, label: str, job: Job, memory: Mapping[str, str], knows_base: bool = False) -> Contender:
    loras = (f"--lora={path}" for path in job.loras)
    command = (*lorafuse_command(), "fuse", str(job.base), *loras, "--out", str(job.out), *job.fuse_options)
    return Contender(
        name, label, command, (job.base, *job.loras), "import lorafuse_fuse.execute", memory, knows_base=knows_base
    )


def _hashing_all(job: Job) -> Contender:
    return _lorafuse("lorafuse", "lorafuse, no hash memory", job, {"LORAFUSE_HASH_CACHE": "off"})


def _first_run(job: Job) -> Contender:
    return _lorafuse("lorafuse-default", "lorafuse, defaults", job, {})


def _next_run(job: Job) -> Contender:
    return _lorafuse("lorafuse-again", "lorafuse, base known", job, {}, knows_base=True)


def _peer(name: str, label: str, script: str, loads: str, job: Job, loras: Sequence[Path], need: int) -> Contender:
    command = (sys.executable, str(PEERS / script), str(job.base), str(job.out), str(job.shard_bytes), *map(str, loras))
    return Contender(name, label, command, (job.base, *loras), loads, peer_bytes=need)


def _diffusers(job: Job) -> Contender:
    need = round(1.25 * job.base_bytes) + 4 * job.lora_bytes + _GB
    loads = "from diffusers import QwenImagePipeline, QwenImageTransformer2DModel; import peft"
    return _peer("diffusers", "diffusers fuse_lora", "with_diffusers.py", loads, job, job.loras, need)


def _peft(job: Job) -> Contender:
    need = round(1.25 * job.base_bytes) + 4 * job.lora_bytes + _GB
    loads = "from diffusers import QwenImageTransformer2DModel; import peft"
    return _peer("peft", "peft merge_and_unload", "with_peft.py", loads, job, job.adapters, need)


def _naive(job: Job) -> Contender:
    need = round(2.25 * job.shard_bytes) + job.lora_bytes + _GB
    return _peer("naive", "naive safetensors", "with_safetensors.py", "import safetensors.torch", job, job.loras, need)


CONTENDERS: Mapping[str, Callable[[Job], Contender]] = {
    "cp": _copy,
    "lorafuse": _hashing_all,
    "lorafuse-default": _first_run,
    "lorafuse-again": _next_run,
    "diffusers": _diffusers,
    "peft": _peft,
    "naive": _naive,
}


def reason_to_skip(contender: Contender, job: Job, peer_size_gb: float | None, available_bytes: int) -> str | None:
    """Why a contender cannot take part, or None."""
    if contender.peer_bytes is None:
        return None
    if peer_size_gb is not None and job.base_bytes > peer_size_gb * _GB * 1.1:
        return f"the base has {job.base_bytes / _GB:.1f} GB, PEER_SIZE is {peer_size_gb:g}"
    if contender.peer_bytes > 0.9 * available_bytes:
        return f"needs about {contender.peer_bytes / _GB:.0f} GB of memory, {available_bytes / _GB:.0f} are available"
    return None


def clean_environment(cache: Path) -> dict[str, str]:
    """This process's environment without a network, with its own cache folder and none of lorafuse's settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LORAFUSE_")}
    return kept | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(cache)}
