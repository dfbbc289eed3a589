"""The processes of a run: what accelerate set up, compared with what was asked of the launcher."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs

from lorafuse_common.errors import ConfigError

LONGEST_WAIT = timedelta(days=2)
"""How long processes wait for the main one to fill the cache or draw; the default of ten minutes is too short."""
UNSUPPORTED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
ASKED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
}
"""What `accelerate launch` sets for its plugins, which accelerate leaves aside on a CPU without a word."""
SEVERAL = (
    "for several processes run `accelerate launch --multi_gpu --num_processes N -m lorafuse_train train ...`, or "
    "`torchrun --standalone --nproc_per_node N -m lorafuse_train train ...`, which work on CPUs, too"
)


def make_accelerator() -> Accelerator:
    """The processes of this run.

    Raises:
        ConfigError: they are not those that were asked for, or work together in a way that is not supported.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no",  # `Precision` decides, not the machine's accelerate config
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    asked = [name for key, name in ASKED.items() if os.environ.get(key, "").lower() in ("true", "1")]
    kinds = asked or [accelerator.distributed_type.value] * (accelerator.distributed_type in UNSUPPORTED)
    if kinds:
        raise ConfigError(
            f"accelerate is set up for {kinds[0]}; only plain data parallelism is supported: "
            "run `accelerate launch --multi_gpu -m lorafuse_train train ...` or change `accelerate config`"
        )
    world = os.environ.get("WORLD_SIZE", "1")
    if world != str(accelerator.num_processes):
        raise ConfigError(f"{world} processes were asked for, {accelerator.num_processes} run; {SEVERAL}")
    if accelerator.num_processes == 1 and _lone_of_several():
        raise ConfigError(
            "`accelerate launch` was asked for several processes and started this one only, as it does with --cpu or "
            f"without GPUs; {SEVERAL}. For one process: `accelerate launch --num_processes 1`."
        )
    return accelerator


def _lone_of_several() -> bool:
    """Whether `accelerate launch` got --num_processes above 1 and started one process all the same.

    It then gives that process an address to meet the others at, and nothing else. An address that the launcher itself
    was started with, as clusters give to every job, says nothing.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "RANK" in os.environ or "MASTER_PORT" not in os.environ:
        return False
    if sys.platform != "linux":
        return True
    try:
        launcher = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return not any(entry.startswith(b"MASTER_PORT=") for entry in launcher)
