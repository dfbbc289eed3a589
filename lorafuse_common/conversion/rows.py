"""Which rows the factors of a module have, and which modules can be cut into rows and joined."""

from __future__ import annotations

from collections.abc import Mapping

from lorafuse_common.algebras import Shape
from lorafuse_common.tensorfile import FLOAT_DTYPES, TensorRef

PAIRS = (("up", "down"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
"""Factors whose product has the rows of the first."""
CORES = ("mid", "hada_t1", "hada_t2")
ROWS = ("magnitude", "diff", "set_weight", "up_bias")
"""Factors that have the rows of the weight or bias."""
ROW_ROLES = frozenset({*CORES, *ROWS, *(role for pair in PAIRS for role in pair)})
"""Factors of modules that can be cut into rows and joined."""


def weight_shape(shapes: Mapping[str, Shape]) -> Shape | None:
    """The shape of the weight or bias that factors (role -> shape) are for, as far as they agree; None for others."""
    if "up" in shapes and min(len(shapes["up"]), len(shapes["down"])) > 1:
        return (shapes["up"][0], *shapes["down"][1 : 2 if "mid" in shapes else None], *shapes.get("mid", ())[2:])
    if "hada_w1_a" in shapes and min(len(shapes["hada_w1_a"]), len(shapes["hada_w1_b"])) > 1:
        core = shapes.get("hada_t1")
        return (shapes["hada_w1_a"][1 if core else 0], shapes["hada_w1_b"][1], *(core or ())[2:])
    return next((shapes[role] for role in ("diff", "set_weight", "up_bias") if role in shapes), None)


def has_column_magnitude(shapes: Mapping[str, Shape]) -> bool:
    """Whether a DoRA's magnitude is one for each input column: `[1, in, 1...]`, or a vector that fits no row."""
    magnitude, shape = shapes.get("magnitude"), weight_shape(shapes)
    if magnitude is None:
        return False
    if len(magnitude) < 2:
        return shape is not None and magnitude != shape[:1]
    is_pefts = shape is not None and len(magnitude) == len(shape) > 2 and magnitude[1] == shape[0] != shape[1]
    return magnitude[0] == 1 != magnitude[1] and not is_pefts


def unreadable(factors: Mapping[str, TensorRef]) -> str | None:
    """The dtype of a factor that no arithmetic is done on; None where there is none."""
    return next((ref.dtype for ref in factors.values() if ref.dtype not in FLOAT_DTYPES), None)
