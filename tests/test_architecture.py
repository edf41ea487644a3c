"""Limits on sizes, on where libraries may be imported, on the cost of imports, and on the layers."""

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
MAX_FILE, MAX_FUNCTION, MAX_AT_THE_ROOT, MAX_LINES = 700, 60, 17, 36_330
IMPORTED_IN = {
    "trl": ["train/trl/*.py", "train/sft.py", "train/estimate.py", "train/verl/*.py"],
    "datasets": ["data/reading.py", "train/prompts.py", "train/sft.py", "train/run.py"],
    "matplotlib": ["report/plots.py", "compare/page.py", "probe/page.py", "evaluate/*.py"],
    "rich": ["cli/*.py"],
    "typer": ["cli/*.py"],
    "pydantic": ["config.py", "compare/grid.py", "weights.py", "rewards.py", "envs/adapters.py"],
    "pandas": ["report/tables.py", "evaluate/tables.py", "compare/*.py"],
    "jsonschema": ["envs/guard.py", "data/*.py", "data/office/*.py"],
    "faker": ["data/office/*.py"],
    "referencing": ["data/gold.py"],
    "pyarrow": ["data/reading.py", "data/write.py"],
    "transformers": [
        "train/*.py",
        "train/trl/*.py",
        "evaluate/generate.py",
        "evaluate/shared_attention.py",
        "envs/adapters.py",
    ],
    "mcp": ["envs/mcp.py"],
    "huggingface_hub": ["data/hub.py", "evaluate/origin.py"],
    "peft": ["train/*.py", "train/verl/model.py"],
    "accelerate": ["train/*.py", "train/trl/*.py"],
    "safetensors": ["train/checkpoints.py", "train/trl/*.py", "train/verl/*.py"],
    "tokenizers": ["regions.py", "train/named_models.py"],
    "psutil": ["train/estimate.py", "compare/launch.py"],
    "scipy": ["rewards.py", "statistics.py", "compare/statistics.py", "probe/*.py"],
    "jinja2": ["data/layout.py"],
    "openai": ["evaluate/models/endpoint.py"],
    "vllm": ["evaluate/models/vllm.py"],
    "verl": ["train/verl/*.py"],
    "hydra": ["train/verl/*.py"],
    "omegaconf": ["train/verl/*.py"],
    "ray": ["train/verl/*.py"],
    "transfer_queue": ["train/verl/*.py"],
    "tensordict": ["train/verl/*.py"],
    "tomli_w": ["config.py", "compare/grid.py", "cli/inspect.py"],
}
"""The files that may import each library; torch and numpy are allowed everywhere."""
ANYWHERE = {"torch", "numpy", "tomli", "rest_rl", *sys.stdlib_module_names}
TORCH_FREE = [
    "rest_rl",
    "rest_rl.authors_code",
    "rest_rl.cli.app",
    "rest_rl.cli.data",
    "rest_rl.cli.score",
    "rest_rl.cli.terminal",
    "rest_rl.compare.grid",
    "rest_rl.config",
    "rest_rl.credit",
    "rest_rl.data.check",
    "rest_rl.data.load",
    "rest_rl.data.samples",
    "rest_rl.data.shapes",
    "rest_rl.data.write",
    "rest_rl.envs.load",
    "rest_rl.envs.session",
    "rest_rl.errors",
    "rest_rl.evaluate.benchmarks.api_bank",
    "rest_rl.evaluate.benchmarks.bfcl.benchmark",
    "rest_rl.formats",
    "rest_rl.json_spans",
    "rest_rl.objects",
    "rest_rl.presets",
    "rest_rl.report.diagnosis",
    "rest_rl.response",
    "rest_rl.rewards",
    "rest_rl.runlog",
    "rest_rl.weights",
]
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


def test_the_package_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_AT_THE_ROOT
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES) <= MAX_LINES


def test_each_library_is_imported_only_where_allowed() -> None:
    strays = []
    for path in SOURCES:
        for library in set(imported(path)) - ANYWHERE:
            homes = IMPORTED_IN.get(library, [])
            if not any(path.relative_to(PACKAGE).match(home) for home in homes):
                strays.append(f"{relative(path)} imports {library}, which is allowed only in {homes or 'no file'}")
    assert strays == []


def test_no_file_has_a_vague_name() -> None:
    assert [relative(path) for path in SOURCES if path.stem in VAGUE_NAMES or path.parent.name in VAGUE_NAMES] == []


def test_light_modules_do_not_import_torch() -> None:
    code = """
import importlib, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
    print([module, *(heavy for heavy in ("torch", "transformers", "trl", "matplotlib") if heavy in sys.modules)])
"""
    done = subprocess.run([sys.executable, "-c", code, *TORCH_FREE], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str([module]) for module in TORCH_FREE]


def test_every_public_name_loads() -> None:
    import rest_rl

    assert all(getattr(rest_rl, name) is not None for name in rest_rl.__all__)
    assert sorted(rest_rl.__all__) == sorted([*rest_rl._HOME_OF, *rest_rl._WORKFLOWS])
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
