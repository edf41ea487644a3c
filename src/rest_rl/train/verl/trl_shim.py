"""Make verl's FSDP engine compatible with trl 1; every worker imports this module through `model.external_lib`.

If trl is installed, verl 0.9 imports `AutoModelForCausalLMWithValueHead`, which it needs only for models with a value
head. trl 1 has removed this class. This module defines an empty class where verl looks for it first.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

REMOVED_MODULE, REMOVED_CLASS = "trl.experimental.ppo", "AutoModelForCausalLMWithValueHead"

if importlib.util.find_spec(REMOVED_MODULE) is None:
    sys.modules[REMOVED_MODULE] = ModuleType(REMOVED_MODULE)
    sys.modules[REMOVED_MODULE].__dict__[REMOVED_CLASS] = type(REMOVED_CLASS, (), {})
