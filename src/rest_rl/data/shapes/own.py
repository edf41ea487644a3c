"""Rows that `rest-rl data convert` wrote; in Parquet files, nested fields are JSON text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rest_rl.data.reading import load_json
from rest_rl.data.reasons import RowContext, RowRejectedError
from rest_rl.data.samples import ToolSample, from_json
from rest_rl.data.schemas import read_tools
from rest_rl.data.shapes.chat import order_results
from rest_rl.errors import UserError

name = "samples"


def matches(row: Mapping[str, Any]) -> bool:
    return {"messages", "gold"} <= set(row)


def read(row: Mapping[str, Any], context: RowContext) -> list[ToolSample]:
    row = {"id": context.id, **row}
    for key in ("messages", "tools", "gold"):
        if isinstance(row.get(key), str):
            try:
                row[key] = load_json(row[key])
            except ValueError as error:
                raise RowRejectedError("bad_row", f"{key} is text that is not JSON ({error})") from error
    read_tools(row.get("tools"))
    try:
        sample = from_json(row)
    except UserError as error:
        raise RowRejectedError("bad_row", str(error)) from error
    return [replace(sample, messages=tuple(order_results(sample.messages, context)))]
