"""How LoRAs are asked for on the command line: `FILE[:STRENGTH][@COMPONENT]`, `FILE=ALPHA`."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

from lorafuse_common.errors import ConfigError

from .choices import LoraRequest
from .terminal import say


def lora_request(text: str) -> LoraRequest:
    """A LoRA as it is asked for, downloaded where its name is one on the hub."""
    from .hub.repository import fetch_lora, locate_lora

    asked = locate_lora(text, say)
    return fetch_lora(asked, say) if asked else parse_lora(text)


def parse_lora(text: str) -> LoraRequest:
    """`FILE[:STRENGTH][@COMPONENT]`; what belongs to the name of a file that exists is never taken off it.

    Raises:
        ConfigError: what follows the colon is no strength.
    """
    name, component = text, None
    if not Path(text).exists() and (found := re.fullmatch(r"(.+)@([A-Za-z]\w*)(:[^/]*)?", text)):
        name, component = found[1] + (found[3] or ""), found[2]
    path, colon, tail = name.rpartition(":")
    if not colon or not path or Path(name).exists():
        return LoraRequest(Path(name), component=component)
    try:
        strength = float(tail)
    except ValueError:
        if tail and "/" not in tail and not tail.endswith(".safetensors"):
            raise ConfigError(f"--lora {text}: {tail!r} is no strength; expected FILE[:STRENGTH][@COMPONENT]") from None
        return LoraRequest(Path(name), component=component)
    if not -1e3 < strength < 1e3:
        raise ConfigError(f"--lora {text}: strength {tail} is out of range; strengths are about 1")
    return LoraRequest(Path(path), strength, component)


def with_alphas(requests: list[LoraRequest], texts: list[str]) -> list[LoraRequest]:
    """The requests with the alphas that `FILE=ALPHA` states, by path or by file name.

    Raises:
        ConfigError: one is malformed, or names no LoRA of this command.
    """
    stated: dict[str, float] = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            stated[name] = float(value)
        except ValueError:
            stated[name] = 0.0
        known = [request for request in requests if name in (str(request.path), request.path.name)]
        if not known or not 0 < stated[name] < math.inf:
            names = ", ".join(request.path.name for request in requests)
            raise ConfigError(f"--alpha {text}: expected FILE=ALPHA with one of {names} and a positive number")
    return [
        replace(request, alpha=stated.get(str(request.path), stated.get(request.path.name))) for request in requests
    ]
