"""Run verl on two cores with the embedded model, without changing verl on disk.

    run_cpu(["-m", "verl.trainer.main_ppo", *hydra_overrides(CPU_SETTINGS), f"data.train_files={file}", ...], folder)
    [row["actor/grad_norm"] for row in logged_metrics(folder)]  # needs trainer.logger=[file]

`CPU_SETTINGS` is also a `[verl]` table: run_cpu(["-m", "rest_rl", "train", "run.toml", "--engine", "verl"], folder).
`started` gives the process to a test that kills it; `run_cpu` raises with the end of the log if the run fails.
Runs agree but for rounding if one replica samples and a step is one mini-batch: verl's order of rows is random.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
LOG, METRICS = "log.txt", "verl.jsonl"
TIMEOUT = 900.0
"""Seconds: fifteen times the duration of a run on two idle cores."""

CPU_SETTINGS: dict[str, Any] = {
    "actor_rollout_ref": {
        "model": {
            "external_lib": f"{__package__}.hf_rollout",
            "use_remove_padding": False,  # needs flash-attn
            "override_config": {"+attn_implementation": "eager"},
        },
        "actor": {
            "strategy": "fsdp2",  # torch refuses FSDP1 for parameters on a CPU
            "fsdp_config": {"use_torch_compile": False, "mixed_precision": {"+param_dtype": "fp32"}},
        },
        "ref": {"fsdp_config": {"use_torch_compile": False, "mixed_precision": {"+param_dtype": "fp32"}}},
        "rollout": {"name": "hf", "tensor_model_parallel_size": 1, "agent": {"num_workers": 1}},
    },
    "data": {"dataloader_num_workers": 0},
    "ray_kwargs": {"ray_init": {"num_cpus": 16, "+num_gpus": 2, "+include_dashboard": False}},  # named, not there
    "reward": {"num_workers": 1},
    "trainer": {"device": "cpu", "n_gpus_per_node": 1},
    "transfer_queue": {"backend": {"SimpleStorage": {"num_data_storage_units": 1}}},
}
"""verl's settings for a CPU; `+` is Hydra's prefix for a key that its files lack. One rank; at most two work."""


def cpu_environment(folder: Path) -> dict[str, str]:
    """The environment of a run, inherited by the Ray processes that it starts; metrics go to the folder."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",  # sixteen processes that no one asks for
        "RAY_worker_niceness": "0",  # else 15: a busy machine would starve them
        "VERL_ENGINE_DEVICE": "cuda",  # the key of the FSDP engine, which also runs on a CPU
        "VERL_FILE_LOGGER_PATH": str(folder / METRICS),
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": f"{__package__}.cpu_platform",
    }


def hydra_overrides(settings: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Nested tables as Hydra arguments: `a.b=1`, and `+a.b=1` for a key `+b`."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from hydra_overrides(value, f"{path}{key}.")
        else:
            name = key.removeprefix("+")
            yield f"{'+' * (name != key)}{path}{name}={value if isinstance(value, str) else json.dumps(value)}"


@contextmanager
def started(arguments: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `python ARGUMENTS` in the folder with its log there; afterwards it and its children are killed."""
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=cpu_environment(folder), stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a run and the Ray that it started; does nothing if the run has ended."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), process]
        for member in reversed(family):
            member.kill()
        process.wait()


def run_cpu(arguments: Sequence[str], folder: Path, timeout: float = TIMEOUT) -> None:
    """Run `python ARGUMENTS` to its end; AssertionError with the end of its log if it fails."""
    with started(arguments, folder) as process:
        code = process.wait(timeout)
    assert code == 0, (folder / LOG).read_text(encoding="utf-8", errors="replace")[-5000:]


def logged_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics that verl's logger `file` wrote for each step of the last run in this folder."""
    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["data"] for line in lines]
