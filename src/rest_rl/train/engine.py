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
    """Where an engine stopped training: the number of finished steps, and whether it was interrupted before the end."""

    step: int
    is_interrupted: bool = False


# Called with the number of finished steps before the last of them is logged and saved; returns the evaluation that it
# made. It must change neither the model nor the random state, or a resumed run would differ.
AfterStep = Callable[[int], "Row | None"]


class Engine(Protocol):
    """A training backend; the workflow in `train/run.py` calls these methods in this order.

    The constructor `(config, layout, observer)` and `prepare` raise a UserError for every mistake of the user that they
    can find. A new run folder is created only after both have succeeded.
    """

    @property
    def max_response_tokens(self) -> int:
        """The maximum number of tokens of a sampled response; 1 for supervised training, which samples no responses."""
        ...

    def find_resume_point(self, log: RunLog) -> tuple[Checkpoint, list[str]]:
        """Return the newest complete checkpoint of a run folder and the names of newer incomplete ones."""
        ...

    def prepare(self, data: TrainingData, log: RunLog, checkpoint: Checkpoint) -> Checkpoint:
        """Check the data and settings and load what training needs; write nothing to `log.folder`.

        Pass samples that the engine cannot train on to `data.reject`. Return the checkpoint with `is_last` corrected.
        """
        ...

    def start(self, log: RunLog) -> None:
        """Create the trainer or write its input files; `log` is open and has no rows of later steps."""
        ...

    def evaluate(self, prompts: Sequence[HeldOutPrompt]) -> Mapping[str, Any] | None:
        """Return the current policy's scores on the prompts, or None if the engine cannot evaluate on request."""
        ...

    def run(self, after_step: AfterStep) -> StopPoint:
        """Train from the checkpoint to the last step; return at once if the run has finished training.

        Call `after_step` after every step, unless the engine runs interim evaluations itself.
        """
        ...

    def save_model(self) -> None:
        """Save the trained model (only the adapter if the run trains one) and the tokenizer to `log.model`."""
        ...
