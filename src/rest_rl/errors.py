"""The exception for mistakes that the user can fix. This module imports nothing from the package."""

from __future__ import annotations

import warnings


class RenamedWarning(FutureWarning):
    """Warns about a deprecated name; the message names its replacement. The command prints it as one line."""


def describe_renaming(old: str, new: str) -> str:
    """Return the text of the warning about a deprecated name."""
    return f"{old} has been renamed to {new}; the old name still works"


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
        warnings.warn(describe_renaming("UserError.got", "UserError.problem"), RenamedWarning, stacklevel=2)
        return self.problem
