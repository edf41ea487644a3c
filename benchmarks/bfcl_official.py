"""Compare our BFCL verdicts with those of the package on mutated predictions; exit with 1 for unexplained differences.

The package's own loop (`BaseHandler.inference`) and runners judge the same texts in a separate process and environment:
python 3.10 to 3.12 with

    pip install overrides tqdm python-dotenv tenacity numpy pandas filelock mpmath==1.3.0 \
        tree_sitter==0.21.3 tree-sitter-java==0.21.0 tree-sitter-javascript==0.21.4
    python benchmarks/bfcl_official.py --version v3 --official-python OTHER/bin/python --single 3000 --multi 400

Three kinds of differences are explained: the two sides parse the text differently (ToolRL's parser keeps only the last
block, and no call named none), we did not execute a call, or a relevance sample is answered by a call of a tool it does
not have. In these cases the package judges the recording again without that call and must agree with our verdict.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

from bfcl_mutations import Call, Sample, mutate_multi_turn, mutate_single_turn

from rest_rl.envs.bfcl_sandbox.package import Version, find_package
from rest_rl.envs.bfcl_sandbox.sandbox import Sandbox
from rest_rl.evaluate.benchmarks.bfcl.benchmark import Bfcl
from rest_rl.evaluate.benchmarks.bfcl.gold import build_gold
from rest_rl.evaluate.benchmarks.bfcl.groups import MULTI_TURN, select_categories
from rest_rl.evaluate.conversation import Reply, Request
from rest_rl.evaluate.harness import evaluate_batch
from rest_rl.evaluate.models.recorded import Recorded, Recording
from rest_rl.formats import get_format

NOT_EXECUTED = "the call was not executed."
UNKNOWN_TOOL = "relevance_error:no_tool_of_the_sample"


class WatchedModel(Recorded):
    """Recorded responses; remembers the last request."""

    last: Request

    def respond(self, requests: Sequence[Request]) -> list[Reply]:
        self.last = requests[-1]
        return super().respond(requests)


def judge(benchmark: Bfcl, sample: Sample) -> Sample:
    """Return our verdict with the tool results and the time."""
    model = WatchedModel({sample["id"]: Recording(sample["response"])})
    start = time.perf_counter()
    [row] = evaluate_batch(benchmark, model, get_format("toolrl"), [sample["id"]], Event())
    seconds = time.perf_counter() - start
    said = [message["content"] for message in model.last.sample.messages if message["role"] == "tool"]
    return {**row, "results": said, "seconds": seconds}


# Return the verdicts of the package, which runs in a separate process.
def judge_officially(samples: list[Sample], version: Version, python: str) -> list[Sample]:
    side = Path(__file__).with_name("bfcl_official_side.py")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "samples.json", Path(folder) / "verdicts.json"
        source.write_text(json.dumps(samples), encoding="utf-8")
        command = [python, str(side), version, str(find_package(version).folder), str(source), str(target)]
        # A fixed hash seed keeps the order of sets in upstream's results.
        subprocess.run(command, check=True, env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "HOME": folder})
        return json.loads(target.read_text(encoding="utf-8"))


# Reduce a recording to the calls that we parsed and executed, turn by turn.
def executed_calls(ours: Sample) -> Any:
    if not isinstance(ours["response"], list):
        return json.dumps([] if ours["reason"].startswith(UNKNOWN_TOOL) else ours["calls"])
    # Results follow the calls in order. Those of a last step are not in our log; its calls count as executed.
    results = iter(ours["results"])
    turns = []
    for turn in ours["calls"]:
        steps = [[call for call in step if not next(results, "").endswith(NOT_EXECUTED)] for step in turn]
        turns.append([json.dumps(step) for step in steps if step])
    return turns


# Parse a whole recording with our parser; return the calls in the shape that the package uses.
def parse_recording(sample: Sample) -> Any:
    parse = get_format("toolrl").parse

    def calls(text: str) -> list[Call]:
        return [{"name": call.name, "arguments": dict(call.arguments)} for call in parse(text, spans=False).calls]

    response = sample["response"]
    return calls(response) if isinstance(response, str) else [[calls(text) for text in turn] for turn in response]


# Return the known differences between the two parsers that occur in a recording.
def explain_parsing(response: Any) -> list[str]:
    texts = [response] if isinstance(response, str) else [text for turn in response for text in turn]
    found = {
        "no end": any("</tool_call>" not in text.rpartition("<tool_call>")[2] for text in texts if "<tool" in text),
        "two blocks": any(text.count("<tool_call>") > 1 for text in texts),
        "named None": any('"name": "None"' in text for text in texts),
        "NaN or Infinity": any("NaN" in text or "Infinity" in text for text in texts),
    }
    return [cause for cause, is_so in found.items() if is_so]


# Return pairs of tool results that differ, ours first, without calls that we did not execute.
def differing_results(ours: Sample, theirs: Sample) -> list[tuple[str, str]]:
    pairs = zip(ours["results"], theirs["results"], strict=False)  # our log ends before the results of a last step
    return [(a, b) for a, b in pairs if a != b and not a.endswith(NOT_EXECUTED)]


class Tally:
    """Counts of the comparison."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.differing: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.unexplained = 0

    def add(self, sample: Sample, ours: Sample, theirs: Sample, on_ours: Sample) -> None:
        """Add the verdicts on a sample; print a difference that has no reason.

        `on_ours` is the package's verdict on only the calls that we executed.
        """
        kinds = set(sample["kinds"])
        self.kinds.update(kinds)
        is_equal = ours["correct"] == theirs["valid"]
        self.counts["equal" if is_equal else "differing"] += 1
        self.counts["equal on the calls we executed"] += on_ours["valid"] == ours["correct"]
        self.counts["correct for both"] += ours["correct"] and theirs["valid"]
        self.counts["the package raises an exception"] += bool(theirs["raised"])
        why = self.reason(sample, ours, theirs)
        self.counts[f"all with the reason: {why}"] += bool(why)
        results = differing_results(ours, theirs) if not why.startswith("parsed") else []
        for mine, other in [] if why.startswith("parsed") else zip(ours["results"], theirs["results"], strict=False):
            fate = "rejected too" if other.startswith("Error during execution") else f"executed: {mine[:40]}"
            self.counts[f"calls that we did not execute and the package {fate}"] += mine.endswith(NOT_EXECUTED)
        if is_equal and not results and on_ours["valid"] == ours["correct"]:
            self.same_verdict(why, ours, theirs)
            return
        self.differing.update(kinds)
        if on_ours["valid"] != ours["correct"] or results:
            why = "UNEXPLAINED"
        self.unexplained += not why or "UNEXPLAINED" in why
        self.counts[f"differing, {why or 'UNEXPLAINED'}"] += 1
        if not why.startswith("parsed") or "UNEXPLAINED" in why:
            print_difference(why, sample, ours, theirs, on_ours, results)

    # Return why the verdicts may differ although those on the executed calls agree; empty if they must agree.
    def reason(self, sample: Sample, ours: Sample, theirs: Sample) -> str:
        mine, other = (json.dumps(read, sort_keys=True) for read in (parse_recording(sample), theirs["decoded"]))
        if mine != other:
            return f"parsed differently ({', '.join(explain_parsing(sample['response'])) or 'UNEXPLAINED'})"
        if ours["reason"].startswith(UNKNOWN_TOOL):
            return "a relevance sample answered by a tool that it does not have"
        return "not executed" if any(result.endswith(NOT_EXECUTED) for result in ours["results"]) else ""

    # Count a sample with equal verdicts, and note if both sides give different reasons for an error.
    def same_verdict(self, why: str, ours: Sample, theirs: Sample) -> None:
        self.counts["equal results of all tools"] += bool(ours["results"]) and not why
        error = ours["reason"].partition(": ")[0]
        if not why and not theirs["raised"] and error != theirs["error"]:
            self.errors[f"{error} for {theirs['error']}"] += 1

    def report(self, name: str) -> None:
        print(f"\n{name}: {self.counts['equal']} of {self.counts['equal'] + self.counts['differing']} verdicts agree")
        listed = {
            "counts": self.counts,
            "different reasons for equal verdicts, ours for theirs": self.errors,
            "mutations": {kind: f"{number}, {self.differing[kind]} differ" for kind, number in self.kinds.items()},
        }
        for title, found in listed.items():
            print(f"  {title}: " + "; ".join(f"{key}: {value}" for key, value in sorted(found.items()) if value))


def print_difference(
    why: str, sample: Sample, ours: Sample, theirs: Sample, on_ours: Sample, results: Sequence[Any]
) -> None:
    print(f"\n{why or 'UNEXPLAINED'}: {sample['id']} {sample['kinds']}")
    print(f"  ours {ours['correct']} {ours['reason'][:200]!r}; results that differ: {results[:2]}")
    for name, verdict in (("theirs", theirs), ("theirs on the calls we executed", on_ours)):
        print(f"  {name} {verdict['valid']} {verdict['error']} {verdict['raised']}")
    print(f"  {sample['response']!r:.1500}")


def compare(name: str, samples: list[Sample], benchmark: Bfcl, version: Version, python: str) -> int:
    """Judge all samples, print the differences, and return the number of unexplained ones."""
    ours = [judge(benchmark, sample) for sample in samples]
    theirs = judge_officially(samples, version, python)
    responses = [executed_calls(row) for row in ours]
    taken = [{**sample, "response": each, "is_json": True} for sample, each in zip(samples, responses, strict=True)]
    tally = Tally()
    for rows in zip(samples, ours, theirs, judge_officially(taken, version, python), strict=True):
        tally.add(*rows)
    tally.report(f"{version} {name}")
    mine, other = (1e3 * sum(row["seconds"] for row in rows) / len(rows) for rows in (ours, theirs))
    print(f"  ms per sample: ours {mine:.2f}, theirs {other:.2f}, ratio {mine / other:.1f}")
    return tally.unexplained


# Keep the first sample of each id: v3 has a duplicate id, which the package cannot distinguish.
def drop_duplicate_ids(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({entry["id"]: entry for entry in reversed(entries)}.values())[::-1]


def main() -> int:
    """Compare on single-turn and multi-turn samples; return 1 if any difference is unexplained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", required=True, choices=["v3", "v4"])
    parser.add_argument(
        "--official-python", required=True, help="Python interpreter that can import eval_runner of bfcl_eval"
    )
    parser.add_argument("--single", type=int, default=3000, help="predictions for single-turn samples")
    parser.add_argument("--multi", type=int, default=400, help="predictions for conversations")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    benchmark = Bfcl(options.version)
    names = select_categories(options.version, None)
    with Sandbox(find_package(options.version)) as sandbox:
        entries = {name: drop_duplicate_ids(sandbox.entries(name)) for name in names}
        singles = [name for name in names if name not in MULTI_TURN]
        drawn = [rng.choice(entries[rng.choice(singles)]) for _ in range(options.single)]
        samples = [mutate_single_turn(entry, build_gold(entry), rng) for entry in drawn]
        conversations = []
        for _ in range(options.multi):
            entry = rng.choice(entries[rng.choice(MULTI_TURN)])
            conversations.append(mutate_multi_turn(entry, sandbox.gold_calls(entry["id"]), rng))
    unexplained = 0
    for name, chosen in (("single turn", samples), ("multi-turn", conversations)):
        if chosen:
            unexplained += compare(name, chosen, benchmark, options.version, options.official_python)
    benchmark.close()
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
