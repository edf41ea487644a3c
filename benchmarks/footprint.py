"""Compare the memory estimate with real training steps on the CPU, counting the bytes of all live tensors.

Each row trains a model of some tens of millions of parameters for two optimizer steps with TRL's GRPOTrainer (two
micro-batches per step, `model.generate`) and prints the measured peaks of update and generation relative to the
estimate. It counts tensor storages, not the memory of the process: no allocator, library buffers or fragmentation. With
--published it counts a forward and backward pass of the published architectures with fake tensors, which have no
storage and take seconds; optimizer states are left out on both sides.

python benchmarks/footprint.py
python benchmarks/footprint.py --published
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from rest_rl.config import RunConfig
from rest_rl.train.estimate import estimate_resources
from rest_rl.train.trl.trainer import ResTConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.architectures import NUM_PARAMETERS, published_config

VOCABULARY = 8192
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
MODELS = {"qwen3": Qwen3Config, "llama": LlamaConfig}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage returned by an operation until the storage is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                self.add(value)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001
        if key not in self.seen and tensor.device.type == "cpu":
            self.seen.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            # `_cdata` identifies a storage across views; it can be reused only after this callback has dropped it.
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class MeasuredTrainer(GRPOTrainer):
    """Records the peak of generation, and the peak from the loss to the end of the step."""

    live: LiveBytes
    peaks: dict[str, int]

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.live.peak = self.live.now
        yield
        self.peaks[name] = max(self.peaks.get(name, 0), self.live.peak)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.phase("generation"):
            return super()._generate(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().training_step(*args, **kwargs)
        self.peaks["update"] = max(self.peaks.get("update", 0), self.live.peak)
        return result

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        # Restart the peak here: generation and rewards before the loss are measured separately.
        self.live.peak = self.live.now
        return super().compute_loss(*args, **kwargs)


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def measure(row: dict[str, Any], prompt: int, completion: int, batch: int, layers: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model_config = MODELS[row["model"]](
        **SIZES, vocab_size=VOCABULARY, num_hidden_layers=layers, head_dim=64, eos_token_id=1, pad_token_id=0
    )
    model_config.tie_word_embeddings = row["tied"]
    args = ResTConfig(
        output_dir=folder,
        preset="grpo",
        max_steps=2,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        num_generations=batch,
        max_completion_length=completion,
        generation_kwargs={"min_new_tokens": completion},
        gradient_checkpointing=row["checkpointing"],
        bf16=row["autocast"],
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        optim="adamw_torch",
        optim_args="foreach=False",
    )
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if row["lora"] else None
    live = LiveBytes()
    with live:
        model = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, row["dtype"]))
        for tensor in [*model.parameters(), *model.buffers()]:
            live.add(tensor)
        text = " ".join(f"w{i + 2}" for i in range(prompt))
        trainer = MeasuredTrainer(
            model=model,
            args=args,
            reward_funcs=lambda completions, **_: [float(i % 3) for i in range(len(completions))],
            train_dataset=Dataset.from_list([{"prompt": text}] * 8),
            processing_class=build_tokenizer(),
            peft_config=lora,
        )
        trainer.live, trainer.peaks = live, {}
        trainer.train()
    config = RunConfig.from_toml(f'[model]\ndtype = "{row["dtype"]}"\n[eval]\nprompts = 0\n')
    estimated = estimate_resources(config, model_config, args, lora=lora, prompt_tokens=[prompt] * 8, device=None)
    return {"measured": trainer.peaks, "estimated": estimated}


# Replace the meta tensors of a model by fake CPU tensors, and count their bytes.
@contextlib.contextmanager
def without_storage(model: Any) -> Iterator[LiveBytes]:
    with FakeTensorMode(), LiveBytes() as live:
        for module in model.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:  # noqa: SLF001
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_parameter = name in module._parameters  # noqa: SLF001
                    kept = torch.nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    (module._parameters if is_parameter else module._buffers)[name] = kept  # noqa: SLF001
        yield live


# Return (counted, estimated) bytes of two forward and backward passes under bfloat16 autocast.
def count_published(name: str, *, lora: Any, checkpointing: bool, batch: int, tokens: int) -> tuple[int, int]:
    dtype = "bfloat16" if lora else "float32"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(published_config(name), dtype=getattr(torch, dtype))
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    model = get_peft_model(model, lora) if lora else model
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    with without_storage(model) as live:
        model.get_base_model().tie_weights() if lora else model.tie_weights()
        ids = torch.zeros(batch, tokens, dtype=torch.long)
        # The first pass allocates the gradients; the second one shows the peak of a steady state.
        for _ in range(2):
            live.peak = live.now
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).loss
            loss.backward()
            del loss
    args = ResTConfig(
        output_dir="unused",
        per_device_train_batch_size=batch,
        num_generations=batch,
        max_completion_length=tokens // 2,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        report_to=[],
    )
    config = RunConfig.from_toml(f'[model]\ndtype = "{dtype}"\n[eval]\nprompts = 0\n')
    guess = estimate_resources(
        config, published_config(name), args, lora=lora, prompt_tokens=[tokens - tokens // 2] * batch
    )
    states = sum(part.bytes for part in guess.parts if part.name == "optimizer states")
    return live.peak, guess.phase_bytes("update") - states


def print_published(batch: int, tokens: int) -> None:
    print(f"{batch} sequences of {tokens} tokens, GiB counted / estimated")
    for name in NUM_PARAMETERS:
        for is_adapter, checkpointing in itertools.product((True, False), (True, False)):
            lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if is_adapter else None
            real, guess = count_published(name, lora=lora, checkpointing=checkpointing, batch=batch, tokens=tokens)
            kind = f"{'LoRA on bfloat16' if lora else 'all, float32'}{', checkpointing' * checkpointing}"
            print(f"{name:<36} {kind:<32} {real / 2**30:6.1f} / {guess / 2**30:6.1f} = {real / guess:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"prompt": 448, "completion": 64, "batch": 4, "layers": 12}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--published", action="store_true")
    options = parser.parse_args()
    if options.published:
        print_published(options.batch, options.prompt + options.completion)
        return
    switches = dict.fromkeys(("autocast", "lora", "checkpointing"), False)
    base = {"model": "qwen3", "tied": True, "dtype": "float32", **switches}
    variants: list[dict[str, Any]] = [
        {},
        {"checkpointing": True},
        {"autocast": True},
        {"autocast": True, "checkpointing": True},
        {"dtype": "bfloat16", "autocast": True, "lora": True},
        {"dtype": "bfloat16", "autocast": True, "lora": True, "checkpointing": True},
        {"lora": True},
        {"model": "llama", "tied": False},
        {"model": "llama", "tied": False, "autocast": True, "checkpointing": True},
        {"model": "llama", "dtype": "bfloat16", "autocast": True, "lora": True},
    ]
    print(f"{'model':<64} {'update: measured / estimated':>34} {'generation':>34}")
    with tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            row = {**base, **variant}
            done = measure(row, options.prompt, options.completion, options.batch, options.layers, folder)
            gc.collect()
            cells = []
            for phase in ("update", "generation"):
                real, guess = done["measured"][phase], done["estimated"].phase_bytes(phase)
                cells.append(f"{real / 2**20:8.0f} / {guess / 2**20:6.0f} MiB = {real / guess:5.2f}")
            name = " ".join(f"{k}={v}" if not isinstance(v, bool) else k * v for k, v in row.items())
            print(f"{' '.join(name.split()):<64} {cells[0]:>34} {cells[1]:>34}", flush=True)


if __name__ == "__main__":
    main()
