"""What trains a run: the protocol that the workflow of `train/run.py` drives, once for TRL and once for verl."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from rest_rl.runlog import Row, RunLog
from rest_rl.train.checkpoints import Checkpoint

if TYPE_CHECKING:
    from rest_rl.evaluate.held_out import HeldOutPrompt
    from rest_rl.train.prompts import TrainingData


class StopPoint(NamedTuple):
    """Where an engine stopped: the number of finished steps, and whether it was interrupted before the last one."""

    step: int
    is_interrupted: bool = False


AfterStep = Callable[[int], "Row | None"]
"""Called with the number of finished steps, before that step is logged and saved; returns the evaluation it made.

It changes neither model nor random state.
"""


class Engine(Protocol):
    """The workflow calls these methods in this order.

    The constructor `(config, layout, observer)` and `prepare` raise a UserError for whatever a user can have got wrong;
    the run folder is only made after them.
    """

    @property
    def max_response_tokens(self) -> int:
        """Tokens of the longest response that training samples; 1 where it samples none."""
        ...

    def find_resume_point(self, log: RunLog) -> tuple[Checkpoint, list[str]]:
        """The newest whole checkpoint of a run folder and the names of newer broken ones."""
        ...

    def prepare(self, data: TrainingData, log: RunLog, checkpoint: Checkpoint) -> Checkpoint:
        """Load and check everything; nothing is written to `log.folder`.

        Samples that the engine cannot train on are given to `data.reject`. Returns the checkpoint with `is_last` known.
        """
        ...

    def start(self, log: RunLog) -> None:
        """The run folder is open, and cut back to the checkpoint: get ready to train."""
        ...

    def evaluate(self, prompts: Sequence[HeldOutPrompt]) -> Mapping[str, Any] | None:
        """Scores of the policy as it is now; None where the engine measures by itself or cannot measure in the run."""
        ...

    def run(self, after_step: AfterStep) -> StopPoint:
        """Train from the checkpoint to the last step; return at once if the checkpoint is the last step's.

        An engine that measures by itself does not call `after_step`.
        """
        ...

    def save_model(self) -> None:
        """Put the trained model, or its adapter, and its tokenizer into `log.model`."""
        ...
