"""verl's FSDP engine beside the trl of this package: imported by every worker through `model.external_lib`.

The engine imports `AutoModelForCausalLMWithValueHead` wherever trl is installed, to patch the critics of old; trl has
dropped it, and no model of ours has a value head. It gets an empty class under the name that it asks for first.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

REMOVED_MODULE, REMOVED_CLASS = "trl.experimental.ppo", "AutoModelForCausalLMWithValueHead"

if importlib.util.find_spec(REMOVED_MODULE) is None:
    sys.modules[REMOVED_MODULE] = ModuleType(REMOVED_MODULE)
    sys.modules[REMOVED_MODULE].__dict__[REMOVED_CLASS] = type(REMOVED_CLASS, (), {})
