"""K-1: language models as trees of small transformer blocks, whose errors are traced to blocks.

Names are loaded when they are first used, so that `import k1` (and `--help`) is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k1.config import Config as Config
    from k1.data import TextData as TextData
    from k1.data import load_data as load_data
    from k1.errors import K1Error as K1Error
    from k1.trainer import StepReport as StepReport
    from k1.trainer import Trainer as Trainer

__version__ = "0.1.0"
_HOMES = {
    "Config": "k1.config",
    "TextData": "k1.data",
    "load_data": "k1.data",
    "K1Error": "k1.errors",
    "StepReport": "k1.trainer",
    "Trainer": "k1.trainer",
}
__all__ = ["Config", "K1Error", "StepReport", "TextData", "Trainer", "load_data"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'k1' has no attribute {name!r}")
