"""The shape of the package: sizes, one address per third-party library, what an import costs, the layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "rest_rl"
SOURCES = sorted(PACKAGE.rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 450, 60
ADDRESSES = {
    "trl": ["train/trl_trainer.py", "train/sft.py", "train/epoch_order.py", "train/run.py", "train/verl_trl_keys.py"],
    "datasets": ["data/rows.py", "train/prompts.py", "train/sft.py", "train/run.py"],
    "matplotlib": [
        "analyze/plots.py",
        "analyze/compare_plots.py",
        "analyze/probe_plots.py",
        "analyze/theory_plots.py",
        "analyze/radar.py",
    ],
    "rich": [
        "terminal.py",
        "cli_compare.py",
        "cli_grid.py",
        "cli_train.py",
        "cli_data_tables.py",
        "cli_eval_run.py",
        "cli_eval_tables.py",
        "cli_probe.py",
        "cli_theory.py",
        "cli_verl.py",
    ],
    "pyarrow": ["data/rows.py", "data/writing.py"],
    "transformers": [
        "train/entropy_tracker.py",
        "train/policy.py",
        "train/response_record.py",
        "train/run.py",
        "train/tool_world_model.py",
        "train/model_size.py",
        "evaluate/generate.py",
    ],
    "peft": ["train/policy.py", "train/model_size.py", "train/verl_model.py"],
    "safetensors": ["train/run.py", "train/checkpoints.py", "train/verl_model.py"],
    "tokenizers": ["regions.py", "train/tool_world_model.py"],
    "scipy": [
        "rewards.py",
        "significance.py",
        "evaluate/intervals.py",
        "analyze/estimates.py",
        "analyze/optimal_weights.py",
        "analyze/token_bounds.py",
        "analyze/seed_statistics.py",
    ],
    "jinja2": ["data/prompt_layout.py"],
    "openai": ["evaluate/endpoint.py"],
    "vllm": ["evaluate/vllm_model.py"],
    "tqdm": ["train/warm_start.py"],
    "verl": ["train/verl_plugin.py", "train/verl_config.py", "train/verl_run.py"],
    "hydra": ["train/verl_config.py"],
    "omegaconf": ["train/verl_config.py"],
    "ray": ["train/verl_run.py"],
    "transfer_queue": ["train/verl_plugin.py"],
    "tensordict": ["train/verl_plugin.py"],
    "tomli_w": ["config.py", "grid.py", "cli_inspect.py"],
}
"""Where each library may be imported; torch and numpy are at home wherever tensors are."""
ANYWHERE = {"torch", "numpy", "tomli", "rest_rl", *sys.stdlib_module_names}
TORCH_FREE = [
    "rest_rl",
    "rest_rl.cli",
    "rest_rl.cli_score",
    "rest_rl.response",
    "rest_rl.json_spans",
    "rest_rl.formats",
]
TORCH_FREE += ["rest_rl.rewards", "rest_rl.scoring", "rest_rl.authors_code", "rest_rl.runlog", "rest_rl.data.samples"]
TORCH_FREE += ["rest_rl.diagnosis"]
TORCH_FREE += ["rest_rl.evaluate.api_bank", "rest_rl.evaluate.bfcl.benchmark"]
TORCH_FREE += ["rest_rl.data.check", "rest_rl.data.loaders", "rest_rl.data.writing", "rest_rl.cli_data"]
VAGUE_NAMES = {"utils", "util", "common", "base", "core", "helpers", "manager", "misc"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_files_and_functions_are_small() -> None:
    too_long = []
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > MAX_FILE:
            too_long.append(f"{relative(path)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (size := node.end_lineno - node.lineno + 1) > MAX_FUNCTION:
                    too_long.append(f"{relative(path)}:{node.lineno} {node.name}: {size} lines")
    assert too_long == []


def test_each_library_has_its_address() -> None:
    strays = []
    for path in SOURCES:
        for library in set(imported(path)) - ANYWHERE:
            homes = ADDRESSES.get(library, [])
            if not any(path.relative_to(PACKAGE).match(home) for home in homes):
                strays.append(f"{relative(path)} imports {library}, whose address is {homes or 'none'}")
    assert strays == []


def test_no_file_has_a_vague_name() -> None:
    assert [relative(path) for path in SOURCES if path.stem in VAGUE_NAMES or path.parent.name in VAGUE_NAMES] == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_import_leaves_torch_out(module: str) -> None:
    code = (
        f"import sys, {module}; print([m for m in ('torch', 'transformers', 'trl', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_loads() -> None:
    import rest_rl

    assert all(getattr(rest_rl, name) is not None for name in rest_rl.__all__)
    assert sorted(rest_rl.__all__) == sorted(rest_rl._HOME_OF)
    assert rest_rl.__version__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rest_rl.nonsense


def test_imports_run_one_way() -> None:
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_source_names_no_machine() -> None:
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("no git checkout")
    forbidden = ["pypi" + ".org", "/wo" + "rk/", "/ro" + "ot/", "/tm" + "p/"]
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".toml", ".md", ".txt", ""} and path.is_file() and path.stat().st_size < 500_000:
            text = path.read_text(encoding="utf-8", errors="replace")
            assert [word for word in forbidden if word in text] == [], name
