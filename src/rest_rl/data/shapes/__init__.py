"""The shapes of rows: how each published data set, and one of your own, becomes dialogues or samples.

A shape is an object (or a module, as all of ours are) with three parts:

* `name`: how `--source` and reports call it;
* `matches(row) -> bool`: whether a row has this shape, told by its keys;
* `read(row, context) -> dialogues or samples` of the row. A `Dialogue` becomes one sample per assistant turn. What is
  odd about the row goes to `context.note(reason, detail)`; `RowRejectedError(reason, detail)` says that it gives
  nothing. `context.id` is the id for its sample, and `context.keep_prompts` that published prompts stay as they are.

`SHAPES` is the only table of them. A shape of your own is named `package.module:OBJECT` wherever a source is: rows that
it matches are read by it, and the others as under `auto`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from rest_rl.data.reasons import RowContext, RowRejectedError
from rest_rl.data.samples import Dialogue, ToolSample
from rest_rl.data.shapes import api_bank, api_bank_train, chat, own, toolace, toolrl, xlam
from rest_rl.errors import UserError
from rest_rl.objects import check_signature, load_object

__all__ = ["AUTO", "BENCHMARKS", "SHAPES", "RowContext", "RowRejectedError", "RowShape", "find_shape", "get_shapes"]
AUTO = "auto"


class RowShape(Protocol):
    """How the rows of one data set become dialogues or samples."""

    @property
    def name(self) -> str:
        """How `--source` and reports call it."""
        ...

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has this shape."""
        ...

    def read(self, row: Mapping[str, Any], context: RowContext) -> Iterable[Dialogue | ToolSample]:
        """The dialogues or samples of a row; RowRejectedError for a row that gives none."""
        ...


_ALL: tuple[RowShape, ...] = (own, toolace, chat, xlam, api_bank, api_bank_train, toolrl)
SHAPES: dict[str, RowShape] = {shape.name: shape for shape in _ALL}
"""The built-in shapes by name; the first that matches a row reads it."""
BENCHMARKS = (api_bank.name,)
"""Test sets: their defects are told and left as they are, for every published figure includes them."""


def get_shapes(source: str | RowShape) -> tuple[RowShape, ...]:
    """The shapes that a row may have: `source` is `auto`, a name in SHAPES, `package.module:OBJECT` or an object.

    A built-in shape that is named is the only one, a shape of your own stands before all built-in ones.

    Raises:
        UserError: there is no such shape, or the object is none.
    """
    if source == AUTO:
        return _ALL
    if isinstance(source, str):
        if source in SHAPES:
            return (SHAPES[source],)
        if ":" not in source:
            names = f"{AUTO}, one of {', '.join(SHAPES)}, or package.module:OBJECT"
            raise UserError(f"source {source!r}", names, "name one of them")
    shape: Any = load_object(source, "row shape") if isinstance(source, str) else source
    missing = [part for part in ("name", "matches", "read") if not hasattr(shape, part)]
    if missing or isinstance(shape, type):
        got = "a class" if isinstance(shape, type) else f"an object without {', '.join(missing)}"
        raise UserError(f"row shape {source!r}, {got}", "an object with name, matches and read", "see docs/data.md")
    check_signature(shape.matches, f"matches of row shape {source!r}", "row")
    check_signature(shape.read, f"read of row shape {source!r}", "row", "context")
    return (shape, *_ALL)


def find_shape(row: Mapping[str, Any], shapes: tuple[RowShape, ...]) -> RowShape | None:
    """The only shape, or the first that matches a row."""
    return shapes[0] if len(shapes) == 1 else next((shape for shape in shapes if shape.matches(row)), None)
