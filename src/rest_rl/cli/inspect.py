"""The verbs `inspect` and `presets`: what the method does to given tokens, and with which settings."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from rest_rl.cli.options import AsJson, FormatName, PresetName, Progress, RowsFile
from rest_rl.errors import UserError

AUTO = "auto"  # as in rest_rl.config, which takes a while to import
ENTROPIES = 'nats by region, {"name": 0.3, ...}, or a file that holds them; without them no region is known better'


class Token(NamedTuple):
    """One token of an inspected response."""

    id: int
    text: str
    region: str
    weight: float


def presets() -> None:
    """Print every preset as the tables of a run file, [NAME.rest] and so on, ready to paste without "NAME."."""
    import tomli_w

    from rest_rl.presets import PRESETS

    print(tomli_w.dumps({name: run_tables(preset) for name, preset in PRESETS.items()}).rstrip())


def run_tables(preset: Any) -> dict[str, Any]:
    """A preset as tables of a run file; the clip range is the trainer's."""
    from rest_rl.config import preset_table

    table = preset_table(preset)
    clip = {"epsilon": table.pop("epsilon_low"), "epsilon_high": table.pop("epsilon_high")}
    return {"rest": {"preset": preset.name, **table}, "trl": clip}


def inspect(
    file: RowsFile,
    tokenizer: Annotated[str, typer.Option(metavar="DIR", help="directory or hub name of the tokenizer")],
    tool_format: FormatName = AUTO,
    preset: PresetName = "rest",
    progress: Progress = 0.0,
    entropies: Annotated[str | None, typer.Option(metavar="JSON", help=ENTROPIES)] = None,
    json: AsJson = False,
) -> None:
    """Show the tokens of rows {"response": text} or {"ids": [...]} with region and weight."""
    from rich.console import Console

    from rest_rl.cli.terminal import show_tokens
    from rest_rl.formats import get_format
    from rest_rl.jsonl import as_json, parse_row, read_lines
    from rest_rl.presets import get_preset
    from rest_rl.train.policy import load_tokenizer

    settings = {"preset": get_preset(preset), "progress": progress, "entropies": read_entropies(entropies)}
    loaded, console = load_tokenizer(tokenizer), Console()
    settings["format"] = get_format(format_for(tool_format, loaded))
    for number, line in read_lines(file):
        try:
            tokens = inspect_ids(row_ids(parse_row(line), loaded), loaded, settings)
        except UserError as error:
            print(as_json({"row": number, "error": str(error)}))
            continue
        if json:
            print(as_json({"tokens": [token._asdict() for token in tokens]}))
        else:
            show_tokens(f"row {number}", [token[1:] for token in with_whole_characters(tokens, loaded)], console)


def format_for(name: str, tokenizer: Any) -> str:
    """The format of that name; `auto` is what the tokenizer's chat template writes, toolrl where it has none."""
    from rest_rl.data.layout import resolve_format

    if name != AUTO:
        return name
    return resolve_format(AUTO, tokenizer)[0] if getattr(tokenizer, "chat_template", None) else "toolrl"


def inspect_ids(ids: Sequence[int], tokenizer: Any, settings: Mapping[str, Any]) -> list[Token]:
    """The tokens of one response with the region and weight that training would give them."""
    import torch

    from rest_rl.presets import token_weights
    from rest_rl.regions import tag_regions, token_bytes
    from rest_rl.response import Region

    if not ids:
        return []
    ids_BT = torch.tensor([list(ids)])
    mask_BT = torch.ones_like(ids_BT)
    tool_format = settings["format"]
    regions_BT = tag_regions(ids_BT, mask_BT, tokenizer, tool_format)
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
    from rest_rl.regions import token_bytes

    pieces = token_bytes(tokenizer).split([token.id for token in tokens])
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = [decoder.decode(piece) if piece else token.text for token, piece in zip(tokens, pieces, strict=True)]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return [token._replace(text=text) for token, text in zip(tokens, texts, strict=True)]


def row_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    """The token ids of a row to inspect: its `ids`, else its `response` as the tokenizer reads it."""
    from rest_rl.jsonl import text_field

    ids = row.get("ids")
    if ids is None:
        text = text_field(row, "response").encode("utf-8", "replace").decode("utf-8")  # JSON can hold lone surrogates
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(f"ids {ids!r:.80}", "a list of integers", "correct the row")
    bad = [i for i in ids if not 0 <= i < len(tokenizer)]
    if bad:
        raise UserError(f"id {bad[0]}", f"ids below {len(tokenizer)}", "pass the tokenizer that made them")
    return ids


def read_entropies(source: str | None) -> dict[str, float]:
    """Nats by region from inline JSON or a file; without a source nothing is known of any region."""
    from rest_rl.response import Region

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
        raise UserError(f"--entropies {source!r:.80}", f"nats >= 0 for some of {', '.join(labels)}", "correct it")
    return {label: float(value) for label, value in entropies.items()}
