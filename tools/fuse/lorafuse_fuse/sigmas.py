"""The noise levels that diffusers' `FlowMatchEulerDiscreteScheduler` visits, without importing diffusers.

u_k     = 1 - k / n                       even levels, as most pipelines ask for them
static  : sigma = s u / (1 + (s - 1) u)   s = `shift`
dynamic : sigma = e / (e + 1 / u - 1)     e = exp(mu), or mu where `time_shift_type` is linear
mu      = base_shift + (max_shift - base_shift) (L - base_len) / (max_len - base_len)     L = tokens of a picture
stretch : sigma' = 1 - (1 - sigma) (1 - t) / (1 - sigma_last)                             t = `shift_terminal`
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from lorafuse_common.errors import ConfigError

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
TOKENS = 4096
"""Of a picture of 1024x1024 in FLUX.1, FLUX.2, Qwen-Image and SD3: for schedules that depend on the size."""
_OTHERS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")


def even_levels(steps: int) -> tuple[float, ...]:
    """1, 1 - 1/n, ..., 1/n."""
    return tuple(1 - k / steps for k in range(steps))


def own_levels(shift: float, steps: int) -> tuple[float, ...]:
    """What a scheduler of fixed shift takes by itself: even levels from 1 to its lowest, which is shifted already."""
    lowest = shift * 1e-3 / (1 + (shift - 1) * 1e-3)
    return tuple(1 - (1 - lowest) * k / max(1, steps - 1) for k in range(steps))


def depends_on_size(config: Mapping[str, object]) -> bool:
    """Whether a scheduler's noise levels are other ones for other sizes of the picture."""
    if not config.get("use_dynamic_shifting"):
        return False
    return _number(config, "base_shift", 0.5) != _number(config, "max_shift", 1.15)


def scheduler_sigmas(
    config: Mapping[str, object], steps: int, tokens: int = TOKENS, *, asks: bool = True
) -> tuple[float, ...]:
    """The noise levels of a scheduler's config (as `scheduler_config.json` holds it) for pictures of `tokens`.

    `asks`: whether the pipeline asks for even levels; SD3's does not, and gets those that the scheduler takes.

    Raises:
        ConfigError: it is another scheduler, or one whose levels are made in another way.
    """
    name = config.get("_class_name", SCHEDULER)
    if name != SCHEDULER:
        raise ConfigError(f"the noise levels of a {name} are not known here, only a {SCHEDULER}'s; state them")
    if others := [key for key in _OTHERS if config.get(key)]:
        raise ConfigError(f"the noise levels that {others[0]} gives are not known here; state them")
    if config.get("use_dynamic_shifting"):
        mu = _mu(config, tokens)
        sigmas = dynamic_sigmas(mu if config.get("time_shift_type") == "linear" else math.exp(mu), steps)
    else:
        shift = _number(config, "shift", 1.0)
        levels = even_levels(steps) if asks else own_levels(shift, steps)
        sigmas = tuple(shift * u / (1 + (shift - 1) * u) for u in levels)
    terminal = _number(config, "shift_terminal", 0.0)
    if terminal and steps > 1:
        scale = (1 - terminal) / (1 - sigmas[-1])
        sigmas = tuple(1 - (1 - sigma) * scale for sigma in sigmas)
    return sigmas


def dynamic_sigmas(factor: float, steps: int) -> tuple[float, ...]:
    """`e / (e + 1 / u - 1)` for e = `factor`."""
    return tuple(factor / (factor + 1 / u - 1) for u in even_levels(steps))


def _mu(config: Mapping[str, object], tokens: int) -> float:
    base_shift, max_shift = _number(config, "base_shift", 0.5), _number(config, "max_shift", 1.15)
    base_length, max_length = _number(config, "base_image_seq_len", 256), _number(config, "max_image_seq_len", 4096)
    if base_length == max_length:
        return base_shift
    return base_shift + (max_shift - base_shift) * (tokens - base_length) / (max_length - base_length)


def _number(config: Mapping[str, object], key: str, default: float) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key} is {value!r}; expected a number")
    return float(value)


def klein_mu(tokens: int, steps: int) -> float:
    """mu of FLUX.2's pipelines, fitted by its makers (`diffusers/pipelines/flux2`, `compute_empirical_mu`).

    Up to 4300 tokens it is linear in the steps, through the values at 10 and at 200 of them.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 if tokens > 4300 else at_200 + (at_200 - at_10) / 190 * (steps - 200)
