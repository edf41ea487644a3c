"""What a user can have got wrong, as an exception of its own; imports nothing."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can fix: what was found, what was expected, and what to do about it.

    The command prints it as one line and exits with code 2. Everything else that is raised is a bug and keeps its
    traceback.
    """

    def __init__(self, got: str, expected: str, remedy: str) -> None:
        super().__init__(got, expected, remedy)
        self.got, self.expected, self.remedy = got, expected, remedy

    def __str__(self) -> str:
        return f"got {self.got}, expected {self.expected}; {self.remedy}"
