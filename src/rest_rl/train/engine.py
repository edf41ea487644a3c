"""The protocol of a training engine: `train/run.py` drives TRL and verl through the same methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rest_rl.runlog import Row, RunLog
from rest_rl.train.checkpoints import Checkpoint

if TYPE_CHECKING:
    from rest_rl.evaluate.held_out import HeldOutPrompt
    from rest_rl.train.prompts import TrainingData


class StopPoint(NamedTuple):
    """The number of finished steps when an engine returned, and whether it was interrupted before the last one."""

    step: int
    is_interrupted: bool = False


# Called with the number of finished steps before the last of them is logged and saved; returns the evaluation that it
# made. It must change neither the model nor the random state, or a resumed run would differ.
AfterStep = Callable[[int], "Row | None"]


class Engine(Protocol):
    """The workflow calls these methods in this order.

    The constructor `(config, layout, observer)` and `prepare` find every mistake of the user and raise a UserError. The
    run folder is created only after both have succeeded.
    """

    @property
    def max_response_tokens(self) -> int:
        """Tokens of the longest response that training samples; 1 if training samples none."""
        ...

    def find_resume_point(self, log: RunLog) -> tuple[Checkpoint, list[str]]:
        """Return the newest complete checkpoint of a run folder and the names of newer incomplete ones."""
        ...

    def prepare(self, data: TrainingData, log: RunLog, checkpoint: Checkpoint) -> Checkpoint:
        """Load and check everything; write nothing to `log.folder`.

        Passes samples that the engine cannot train on to `data.reject`. Returns the checkpoint with `is_last` set.
        """
        ...

    def start(self, log: RunLog) -> None:
        """Get ready to train; the run folder is open and has been truncated to the checkpoint."""
        ...

    def evaluate(self, prompts: Sequence[HeldOutPrompt]) -> Mapping[str, Any] | None:
        """Return the scores of the current policy; None if the engine runs its own evaluation or cannot do so here."""
        ...

    def run(self, after_step: AfterStep) -> StopPoint:
        """Train from the checkpoint to the last step; return at once if the checkpoint is of the last step.

        An engine that runs its own evaluation does not call `after_step`.
        """
        ...

    def save_model(self) -> None:
        """Save the trained model, or its adapter, and the tokenizer to `log.model`."""
        ...
