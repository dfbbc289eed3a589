"""A LoRA in another dialect: what its modules are, which rows go where, and the files that say the same."""

from .plan import Conversion, plan_conversion, writable
from .spelling import Converted, write_conversion
from .vocabulary import family_named

__all__ = ["Conversion", "Converted", "family_named", "plan_conversion", "writable", "write_conversion"]
