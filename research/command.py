"""Error handling for the commands in this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rest_rl.errors import UserError


def run_command(work: Callable[[], None]) -> int:
    """Call `work` and return the exit code: 0, 2 after printing a UserError in one line, 130 after Ctrl-C."""
    try:
        work()
    except UserError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
