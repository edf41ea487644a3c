"""docs/cluster.md and configs/cluster: the tables are what the script prints, the files parse, every path is there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.architectures import NUM_PARAMETERS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def printed(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / "cluster_estimate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_tables_are_those_of_the_script() -> None:
    for table in printed().strip().split("\n\n"):
        assert table in PAGE


def test_one_row_by_hand() -> None:
    # 8.19e9 parameters x 16 bytes / 32 GPUs = 4.1e9 bytes = 3.8 GiB; 4 bytes x 151,936 x 16,384 tokens = 9.3 GiB
    shown = printed("8B", "32")
    assert "     3.8 GiB  weights, gradients, Adam" in shown
    assert "     9.3 GiB  logits" in shown
    # 8 x 8.19e9 x 2,048 x 1,212 tokens / (32 x 989e12 x 0.35) = 14.7 s
    assert "    14.7 s H100  update" in shown


@pytest.mark.parametrize("name", ["1.7B", "4B", "8B", "14B"])
def test_parameters_are_the_published_ones(name: str) -> None:
    published = next(count for model, count in NUM_PARAMETERS.items() if f"Qwen3-{name}" in model)
    assert f"{published / 1e9:.2f} billion" in printed(name, "8")


def test_every_path_named_is_there() -> None:
    for named in re.findall(r"(?:configs|src|benchmarks|tests|docs)/[\w./*-]*\w", PAGE):
        assert list(ROOT.glob(named)), named


def test_kubernetes_file() -> None:
    job = yaml.safe_load((ROOT / "configs/cluster/rayjob.yaml").read_text(encoding="utf-8"))
    workers = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    gpus = workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nodes {workers['replicas']} --gpus-per-node {gpus}" in job["spec"]["entrypoint"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_slurm_file_is_bash() -> None:
    script = ROOT / "configs/cluster/slurm.sbatch"
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, check=False).returncode == 0
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pass RUN.toml" in done.stderr
