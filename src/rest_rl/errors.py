"""The exception for mistakes that the user can fix. This module imports nothing from the package."""

from __future__ import annotations

import warnings
from collections.abc import Mapping


class RenamedWarning(FutureWarning):
    """Warns about a deprecated name; the message names its replacement. The command prints it as one line."""


def warn_renamed(old: str, new: str, *, stacklevel: int = 2) -> None:
    """Warn about a deprecated name; a `stacklevel` of 2 points at the caller of the function that calls this."""
    warnings.warn(f"{old} has been renamed to {new}; the old name still works", RenamedWarning, stacklevel + 1)


class UserError(ValueError):
    """A mistake that the user can fix.

    The command prints it as one line and exits with code 2. Any other exception is a bug and keeps its traceback.

    Args:
        problem: What is wrong, with the offending value quoted: "trl.learning_rate is -1".
        expected: What would have been right, as a noun phrase: "a number above 0".
        remedy: What to do, as an imperative: "change it in run.toml".
    """

    def __init__(self, problem: str, expected: str = "", remedy: str = "") -> None:
        super().__init__(problem, expected, remedy)
        self.problem, self.expected, self.remedy = problem, expected, remedy

    def __str__(self) -> str:
        return self.problem + (self.expected and f", expected {self.expected}") + (self.remedy and f"; {self.remedy}")

    @property
    def got(self) -> str:
        """Deprecated name of `problem`."""
        warn_renamed("UserError.got", "UserError.problem")
        return self.problem


def check_minimums(minimums: Mapping[str, tuple[int | None, int]]) -> None:
    """Raise UserError for the first name whose (value, minimum) has a value that is too small; None always passes."""
    for name, (value, minimum) in minimums.items():
        if value is not None and value < minimum:
            raise UserError(f"{name} is {value}", f"at least {minimum}", "raise it")
