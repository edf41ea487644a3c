"""Shared prompts on a GPU (`-m gpu`), and on a CPU the parts of `benchmarks/gpu_check.py` that need none."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import gpu_check
from benchmarks.gpu_check import attend_varlen, compare_with_stock, gather_paths, is_equal
from rest_rl.evaluate.shared_attention import Segment, attend
from tests.test_shared_prompts import SIZES, make_trainer, random_llama
from tests.tiny_policy import tiny_tokenizer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("case", gpu_check.CASES)
def test_log_probabilities_and_gradients_are_those_of_stock(case):
    row = compare_with_stock(torch.device("cuda"), case, "split")
    assert is_equal(row)
    if "bf16" not in case:
        assert max(row["log-probability"], row["entropy"]) < 2e-5


@pytest.mark.gpu
@needs_gpu
def test_greedy_tokens_are_those_of_stock(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = [prompt for prompt in ([5, 9, 2, 7, 4, 4], [8, 2], [3, 3, 3]) for _ in range(4)]
    found = []
    for shares in (False, True):
        settings = {"generation_kwargs": {"do_sample": False}, "max_completion_length": 40, "use_cpu": False}
        trainer = make_trainer(random_llama(tokenizer), tokenizer, tmp_path, share_prompts=shares, **settings)
        assert trainer.not_shared is None
        found.append(trainer._generate_single_turn(rows, None, {}, 4)[0])
    assert found[0] == found[1]
    assert len({tuple(row) for row in found[0]}) == 3


@pytest.mark.gpu
@needs_gpu
def test_a_small_llama_in_bf16_is_shared(tmp_path):
    tokenizer = tiny_tokenizer()
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), dtype="bfloat16")).bfloat16()
    trainer = make_trainer(model, tokenizer, tmp_path, bf16=True, use_cpu=False)
    assert trainer.not_shared is None
    assert trainer.model.device.type == "cuda"


# The script


SEGMENTS = (Segment(0, 2, (4, 7)), Segment(7, 7, (8,)))


def test_gathered_paths_by_hand():
    # Pieces: prompt 0-1, responses 2-3 and 4-6 behind it, and position 7, whose prompt has one token.
    index, bounds, key_bounds, longest, longest_path = gather_paths(SEGMENTS, torch.device("cpu"))
    assert index.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert bounds.tolist() == [0, 2, 4, 7, 8]
    assert key_bounds.tolist() == [0, 2, 6, 11, 12]
    assert (longest, longest_path) == (3, 5)


def test_the_candidate_attends_as_the_shipped_function():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 8, 16, generator=generator) for heads in (4, 2, 2))
    inputs = (torch.nn.Module(), query, key, value, None)
    ours, shipped = (f(*inputs, scaling=0.3, segments=SEGMENTS)[0] for f in (attend_varlen, attend))
    assert ours.shape == (1, 8, 4, 16)
    torch.testing.assert_close(ours, shipped)


@pytest.mark.parametrize(
    ("case", "gradient", "floor", "equal"),
    [
        ("fp32", 9e-6, 0.0, True),
        ("fp32", 2e-5, 1.0, False),  # no floor excuses fp32
        ("bf16", 0.29, 0.1, True),
        ("bf16", 0.31, 0.1, False),
        ("bf16", float("nan"), 0.1, False),
    ],
)
def test_what_counts_as_equal(case, gradient, floor, equal):
    assert is_equal({"case": case, "gradient": gradient, "stock, padded": floor, "stock from fp32": 0.0}) == equal


def test_a_row_of_the_table_of_equality():
    row = compare_with_stock(torch.device("cpu"), "bf16, checkpointing, LoRA", "split")
    assert is_equal(row)
    assert 0 < row["gradient"] < 0.2


def test_the_tiny_form_measures_every_variant(tmp_path, capsys):
    assert gpu_check.main(["--tiny", "--parts", "2", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["speed"]
    rows = [row for row in found if row["variant"] != "stock, flash"]
    assert len(rows) == 6
    assert all(row["note"] is None and row["gradient"] < 1e-5 for row in rows)
    assert len({row["gradient"] for row in rows}) == 3  # stock's own, and one of each shared variant
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + 8 + 2  # the last two are the summary


def test_without_time_rows_are_skipped_and_say_so(tmp_path):
    assert gpu_check.main(["--tiny", "--parts", "2", "--minutes", "0", "--out", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["speed"]
    assert len(rows) == 8
    assert all(row["ms"] is None and row["note"] for row in rows)


@pytest.mark.slow
def test_the_whole_tiny_form(tmp_path):
    assert gpu_check.main(["--tiny", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["equality"]) == 2 * len(gpu_check.CASES)
    assert all(row["passed"] and row["gradient"] > 0 for row in found["equality"])
    (row,) = found["run"]
    assert len(row["reward per step"]) == len(row["grad_norm per step"]) == 1
    assert row["grad_norm per step"][0] > 0
