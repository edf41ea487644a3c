"""Check prompts shared within a group on one GPU, without network. Needs the packages of the extra `dev`.

1. equality: log-probabilities, entropies and gradients against TRL's own, on ragged groups.
2. speed: the loss of one group, forward and backward; random weights in the shape of Qwen3-1.7B, bf16, no padding (the
   best case for TRL's own computation). The peak includes 3 GiB of weights. The last columns are distances from the
   first row with that P: of log-probabilities, and of the gradient of the first layer's key projection.
3. run: three steps of `rest-rl train` with the embedded model.

Exit status 1: gradients in fp32 differ by more than 1e-5 (relative L2 distance), those in bf16 by more than three times
the noise floor, or a part fails. The noise floor is how far TRL's own gradients move with more columns of padding, or
from fp32 to bf16, whichever is more.

python benchmarks/gpu_check.py --out gpu.json            # one H200, nine minutes at most
python benchmarks/gpu_check.py --tiny --out tiny.json    # the same code on a CPU, in small
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import AttentionInterface
from transformers.utils import is_flash_attn_2_available

sys.path.insert(0, str(Path(__file__).parent.parent))
from rest_rl.evaluate.shared_attention import ATTENTION, Segment, attend
from rest_rl.runlog import read_run
from rest_rl.train.policy import quiet_transformers
from tests.architectures import published_config
from tests.test_shared_prompts import distance, make_trainer, ragged_batch, random_llama
from tests.tiny_policy import tiny_tokenizer

MAX_DISTANCE, MAX_NOISE_RATIO = 1e-5, 3
PADDING = 70  # more columns than a tile of an attention kernel has: sums are computed in another order
RUN_SECONDS = 90  # what part 2 leaves for part 3


class Report:
    """Prints rows as tables, one per part, and keeps the file up to date: a run that is killed leaves its rows."""

    def __init__(self, path: Path, device: torch.device, minutes: float) -> None:
        self.path, self.end = path, time.monotonic() + 60 * minutes
        self.data: dict[str, Any] = {"date": datetime.now(timezone.utc).isoformat(timespec="minutes")}
        self.data["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.data |= {library: version(library) for library in ("torch", "transformers", "trl")}
        print(", ".join(f"{key} {value}" for key, value in self.data.items()))

    def add(self, part: str, row: dict[str, Any]) -> None:
        if part not in self.data:
            print(f"\n{part}\n\n| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        self.data.setdefault(part, []).append(row)
        print("| " + " | ".join(map(_show, row.values())) + " |", flush=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_show, value))
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def make_checked_trainer(model: nn.Module, device: torch.device, **settings: Any) -> Any:
    settings["use_cpu"] = device.type == "cpu"
    trainer = make_trainer(model, tiny_tokenizer(), tempfile.mkdtemp(), **settings)
    if trainer.not_shared:
        raise RuntimeError(f"prompts are not shared: {trainer.not_shared}")
    trainer.model.train()
    return trainer


# Part 1

LORA = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, checkpointing": {},
    "fp32, LoRA": LORA,
    "bf16": {"bf16": True},
    "bf16, checkpointing, LoRA": {"bf16": True, **LORA},
}


def small_llama() -> nn.Module:
    model = random_llama(tiny_tokenizer())
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data *= 0.5  # with the full size, rounding to bf16 changes log-probabilities by more than 0.1
    return model


def compute_figures(device: torch.device, case: str, groups: str, padding: int = 0, **changes: Any) -> Any:
    """Return log-probabilities, entropies and gradients of the ragged batch with more columns of padding."""
    trainer = make_checked_trainer(small_llama(), device, **{"share_prompts": False, **CASES[case], **changes})
    model = trainer.model
    if "checkpointing" in case:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask, T = ragged_batch(model.config.vocab_size)
    ids, mask = (nn.functional.pad(x, (padding, 0)).to(device) for x in (ids, mask))
    chunks = {"batch_size": 2 if groups == "split" else None, "compute_entropy": True}
    figures = trainer._get_per_token_logps_and_entropies(model, ids, mask, T, **chunks)  # noqa: SLF001
    logps_BT, entropies_BT = (figure.float() * mask[:, -T:] for figure in figures[:2])
    (logps_BT * torch.randn(logps_BT.shape, generator=torch.Generator().manual_seed(4)).to(device)).sum().backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}
    return logps_BT.detach(), entropies_BT.detach(), gradients


def compare_with_stock(device: torch.device, case: str, groups: str) -> dict[str, Any]:
    compute = partial(compute_figures, device, case, groups)
    stock, padded, shared, exact = compute(), compute(PADDING), compute(share_prompts=True), compute(bf16=False)
    return {
        "case": case,
        "groups": groups,
        "log-probability": (shared[0] - stock[0]).abs().max().item(),
        "entropy": (shared[1] - stock[1]).abs().max().item(),
        "gradient": distance(shared[2], stock[2]),
        "stock, padded": distance(padded[2], stock[2]),
        "stock from fp32": distance(stock[2], exact[2]),
        "shared from fp32": distance(shared[2], exact[2]),
    }


def is_equal(row: dict[str, Any]) -> bool:
    floor = max(row["stock, padded"], row["stock from fp32"])
    return row["gradient"] <= (MAX_NOISE_RATIO * floor if "bf16" in row["case"] else MAX_DISTANCE)


def check_equality(report: Report, device: torch.device) -> bool:
    for case, groups in product(CASES, ("whole", "split")):
        row = compare_with_stock(device, case, groups)
        report.add("equality", row | {"passed": is_equal(row)})
    return all(row["passed"] for row in report.data["equality"])


# Part 2. The candidate: one variable-length call for all pieces of a packed row, each with the keys of its path.


@lru_cache(maxsize=4)
def gather_paths(segments: tuple[Segment, ...], device: torch.device) -> tuple[Any, ...]:
    """Return positions of the keys that each piece sees, bounds of the pieces and of their keys, and the longest."""
    pieces, lengths, index = [0], [0], list[int]()
    for start, middle, ends in segments:
        for begin, end in [(start, middle), *pairwise((middle, *ends))]:
            if end > begin:
                path = [*range(start, middle), *range(max(begin, middle), end)]
                index.extend(path)
                pieces.append(end - begin)
                lengths.append(len(path))
    bounds = (torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32) for sizes in (pieces, lengths))
    return torch.tensor(index, device=device), *bounds, max(pieces), max(lengths)


def attend_varlen(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
    """Compute `attend` with one call per layer; the keys of a prompt are gathered for each response."""
    if kwargs.get("segments") is None:
        return attend(module, query, key, value, mask, **kwargs)
    index, *bounds = gather_paths(tuple(kwargs["segments"]), query.device)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    call = call_varlen if query.is_cuda else loop_varlen
    return call(query, key[index], value[index], *bounds, scale=kwargs["scaling"])[None], None


def call_varlen(query: Tensor, key: Tensor, value: Tensor, *bounds: Any, scale: float) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": scale, "window_size": (-1, 0), "is_causal": True, "enable_gqa": True}
    known = inspect.signature(varlen_attn).parameters  # they differ between versions of torch
    return varlen_attn(query, key, value, *bounds, **{name: options[name] for name in options if name in known})


def loop_varlen(query: Tensor, key: Tensor, value: Tensor, *bounds: Any, scale: float) -> Tensor:
    outputs = []  # on a CPU, torch has no such call
    for (a, b), (c, d) in zip(*(pairwise(limits.tolist()) for limits in bounds[:2]), strict=True):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        states = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        outputs.append(sdpa(*states, attn_mask=mask, scale=scale, enable_gqa=True))
    return torch.cat(outputs, 1).transpose(0, 1)


IMPLEMENTATIONS = {"stock, sdpa": "sdpa", "stock, flash": "flash_attention_2"}
IMPLEMENTATIONS |= {"shared, loop": ATTENTION, "shared, varlen": ATTENTION}
COLUMNS = ("P", "checkpointing", "variant", "ms", "range", "peak GiB", "note", "times", "log-probability", "gradient")


def time_loss(trainer: Any, ids: Tensor, T: int) -> tuple[float, float | None, Tensor, Tensor]:
    """Return milliseconds and peak GiB of a forward and backward pass, log-probabilities and one gradient."""
    trainer.model.zero_grad(set_to_none=True)
    if ids.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start, mask = time.perf_counter(), torch.ones_like(ids)
    logps_BT = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, T, compute_entropy=True)[0]  # noqa: SLF001
    (logps_BT * torch.linspace(-1, 1, logps_BT.numel(), device=ids.device).view_as(logps_BT)).sum().backward()
    if ids.is_cuda:
        torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30 if ids.is_cuda else None
    weight = trainer.model.model.layers[0].self_attn.k_proj.weight
    return 1000 * seconds, peak, logps_BT.detach().float(), weight.grad


def measure_variant(trainer: Any, variant: str, ids: Tensor, T: int, repeats: int) -> tuple[list[Any], Any]:
    try:
        if variant == "stock, flash" and not is_flash_attn_2_available():  # transformers would try to download it
            raise RuntimeError("flash_attn is not installed")
        trainer.model.set_attn_implementation(IMPLEMENTATIONS[variant])
        AttentionInterface.register(ATTENTION, attend_varlen if variant == "shared, varlen" else attend)
        passes = [time_loss(trainer, ids, T) for _ in range(1 + repeats)][1:]
    except Exception as error:  # whatever kernels raise; out of memory among them
        return [None, None, None, f"{type(error).__name__}: {error}".splitlines()[0][:80]], None
    finally:
        AttentionInterface.register(ATTENTION, attend)
    times = [one[0] for one in passes]
    return [statistics.median(times), [min(times), max(times)], passes[-1][1], None], passes[-1][2:]


def make_speed_trainer(device: torch.device) -> Any:
    if device.type == "cpu":
        return make_checked_trainer(random_llama(tiny_tokenizer()), device)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(published_config("Qwen/Qwen3-1.7B"), dtype=torch.bfloat16)
    return make_checked_trainer(model, device, bf16=True)


def measure_speed(report: Report, device: torch.device) -> bool:
    trainer, tiny = make_speed_trainer(device), device.type == "cpu"
    (G, T, repeats), prompt_lengths = ((4, 6, 1), (12,)) if tiny else ((8, 200, 3), (300, 1500, 4000))
    references, stock_ms = dict[int, Any](), dict[Any, float]()
    for P, checkpointing, variant in product(prompt_lengths, (False, True), IMPLEMENTATIONS):
        figures, last = [None, None, None, "skipped: no time left"], None
        if report.end - time.monotonic() > RUN_SECONDS:
            torch.manual_seed(P)
            prompt, responses = (torch.randint(3, trainer.model.config.vocab_size, shape) for shape in ((1, P), (G, T)))
            ids = torch.cat([prompt.expand(G, -1), responses], 1).to(device)
            trainer.model.gradient_checkpointing_disable()
            if checkpointing:
                trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
            figures, last = measure_variant(trainer, variant, ids, T, repeats)
        row: dict[str, Any] = dict(zip(COLUMNS, (P, checkpointing, variant, *figures, *3 * [None]), strict=True))
        if last is not None:
            logps, gradient = references.setdefault(P, last)
            if variant == "stock, sdpa":
                stock_ms[P, checkpointing] = row["ms"]
            if stock := stock_ms.get((P, checkpointing)):
                row["times"] = stock / row["ms"]
            row["log-probability"] = (last[0] - logps).abs().max().item()
            row["gradient"] = distance({"k": last[1].float()}, {"k": gradient.float()})
        report.add("speed", row)
        gc.collect()  # what an exception kept
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


# Part 3


def train_embedded(report: Report, device: torch.device) -> bool:
    kinds, changes = ("GPU", "CPU"), ["trl.max_steps=3"]
    if device.type == "cpu":
        kinds, changes = ("CPU",), ["trl.max_steps=1", "trl.per_device_train_batch_size=16"]
    for kind in kinds:
        folder, start = Path(tempfile.mkdtemp()) / "run", time.monotonic()
        settings = [*changes, f"trl.use_cpu={str(kind == 'CPU').lower()}", "rest.share_prompts=true", "eval.prompts=16"]
        command = [sys.executable, "-m", "rest_rl", "train", "--out", str(folder)]
        command += [word for setting in settings for word in ("--set", setting)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        limit = max(10.0, report.end - time.monotonic())
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
        output = done.stdout + done.stderr
        if done.returncode or "not shared" in output:
            raise RuntimeError(f"{kind}, exit status {done.returncode}:\n{output[-2000:]}")
        steps = [step for step in read_run(folder).metrics if "grad_norm" in step]
        figures = {f"{name} per step": [step[name] for step in steps] for name in ("reward", "grad_norm")}
        report.add("run", {"device": kind, **figures, "seconds": time.monotonic() - start})
    return True


def attempt(part: Callable[[Report, torch.device], bool], report: Report, device: torch.device) -> bool:
    try:  # one part's failure must not cost the figures of the others
        return part(report, device)
    except Exception:
        traceback.print_exc()
        return False


@quiet_transformers()
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--minutes", type=float, default=9, help="skip what does not fit (default: %(default)s)")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 3], choices=(1, 2, 3))
    parser.add_argument("--out", type=Path, required=True, help="JSON file with all rows")
    options = parser.parse_args(arguments)
    if not options.tiny:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with several GPUs, the trainer would split its batches
        if not torch.cuda.is_available():
            parser.error("no CUDA device; --tiny runs on the CPU")
    warnings.simplefilter("ignore")
    device = torch.device("cpu" if options.tiny else "cuda:0")
    report = Report(options.out, device, options.minutes)
    parts = [check_equality, measure_speed, train_embedded]
    passed = [attempt(parts[part - 1], report, device) for part in options.parts]
    report.add("summary", {"passed": all(passed)})
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
