"""`lorafuse-train cache`: all that a training with the same options would encode, and whether it is right."""

from __future__ import annotations

import os

import torch

from lorafuse_common.errors import ConfigError, OutputError
from lorafuse_train.console import is_main, quiet_libraries, say
from lorafuse_train.encoding.contact_sheet import write_contact_sheet
from lorafuse_train.encoding.encode import Encodings, fill_cache, needed_entries, open_cache
from lorafuse_train.encoding.verify_cache import choose_entries, verify_entries
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.plan import plan_training
from lorafuse_train.train import prompts_of


def run_cache(config: TrainConfig) -> None:
    """Fill the cache; verify a sample of it and draw a contact sheet where that was asked for.

    Raises:
        LorafuseError: whatever is wrong with what the user gave, or entries that are not what they should be.
    """
    quiet_libraries()
    _check_sheet(config)
    plan = plan_training(config)
    cache, device = open_cache(plan), _device()
    prompts = prompts_of(plan)
    needed = needed_entries(cache, plan, prompts)
    filled = fill_cache(cache, plan, prompts, device)
    others = f", {filled.others} computed by other processes" if filled.others else ""
    say(f"cache: {filled.made} entries computed{others}, {filled.there} reused ({cache.root})")
    if not is_main():
        return
    if config.contact_sheet:
        count = write_contact_sheet(plan, Encodings(cache), config.contact_sheet, config.contact_sheet_pictures, device)
        legend = config.contact_sheet.with_suffix(".txt").name
        say(f"contact sheet: {config.contact_sheet} ({count} of {len(plan.samples)} samples; captions in {legend})")
    if config.verify:
        found = verify_entries(plan, needed, choose_entries(needed.paths, config.verify_sample), device)
        if found.faults:
            listing = "\n".join(f"  {fault}" for fault in found.faults)
            raise OutputError(
                f"{cache.root}: {len(found.faults)} of {found.entries} entries that were computed again differ from "
                f"what is stored. Delete those files and run this again, or delete the whole folder:\n{listing}"
            )
        total = len(needed.paths)
        say(f"verified: {found.entries} of {total} entries computed again, largest difference {found.largest:.1g}")


def _check_sheet(config: TrainConfig) -> None:
    sheet = config.contact_sheet
    if sheet and sheet.suffix.lower() != ".png":
        raise ConfigError(f"--contact_sheet {sheet}: expected a name that ends in .png")
    if sheet and sheet.resolve().is_relative_to(config.dataset_base_path.resolve()):
        raise ConfigError(f"--contact_sheet {sheet}: lies in the dataset, of which it would become a part")


def _device() -> torch.device:
    """The accelerator of this process, of several where there are several; else the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    index = int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count()
    torch.accelerator.set_device_index(index)
    return torch.device(kind.type, index)
