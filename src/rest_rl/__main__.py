"""Makes `python -m rest_rl` the same as the command `rest-rl`."""

from __future__ import annotations

import sys

from rest_rl.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
