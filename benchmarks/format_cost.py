"""Measure the cost of parsing a response in each format relative to toolrl, with and without spans.

    python benchmarks/format_cost.py

One process renders the same 200 responses (a thought of 250 words, one to four calls) in every format and parses them
in alternation. The table shows the median CPU time per response and its ratio.
"""

from __future__ import annotations

import random
import statistics
import time

from rest_rl.formats import FORMATS
from rest_rl.response import ToolCall

ROUNDS = 15
WORDS = (
    *("the", "user", "wants", "to", "know", "whether", "this", "tool", "can", "look", "up", "a", "city", "and", "its"),
    *("weather", "so", "I", "should", "call", "it", "with"),
)


def main() -> None:
    rng = random.Random(0)
    turns = [
        (
            " ".join(rng.choices(WORDS, k=250)),
            [
                ToolCall(f"get_{rng.choice(WORDS)}", {f"key_{k}": rng.choice([*WORDS, 7, True]) for k in range(3)})
                for _ in range(rng.randrange(1, 5))
            ],
        )
        for _ in range(200)
    ]
    texts = {name: [f.render(thought, calls, None) for thought, calls in turns] for name, f in FORMATS.items()}
    seconds: dict[tuple[str, bool], list[float]] = {}
    # Formats alternate within a round, so that drift of the machine affects all of them alike.
    for _ in range(ROUNDS):
        for name, tool_format in FORMATS.items():
            for spans in (True, False):
                begin = time.process_time()
                for text in texts[name]:
                    tool_format.parse(text, spans=spans)
                seconds.setdefault((name, spans), []).append((time.process_time() - begin) / len(turns))
    print(f"{'format':12} {'with spans':>16} {'without':>16}")
    for name in FORMATS:
        cells = []
        for spans in (True, False):
            median, base = (statistics.median(seconds[key, spans]) for key in (name, "toolrl"))
            cells.append(f"{median * 1e6:6.0f} us  x{median / base:4.1f}")
        print(f"{name:12} {cells[0]:>16} {cells[1]:>16}")


if __name__ == "__main__":
    main()
