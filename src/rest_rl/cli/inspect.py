"""The verbs `inspect` and `presets`: what the method does to given tokens, and with which settings."""

from __future__ import annotations

import argparse
import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch

from rest_rl.cli.score import check_progress
from rest_rl.cli.terminal import show_tokens
from rest_rl.config import AUTO, preset_table
from rest_rl.data.layout import resolve_format
from rest_rl.errors import UserError
from rest_rl.formats import get_format
from rest_rl.jsonl import as_json, parse_row, read_lines, text_field
from rest_rl.presets import PRESETS, Preset, get_preset, token_weights
from rest_rl.regions import tag_regions, token_bytes
from rest_rl.response import Region
from rest_rl.train.policy import load_tokenizer


class Token(NamedTuple):
    """One token of an inspected response."""

    id: int
    text: str
    region: str
    weight: float


def presets(arguments: argparse.Namespace) -> int:
    """Print every preset as the tables of a run file, `[NAME.rest]` and so on, ready to paste without `NAME.`."""
    del arguments
    print(tomli_w.dumps({name: run_tables(preset) for name, preset in PRESETS.items()}).rstrip())
    return 0


def run_tables(preset: Preset) -> dict[str, Any]:
    """A preset as tables of a run file; the clip range is the trainer's."""
    table = preset_table(preset)
    clip = {"epsilon": table.pop("epsilon_low"), "epsilon_high": table.pop("epsilon_high")}
    return {"rest": {"preset": preset.name, **table}, "trl": clip}


def inspect(arguments: argparse.Namespace) -> int:
    """Print the tokens of each row with region and weight, coloured or as JSON."""
    preset = get_preset(arguments.preset)
    check_progress(arguments.progress)
    entropies = read_entropies(arguments.entropies)
    tokenizer = load_tokenizer(arguments.tokenizer)
    tool_format = get_format(format_for(arguments.format, tokenizer))
    settings = {"format": tool_format, "preset": preset, "progress": arguments.progress or 0.0, "entropies": entropies}
    for number, line in read_lines(arguments.file):
        try:
            tokens = inspect_ids(row_ids(parse_row(line), tokenizer), tokenizer, settings)
        except ValueError as error:
            print(as_json({"row": number, "error": str(error)}))
            continue
        if arguments.json:
            print(as_json({"tokens": [token._asdict() for token in tokens]}))
        else:
            show_tokens(f"row {number}", with_whole_characters(tokens, tokenizer))
    return 0


def format_for(name: str, tokenizer: Any) -> str:
    """The format of that name; `auto` is what the tokenizer's chat template writes, toolrl where it has none."""
    if name != AUTO:
        return name
    return resolve_format(AUTO, tokenizer)[0] if getattr(tokenizer, "chat_template", None) else "toolrl"


def inspect_ids(ids: Sequence[int], tokenizer: Any, settings: Mapping[str, Any]) -> list[Token]:
    """The tokens of one response with the region and weight that training would give them."""
    if not ids:
        return []
    ids_BT = torch.tensor([list(ids)])
    mask_BT = torch.ones_like(ids_BT)
    tool_format = settings["format"]
    regions_BT = tag_regions(ids_BT, mask_BT, tokenizer, lambda text: tool_format.parse(text).spans, tool_format.tags)
    weights_BT = token_weights(ids_BT, mask_BT, tokenizer, **settings)
    pieces = token_bytes(tokenizer).split(ids)
    return [
        # the end of a sequence carries no text of its own: show its name
        Token(
            int(i),
            piece.decode("utf-8", errors="replace") or tokenizer.decode([i]),
            Region(int(region)).label,
            float(weight),
        )
        for i, piece, region, weight in zip(ids, pieces, regions_BT[0], weights_BT[0], strict=True)
    ]


def with_whole_characters(tokens: Sequence[Token], tokenizer: Any) -> list[Token]:
    """The tokens with each character at the one that completes it, for characters cut into several tokens."""
    pieces = token_bytes(tokenizer).split([token.id for token in tokens])
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(piece) if piece else token.text for token, piece in zip(tokens, pieces, strict=True)]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return [token._replace(text=text) for token, text in zip(tokens, texts, strict=True)]


def row_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The token ids of a row to inspect: its `ids`, else its `response` as the tokenizer reads it."""
    ids = row.get("ids")
    if ids is None:
        text = text_field(row, "response").encode("utf-8", "replace").decode("utf-8")  # JSON can hold lone surrogates
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(f"ids {ids!r:.80}", "a list of integers", "mend the row")
    bad = [i for i in ids if not 0 <= i < len(tokenizer)]
    if bad:
        raise UserError(f"id {bad[0]}", f"ids below {len(tokenizer)}", "pass the tokenizer that made them")
    return ids


def read_entropies(source: str | None) -> dict[str, float]:
    """Nats by region from inline JSON or a file; without a source nothing is known of any region."""
    if source is None:
        return {}
    try:
        entropies = json.loads(source if source.lstrip().startswith("{") else Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--entropies {source!r:.80} ({error})", "a JSON object or a file", "write '{\"name\": 0.3}'"
        ) from error
    labels = [region.label for region in Region]
    if not isinstance(entropies, dict) or not all(
        label in labels and isinstance(value, (int, float)) and value >= 0 for label, value in entropies.items()
    ):
        raise UserError(f"--entropies {source!r:.80}", f"nats >= 0 for some of {', '.join(labels)}", "mend it")
    return {label: float(value) for label, value in entropies.items()}
