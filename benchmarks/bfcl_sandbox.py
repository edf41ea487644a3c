"""Measure the cost of the BFCL sandbox: gold responses evaluated in the sandbox and in this process.

Both evaluate the same samples with the same code; the second calls the release directly, without a separate process or
limits. CPU times include this process and its finished children.

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

from rest_rl.envs.bfcl_sandbox import release
from rest_rl.envs.bfcl_sandbox.package import find_package
from rest_rl.envs.bfcl_sandbox.sandbox import Session, Verdict
from rest_rl.evaluate.benchmarks.bfcl import benchmark
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
        """Do nothing: there is no process to end."""


def evaluate(version: Any, categories: Sequence[str] | None) -> tuple[int, float, float]:
    """Return (correct samples, CPU seconds, wall seconds) of an evaluation."""
    # os.times()[:4]: user and system time of this process and of its finished children.
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
    # Replaces the class that the benchmark looks up at run time.
    benchmark.Sandbox = InProcessSandbox
    here = evaluate(arguments.version, arguments.categories)
    for name, (correct, seconds, wall) in {"in the sandbox": apart, "in this process": here}.items():
        print(f"{name:16} {correct} correct, {seconds:.1f} s of CPU time, {wall:.1f} s of wall time")
    print(f"ratio            {apart[1] / here[1]:.2f} in CPU time, {apart[2] / here[2]:.2f} in wall time")


if __name__ == "__main__":
    main()
