"""What keeping a model's calls in processes apart costs: BFCL by oracle in the sandbox and in this process.

Both evaluate the same samples by the same code; the second asks the release directly, without a process, limits or
walls. Times are of the processor, of this process and those that it has waited for.

    python benchmarks/bfcl_sandbox.py --version v4 [--categories non_live]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from rest_rl.evaluate.benchmarks.bfcl import benchmark, release
from rest_rl.evaluate.benchmarks.bfcl.package import find_package
from rest_rl.evaluate.benchmarks.bfcl.sandbox import Session, Verdict
from rest_rl.evaluate.harness import evaluate_all
from rest_rl.evaluate.log import EvalLog
from rest_rl.evaluate.models.recorded import Oracle
from rest_rl.formats import FORMATS


class InProcessSandbox:
    """The methods of a `Sandbox`, answered by the release in this process."""

    loaded: release.BfclRelease | None = None

    def __init__(self, package: Any, **_: Any) -> None:
        if InProcessSandbox.loaded is None:
            sys.path.insert(0, str(package.folder))
            os.environ["BFCL_PROJECT_ROOT"] = tempfile.mkdtemp()
            InProcessSandbox.loaded = release.BfclRelease(package.version)
        self.release = InProcessSandbox.loaded

    def __getattr__(self, name: str) -> Any:
        return getattr(self.release, name)

    def check_calls(self, *arguments: Any) -> Verdict:
        return Verdict(*self.release.check_calls(*arguments))

    def session(self, identity: str) -> Session:
        def ask(method: str, *arguments: Any) -> Any:
            result = None if method in {"open", "end"} else getattr(self.release, method)(*arguments)
            return json.loads(json.dumps(result))

        return Session(ask, identity)

    def close(self) -> None:
        """Nothing is held."""


def evaluate(version: Any, categories: Sequence[str] | None) -> tuple[int, float, float]:
    """(correct samples, seconds of the processor, seconds) of an evaluation from its start to its end."""
    wall, before = perf_counter(), sum(os.times()[:4])
    bfcl = benchmark.Bfcl(version, categories)
    with tempfile.TemporaryDirectory() as folder:
        log = EvalLog(Path(folder))
        rows = evaluate_all(bfcl, Oracle(FORMATS["toolrl"]), FORMATS["toolrl"], list(bfcl.groups), log)
    bfcl.close()
    return sum(bool(row["correct"]) for row in rows), sum(os.times()[:4]) - before, perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", choices=["v3", "v4"], default="v4")
    parser.add_argument("--categories", type=lambda text: text.split(","))
    arguments = parser.parse_args()
    find_package(arguments.version)
    apart = evaluate(arguments.version, arguments.categories)
    benchmark.Sandbox = InProcessSandbox
    here = evaluate(arguments.version, arguments.categories)
    for name, (correct, seconds, wall) in {"apart": apart, "in this process": here}.items():
        print(f"{name:16} {correct} correct, {seconds:.1f} s of the processor, {wall:.1f} s")
    print(f"ratio            {apart[1] / here[1]:.2f} of the processor, {apart[2] / here[2]:.2f} in all")


if __name__ == "__main__":
    main()
