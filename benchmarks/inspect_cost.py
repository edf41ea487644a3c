"""Measure the cost of `inspect` relative to `score` on responses that are hard to parse.

    python benchmarks/inspect_cost.py            # the embedded tokenizer; pass --tokenizer DIR for another

Both commands run in one process on the same file of 38 responses (3.4 million characters, 3 million tokens): 100,000
braces, think tags nested 20,000 deep, JSON nested 25,000 deep, 10,000 calls, a string of one megabyte. Times are CPU
seconds, the best of three. `inspect` cannot be cheaper than tokenizing, which `score` does not do. The memory peak is
that of the whole process.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from time import process_time
from typing import Any

from transformers import AutoTokenizer

from rest_rl.cli.app import main

GOLD = {"calls": [{"name": "f", "arguments": {"a": 1}}], "answer": None}
CALL = '{"name": "f", "%s": {"a": 1}}'


# Return long, deeply nested, unclosed and malformed responses, and a few short odd ones.
def hostile_responses() -> list[str]:
    hermes = "<tool_call>\n" + CALL % "arguments" + "\n</tool_call>"
    deep = '{"a":' * 25_000 + "1" + "}" * 25_000
    long = [
        "{" * 100_000,
        "[" * 100_000,
        '"' * 100_000,
        "\\" * 100_000,
        "<" * 100_000,
        "<think>" * 20_000,
        "<think>" * 10_000 + "</think>" * 10_000,
        "</think>" * 10_000,
        "<tool_call>" * 10_000,
        "<tool_call>\n" + "{" * 50_000 + "\n</tool_call>",
        "<tool_call>\n" + deep + "\n</tool_call>",
        '<tool_call>\n{"name": "f", "arguments": ' + deep + "}\n</tool_call>",
        "<think> x </think>\n<tool_call>\n" + "\n".join([CALL % "parameters"] * 10_000) + "\n</tool_call>",
        "\n".join([hermes] * 2_000),
        '<tool_call>\n{"name": "f", "arguments": {"a": "' + "x" * 1_000_000 + '"}}\n</tool_call>',
        "<think> " + "word " * 40_000 + "</think> done",
        "é" * 50_000,
        "\u202e" * 20_000,
        '{"name": "f", ' * 5_000,
        "a" * 100_000,
        " " * 100_000,
        "\n" * 50_000,
    ]
    values = ["NaN", "Infinity", "-Infinity", "9" * 5_000, "1e999", '"\\ud800"', '"\\u0000"', '"\x00"', "1,", "{", "[1"]
    odd = [
        f'<think> x </think>\n<tool_call>\n{{"name": "f", "parameters": {{"a": {value}}}}}\n</tool_call>'
        for value in values
    ]
    return [*long, *odd, "", " ", "\ud800", "\x00\x1b[2J", "<think>"]


def time_command(*arguments: str) -> float:
    begin = process_time()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        assert main(list(arguments)) == 0
    return process_time() - begin


def time_tokenizer(texts: list[str], tokenizer: Any) -> float:
    begin = process_time()
    for text in texts:
        tokenizer(text.encode("utf-8", "replace").decode("utf-8"), add_special_tokens=False)
    return process_time() - begin


def report(tokenizer: str) -> None:
    texts = hostile_responses()
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"response": text, "gold": GOLD}) + "\n" for text in texts))
        name, loaded = ("--format", "toolrl"), AutoTokenizer.from_pretrained(tokenizer)
        run: dict[str, Callable[[], float]] = {
            "score": lambda: time_command("score", str(rows), *name),
            "tokenizing": lambda: time_tokenizer(texts, loaded),
            "inspect": lambda: time_command("inspect", str(rows), "--tokenizer", tokenizer, *name),
            "inspect --json": lambda: time_command("inspect", str(rows), "--tokenizer", tokenizer, *name, "--json"),
        }
        for call in run.values():
            call()  # warm up: imports and the tokenizer's vocabulary
        times = {what: min(call() for _ in range(3)) for what, call in run.items()}
    print(f"{len(texts)} responses, {sum(map(len, texts)):,} characters")
    for what, taken in times.items():
        print(f"{what:15} {taken:6.2f} s, {taken / times['score']:5.1f} x score")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the cost of inspect relative to score")
    parser.add_argument("--tokenizer", default=str(Path(__file__).parent.parent / "src/rest_rl/assets/tool_world"))
    report(parser.parse_args().tokenizer)
