"""Compare our `soft` API-Bank verdict with the unchanged published evaluation on mutated predictions.

The published `generate.py` runs with a fake vLLM that returns our texts, followed by the published `evaluate.py`. Both
scripts are in the folder API-Bank of ToolRL and of the published ResT code.

    python benchmarks/api_bank_soft.py --published PUBLISHED/API-Bank --data DIR -n 10000
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rest_rl.evaluate.benchmarks.api_bank import LEVELS, parse_published_calls, soft_match

BATCH_SIZE = 150
FAKE_VLLM = """
import json
TEXTS = iter(json.load(open("texts.json")))
class SamplingParams:
    def __init__(self, **settings): pass
class Output:
    def __init__(self, text): self.text = text
class Result:
    def __init__(self, text): self.outputs = [Output(text)]
class LLM:
    def __init__(self, **settings): pass
    def chat(self, messages, sampling_params=None): return [Result(next(TEXTS))]
"""
Mutation = Callable[[dict[str, Any], random.Random], str]


def format_call(name: Any, arguments: Any, **more: Any) -> str:
    return json.dumps({"name": name, "parameters": arguments, **more}, ensure_ascii=False)


def wrap_calls(*lines: str) -> str:
    return "\n".join(["<think> a thought </think>", "<tool_call>", *lines, "</tool_call>"])


def mutate_arguments(arguments: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    # Change one thing, sometimes only the type of a value.
    result = dict(arguments)
    key = rng.choice(sorted(result)) if result else "x"
    kind = rng.randrange(7)
    if kind == 0:
        result.pop(key, None)
    elif kind == 1:
        result[rng.choice(["extra", key.upper(), key + " "])] = "1"
    else:
        value = result.get(key, "")
        result[key] = [None, [value], {"v": value}, f"{value} ", int(value) if str(value).isdigit() else True][kind - 2]
    return result


JUNK = (
    *(
        "null",
        "5",
        "true",
        '"text"',
        '"name parameters"',
        "[]",
        "{}",
        "[1]",
        '["name", "parameters"]',
        "NaN",
        "{broken",
        "prose",
    ),
    *(
        '{"name": "x"}',
        '{"parameters": {}}',
        '{"name": null, "parameters": null}',
        "1e999",
        '"{\\"a\\": 1}"',
        '"\\"name\\""',
    ),
    *(
        "[" * 3000,
        "9" * 5000,
        '{"name": "A", "name": "B", "parameters": {}}',
        "</think>",
        "<tool_call>",
        "</tool_call>",
    ),
)


def mutate_response(answer: dict[str, Any], rng: random.Random) -> str:
    # Most choices stay close to the correct response, where the two evaluations could differ.
    name, arguments = answer["name"], answer["parameters"]
    gold, junk = format_call(name, arguments), rng.choices(JUNK, k=rng.randrange(1, 4))
    shuffled = dict(rng.sample(sorted(arguments.items()), len(arguments)))
    choices = (
        lambda: wrap_calls(gold),
        lambda: wrap_calls(format_call(name, shuffled)),
        lambda: wrap_calls(format_call(name, mutate_arguments(arguments, rng))),
        lambda: wrap_calls(*rng.sample([gold, *junk], len(junk) + 1)),
        lambda: "\n".join(rng.sample([gold, *junk], len(junk) + 1)),
        lambda: wrap_calls(json.dumps(gold)),
        lambda: wrap_calls(json.dumps(arguments)),
        lambda: wrap_calls(json.dumps(json.dumps(arguments))),
        lambda: wrap_calls(json.dumps({"name": name, "arguments": arguments})),
        lambda: wrap_calls(format_call(name, arguments, extra=1)),
        lambda: wrap_calls(format_call(name.lower() + rng.choice(["", "x"]), arguments)),
        lambda: wrap_calls(json.dumps([{"name": name, "parameters": arguments}])),
        lambda: wrap_calls(format_call(name, json.dumps(arguments))),
        lambda: wrap_calls(gold + rng.choice([",", " ", "\t", ";", "\r", "\u2028", "\x0b"])),
        lambda: gold,
        lambda: f"<tool_call>{gold}</tool_call>",
        lambda: wrap_calls(*junk) + "\n" + wrap_calls(gold),
        lambda: wrap_calls(gold) + "\n" + wrap_calls(*junk),
        lambda: wrap_calls(gold)[: rng.randrange(len(wrap_calls(gold)))],
        lambda: "".join(c for c in wrap_calls(gold) if rng.random() > 0.01),
        lambda: wrap_calls(json.dumps({"name": name, "parameters": arguments}, indent=1)),
        lambda: rng.choice(["", " ", "\n", "no call", *junk]),
        lambda: wrap_calls(gold, format_call(name, mutate_arguments(arguments, rng))),
        lambda: wrap_calls(format_call(name, mutate_arguments(arguments, rng)), gold),
    )
    return rng.choice(choices)()


def run_published_scripts(rows: list[dict[str, Any]], texts: list[str], scripts: Path) -> list[int]:
    # The scripts use fixed file names in their working directory, so each batch runs in its own folder. Level 1 gets
    # all rows and the other levels none, which keeps one verdict per row.
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "vllm.py").write_text(FAKE_VLLM, encoding="utf-8")
        (place / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
        for level in LEVELS:
            content = json.dumps(rows if level == 1 else [])
            (place / f"level-{level}-api_processed.json").write_text(content, encoding="utf-8")
        for script in ("generate.py", "evaluate.py"):
            (place / script).write_bytes((scripts / script).read_bytes())
            command = [sys.executable, script, "--model_paths", "m"]
            subprocess.run(command, cwd=place, check=True, capture_output=True, env={"PYTHONPATH": folder})
        scores = json.loads((place / "PATH_TO_YOUR_SCORE_ROOT/m/score.json").read_text(encoding="utf-8"))
    return [scores[f"Level1_{index}"]["score"] for index in range(len(rows))]


def main() -> int:
    """Compare both evaluations and print every difference; return 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--published", required=True, type=Path, help="folder that contains generate.py and evaluate.py"
    )
    parser.add_argument(
        "--data", required=True, type=Path, help="folder that contains level-{1,2,3}-api_processed.json"
    )
    parser.add_argument("-n", type=int, default=10_000, help="number of predictions (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    rows = [
        row
        for level in LEVELS
        for row in json.loads((arguments.data / f"level-{level}-api_processed.json").read_text(encoding="utf-8"))
    ]
    verdicts: Counter[tuple[bool, bool]] = Counter()
    for start in range(0, arguments.n, BATCH_SIZE):
        batch = rng.choices(rows, k=min(BATCH_SIZE, arguments.n - start))
        answers = [row["answer"][0] if isinstance(row["answer"], list) else row["answer"] for row in batch]
        texts = [mutate_response(answer, rng) for answer in answers]
        theirs = run_published_scripts(batch, texts, arguments.published)
        for answer, text, score in zip(answers, texts, theirs, strict=True):
            ours = soft_match(parse_published_calls(text), answer)
            verdicts[ours, bool(score)] += 1
            if ours != bool(score):
                print(f"published: {score}, ours: {ours}, gold: {answer}, response: {text[:300]!r}")
        print(f"\r{sum(verdicts.values())} of {arguments.n} predictions", end="", file=sys.stderr)
    equal = verdicts[True, True] + verdicts[False, False]
    counts = f"{verdicts[True, True]} correct, {verdicts[False, False]} wrong"
    print(f"\n{equal} of {sum(verdicts.values())} verdicts agree: {counts}")
    return int(equal != sum(verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
