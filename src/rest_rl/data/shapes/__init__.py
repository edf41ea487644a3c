"""Row shapes convert the rows of published data sets, and of your own, to dialogues or samples.

A shape is an object (the built-in ones are modules) with three parts:

* `name`: its name in `--source` and in reports;
* `matches(row) -> bool`: a function that checks by the keys whether a row has this shape;
* `read(row, context)`: a function that returns `Dialogue`s (one sample per assistant turn) or samples. Report problems
  with `context.note(reason, detail)`, and raise `RowRejectedError(reason, detail)` if the row gives no sample.
  `context.id` is the id for the row's sample; `context.keep_prompts` means that published prompts stay as they are.

`SHAPES` is the table of all built-in shapes. Pass your own as `package.module:OBJECT` wherever a source is expected.
Your shape then reads the rows that match it, and the built-in shapes read all others.
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
    """Converts the rows of one data set to dialogues or samples."""

    @property
    def name(self) -> str:
        """Name of the shape in `--source` and in reports."""
        ...

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row has this shape."""
        ...

    def read(self, row: Mapping[str, Any], context: RowContext) -> Iterable[Dialogue | ToolSample]:
        """Return the dialogues or samples of a row; raise RowRejectedError if it gives none."""
        ...


_ALL: tuple[RowShape, ...] = (own, toolace, chat, xlam, api_bank, api_bank_train, toolrl)
SHAPES: dict[str, RowShape] = {shape.name: shape for shape in _ALL}
"""The built-in shapes by name; the first one that matches a row reads it."""
BENCHMARKS = (api_bank.name,)
"""Shapes of benchmarks. Their rows' defects are reported, never repaired: published results include these defects."""


def get_shapes(source: str | RowShape) -> tuple[RowShape, ...]:
    """Return the shapes to try for each row, in order.

    Args:
        source: `auto` for all built-in shapes, a name in SHAPES for only this shape, or your own shape (an object or
            `package.module:OBJECT`), which is then tried before the built-in shapes.

    Raises:
        UserError: There is no such shape, or the object is not a shape.
    """
    if source == AUTO:
        return _ALL
    if isinstance(source, str):
        if source in SHAPES:
            return (SHAPES[source],)
        if ":" not in source:
            names = f"{AUTO}, {', '.join(SHAPES)} or package.module:OBJECT"
            raise UserError(f"source is {source!r}", names)
    shape: Any = load_object(source, "row shape") if isinstance(source, str) else source
    missing = [part for part in ("name", "matches", "read") if not hasattr(shape, part)]
    if missing or isinstance(shape, type):
        found = "is a class" if isinstance(shape, type) else f"lacks the attributes {', '.join(map(repr, missing))}"
        raise UserError(f"row shape {source!r} {found}", "an object with name, matches and read", "see docs/data.md")
    check_signature(shape.matches, f"matches of row shape {source!r}", "row")
    check_signature(shape.read, f"read of row shape {source!r}", "row", "context")
    return (shape, *_ALL)


def find_shape(row: Mapping[str, Any], shapes: tuple[RowShape, ...]) -> RowShape | None:
    """Return the first shape that matches a row; a single shape is returned without a check."""
    return shapes[0] if len(shapes) == 1 else next((shape for shape in shapes if shape.matches(row)), None)
