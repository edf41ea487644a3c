"""`python -m rest_rl` is the command `rest-rl`."""

from __future__ import annotations

import sys

from rest_rl.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
