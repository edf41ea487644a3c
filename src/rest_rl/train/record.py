"""Record responses for responses.jsonl: text, score, and the values computed in the loss for each token.

A row is created when its generation batch is complete and written when the loss has computed the token values. In
between, TRL shuffles and splits the batch; the column `RESPONSE_INDEX` carries each response's number along. With
resampling, a batch is scored in several calls, and the number counts the responses of all calls.

Shapes: B responses of a micro-batch, T completion tokens.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rest_rl.evaluate.generate import has_ended
from rest_rl.formats import ToolFormat
from rest_rl.regions import decode_ids, token_char_lengths
from rest_rl.runlog import Row
from rest_rl.train.reward import compute_progress, get_stop_ids

# Key of the response numbers in TRL's batch; TRL shuffles and splits every tensor of the batch by its first axis.
RESPONSE_INDEX = "response_index"
# Decimal places of weights, entropies, log-probabilities and advantages in responses.jsonl.
DECIMALS = 4


@dataclass(frozen=True, eq=False)
class WeightedBatch:
    """The values that the loss used for one micro-batch; `indices_B` are the responses' numbers (`RESPONSE_INDEX`)."""

    indices_B: Tensor
    regions_BT: Tensor
    weights_BT: Tensor
    entropies_BT: Tensor
    logps_BT: Tensor
    advantages_B: Tensor  # before weighting; (B, T) with credit per turn

    def token_fields(self, row: int, length: int) -> Row:
        """Return the values of one row, a response of `length` tokens, as fields of responses.jsonl."""
        values = {"weights": self.weights_BT, "entropies": self.entropies_BT, "logps": self.logps_BT}
        own = self.advantages_B[row]
        return {
            **({"advantages": round_values(own[:length])} if own.ndim else {"advantage": round(float(own), DECIMALS)}),
            "regions": self.regions_BT[row, :length].tolist(),
            **{name: round_values(values_BT[row, :length]) for name, values_BT in values.items()},
        }


class ResponseRecord:
    """Collects the first `limit` rows of each generation batch and passes them, with the batch's first step, to `keep`.

    Steps count from 1.
    """

    def __init__(self, keep: Callable[[int, Sequence[Row]], None], limit: int) -> None:
        self.keep, self.limit = keep, limit
        self._scored: list[Callable[[], Row]] = []
        self._rows: dict[int, Row] = {}
        self._waiting: set[int] = set()

    def add_scored(self, makers: Iterable[Callable[[], Row]]) -> None:
        """Add scored responses of the batch that is being generated, as functions that make their rows."""
        self._scored += makers

    def start_batch(self, indices_B: Tensor) -> None:
        """Flush the previous batch if it is incomplete, then start one of the scored responses with these numbers."""
        self.flush()
        makers, self._scored = self._scored, []
        self._rows = {index: makers[index]() for index in indices_B[: self.limit].tolist()}
        self._waiting = set(self._rows)

    def add_token_fields(self, batch: WeightedBatch) -> None:
        """Add the token values of a micro-batch, and flush if all are known. Later passes over a batch are ignored."""
        for row_number, index in enumerate(batch.indices_B.tolist()):
            if index in self._waiting:
                row = self._rows[index]
                row.update(batch.token_fields(row_number, len(row["ids"])))
                self._waiting.remove(index)
        if not self._waiting:
            self.flush()

    def flush(self) -> None:
        """Pass the rows to `keep`, even if some have no token values yet."""
        rows, self._rows, self._waiting = list(self._rows.values()), {}, set()
        if rows:
            self.keep(rows[0]["step"], rows)


class FlushAtEnd(TrainerCallback):
    """Flushes the record at the end of training, because the last batch may not have been trained on completely."""

    def __init__(self, record: ResponseRecord) -> None:
        self.record = record

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.record.flush()


def with_response_record(
    reward: Callable[..., list[float]],
    tokenizer: Any,
    tool_format: ToolFormat,
    record: ResponseRecord,
    ends: Collection[int] | None = None,
    progress_steps: int = 0,
) -> Callable[..., list[float]]:
    """Wrap a reward function so that it also passes the responses that it scores to `record`."""
    ends = get_stop_ids(tokenizer) if ends is None else ends

    @functools.wraps(reward)  # TRL names its metrics after the function
    def recorded(
        completion_ids: list[list[int]], gold: list[Any], trainer_state: Any = None, **columns: Any
    ) -> list[float]:
        totals = reward(completion_ids=completion_ids, gold=gold, trainer_state=trainer_state, **columns)
        step, progress = trainer_state.global_step + 1, compute_progress(trainer_state, progress_steps)
        prompts = columns.get("prompts")

        def make_row(i: int) -> Row:
            row = {"step": step, "progress": progress, "id": columns["id"][i]}
            row |= make_response_row(completion_ids[i], json.loads(gold[i]), totals[i], tokenizer, tool_format, ends)
            is_first = i == 0 or columns["id"][i - 1] != row["id"]  # a group shares its prompt
            if is_first and prompts and isinstance(prompts[i], str):
                row["prompt"] = prompts[i]
            return row

        record.add_scored(functools.partial(make_row, i) for i in range(len(completion_ids)))
        return totals

    return recorded


def make_response_row(
    ids: Sequence[int], gold: Any, reward: float, tokenizer: Any, tool_format: ToolFormat, ends: Collection[int]
) -> Row:
    """Return the fields of responses.jsonl that are known as soon as a response is scored."""
    return {
        "response": decode_ids(ids, tokenizer, tool_format.tags),
        "ids": list(ids),
        "gold": gold,
        "reward": reward,
        "truncated": not has_ended(ids, ends),
        "lengths": token_char_lengths(ids, tokenizer, tool_format.tags),
    }


def round_values(values_T: Tensor) -> list[float]:
    return [round(value, DECIMALS) for value in values_T.double().tolist()]
