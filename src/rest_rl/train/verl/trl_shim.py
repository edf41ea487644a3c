"""Let verl's FSDP engine run with this package's trl; every worker imports this module through `model.external_lib`.

If trl is installed, verl 0.9's engine imports `AutoModelForCausalLMWithValueHead` to patch old critics. trl 1 has
removed it, and no model here has a value head: an empty class takes the place under the name that verl tries first.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

REMOVED_MODULE, REMOVED_CLASS = "trl.experimental.ppo", "AutoModelForCausalLMWithValueHead"

if importlib.util.find_spec(REMOVED_MODULE) is None:
    sys.modules[REMOVED_MODULE] = ModuleType(REMOVED_MODULE)
    sys.modules[REMOVED_MODULE].__dict__[REMOVED_CLASS] = type(REMOVED_CLASS, (), {})
