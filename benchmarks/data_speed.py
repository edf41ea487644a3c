"""Measure rows per second and peak memory of `rest-rl data check` on generated dialogues, by number of rows.

    python benchmarks/data_speed.py --rows 20000 200000

Each size runs in a separate process. The peak should hardly grow with the number of rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# `ru_maxrss` never falls, so every size needs a separate process.
CHILD = """
import resource, sys
from rest_rl.cli.app import main
code = main(["data", "check", sys.argv[1], "--json"])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak, file=sys.stderr)
sys.exit(code)
"""


# Write distinct dialogues of a call, its result and an answer.
def write_dialogues(path: Path, rows: int) -> None:
    properties = {"city": {"type": "string"}, "day": {"type": "integer"}}
    parameters = {"type": "object", "properties": properties, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": parameters}}]
    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            call = {"name": "weather", "arguments": json.dumps({"city": f"city {n}", "day": n % 7})}
            messages = [
                {"role": "user", "content": f"What is the weather in city {n}? " + "Please be brief. " * 20},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "c", "type": "function", "function": call}],
                },
                {"role": "tool", "tool_call_id": "c", "content": '{"sky": "clear"}'},
                {"role": "assistant", "content": f"It is clear in city {n}."},
            ]
            file.write(json.dumps({"messages": messages, "tools": tools}) + "\n")


def main() -> None:
    """Print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 200_000])
    with tempfile.TemporaryDirectory() as folder:
        for rows in parser.parse_args().rows:
            path = Path(folder) / f"{rows}.jsonl"
            write_dialogues(path, rows)
            begin = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", CHILD, path], capture_output=True, text=True, check=True)
            seconds, counts = time.perf_counter() - begin, json.loads(done.stdout)
            peak = int(done.stderr.split()[-1]) / 1024
            print(f"{rows:,} rows, {counts['samples']:,} samples: {rows / seconds:,.0f} rows/s, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
