"""The commands `inspect` and `presets`, which show token weights of responses and settings of presets."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from rest_rl.cli.options import AUTO, AsJson, FormatName, PresetName, Progress, RowsFile
from rest_rl.errors import UserError

ENTROPIES = 'entropy in nats by region, {"name": 0.3, ...}, inline or in a file (default: equal for all regions)'


class Inspected(NamedTuple):
    """The token ids of a response, and the bytes (`pieces`), region and weight of each token in training."""

    ids: list[int]
    pieces: list[bytes]
    regions: list[int]
    weights: list[float]


def presets(name: Annotated[str | None, typer.Argument(metavar="NAME", help="preset to print as TOML")] = None) -> None:
    """List the presets, or print all settings of one as tables of a run file."""
    import tomli_w

    from rest_rl.presets import PRESETS, SUPERVISED, get_origin

    if name is None:
        print("\n".join(f"{preset:13} {get_origin(preset)}" for preset in (*PRESETS, *SUPERVISED)))
        print("rest-rl presets NAME prints the settings of one; rest-rl train --preset NAME uses it")
    else:
        print(tomli_w.dumps(run_tables(name)).rstrip())


def run_tables(name: str) -> dict[str, Any]:
    # A preset as tables of a run file; the clip range belongs to [trl].
    from rest_rl.config import preset_to_table
    from rest_rl.presets import SUPERVISED, get_preset

    if name in SUPERVISED:
        return {"rest": {"preset": name, "region_weights": SUPERVISED[name]}}
    preset = get_preset(name)
    table = preset_to_table(preset)
    names = {"epsilon_low": "epsilon", "epsilon_high": "epsilon_high", "delta": "delta"}
    clip = {names[key]: table.pop(key) for key in names if key in table}
    return {"rest": {"preset": preset.name, **table}, "trl": clip}


def inspect(
    file: RowsFile,
    tokenizer: Annotated[str, typer.Option(metavar="DIR", help="folder or hub name of the tokenizer")],
    tool_format: FormatName = AUTO,
    preset: PresetName = "rest",
    progress: Progress = 0.0,
    entropies: Annotated[str | None, typer.Option(metavar="JSON", help=ENTROPIES)] = None,
    json: AsJson = False,
) -> None:
    """Show the tokens of responses with their region and weight.

    A row is {"response": text} or {"ids": [...]}. Regions and weights are those that training would use.
    """
    from rest_rl.evaluate.origin import resolve_origin

    tokenizer = resolve_origin(tokenizer, "--tokenizer").path  # before torch is loaded
    from rich.console import Console

    from rest_rl.cli.score import format_of_rows
    from rest_rl.cli.terminal import Screen, show_tokens
    from rest_rl.data.layout import resolve_format
    from rest_rl.evaluate.generate import has_ended
    from rest_rl.formats import get_format
    from rest_rl.jsonl import as_json, parse_row, read_lines
    from rest_rl.presets import get_preset
    from rest_rl.train.named_models import locate_model
    from rest_rl.train.policy import load_tokenizer
    from rest_rl.train.reward import get_stop_ids

    settings = {"preset": get_preset(preset), "progress": progress, "entropies": read_entropies(entropies)}
    loaded, console = load_tokenizer(locate_model(tokenizer, Screen(Console(stderr=True)))), Console()
    # The chat template determines the format, as in training; without a template, the responses determine it.
    if tool_format == AUTO and getattr(loaded, "chat_template", None):
        tool_format, why = resolve_format(AUTO, loaded)
        print(f"format {tool_format}: {why}", file=sys.stderr)
        rows = read_lines(file)
    else:
        tool_format, rows = format_of_rows(tool_format, file)
    settings["format"], ends = get_format(tool_format), get_stop_ids(loaded)
    for number, line in rows:
        try:
            row = parse_row(line)
            response = inspect_ids(row_ids(row, loaded), loaded, settings)
        except UserError as error:
            print(as_json({"row": number, "error": str(error)}))
            continue
        is_cut = not has_ended(row["ids"], ends) if row.get("ids") else row.get("truncated")
        if json:
            print(tokens_as_json(response, is_cut))
        else:
            title = f"row {number}, truncated" if is_cut else f"row {number}"
            show_tokens(title, runs(response), response.regions, response.weights, console)


def inspect_ids(ids: list[int], tokenizer: Any, settings: Mapping[str, Any]) -> Inspected:
    # Returns the tokens of one response with the regions and weights that training would use.
    import torch

    from rest_rl.presets import compute_token_weights
    from rest_rl.regions import get_token_bytes, tag_regions

    if not ids:
        return Inspected([], [], [], [])
    # A batch of one sequence: shapes are (1, T). The code is the one that training runs, not a second implementation.
    ids_BT = torch.tensor([ids])
    mask_BT = torch.ones_like(ids_BT)
    regions_BT = tag_regions(ids_BT, mask_BT, tokenizer, settings["format"])
    weights_BT = compute_token_weights(ids_BT, mask_BT, tokenizer, **settings, regions_BT=regions_BT)
    pieces = get_token_bytes(tokenizer).to_bytes(ids)
    for at in (at for at, piece in enumerate(pieces) if not piece):
        # Special tokens have no bytes; show their name instead.
        pieces[at] = tokenizer.decode([ids[at]]).encode("utf-8", errors="replace")
    return Inspected(ids, pieces, regions_BT[0].tolist(), weights_BT[0].tolist())


def tokens_as_json(response: Inspected, is_cut: bool | None) -> str:
    # {"tokens": [{"id", "text", "region", "weight"}, ...]} on one line, with "truncated" if it is known.
    from rest_rl.jsonl import as_json
    from rest_rl.response import Region

    @cache  # formats equal tokens only once
    def token(i: int, piece: bytes, region: int, weight: float) -> str:
        text = piece.decode("utf-8", errors="replace")
        return as_json({"id": i, "text": text, "region": Region(region).label, "weight": weight})

    known = "" if is_cut is None else f', "truncated": {as_json(bool(is_cut))}'
    return f'{{"tokens": [{", ".join(map(token, *response))}]{known}}}'


def runs(response: Inspected) -> Iterator[tuple[str, str]]:
    # Yield (text, region) for each run of tokens in one region; a character split over tokens goes to the last one.
    from rest_rl.response import Region

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    label = Region.OTHER.label
    for region, group in groupby(zip(response.regions, response.pieces, strict=True), key=itemgetter(0)):
        label = Region(region).label
        yield decoder.decode(b"".join(piece for _, piece in group)), label
    yield decoder.decode(b"", final=True), label


def row_ids(row: Mapping[str, Any], tokenizer: Any) -> list[int]:
    # Returns the token ids of a row: its `ids`, or its tokenized `response`.
    from rest_rl.jsonl import require_text

    ids = row.get("ids")
    if ids is None:
        text = require_text(row, "response").encode("utf-8", "replace").decode("utf-8")  # removes lone surrogates
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(f"ids is {ids!r:.80}", "a list of integers", "fix the row")
    bad = [i for i in ids if not 0 <= i < len(tokenizer)]
    if bad:
        raise UserError(
            f"ids contains {bad[0]}", f"ids from 0 to {len(tokenizer) - 1}", "pass the tokenizer that produced them"
        )
    return ids


def read_entropies(source: str | None) -> dict[str, float]:
    # The entropy in nats by region from inline JSON or a file; empty without a source.
    from rest_rl.jsonl import describe_os_error
    from rest_rl.response import Region

    if source is None:
        return {}
    try:
        entropies = json.loads(source if source.lstrip().startswith("{") else Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = describe_os_error(error) if isinstance(error, OSError) else error
        remedy = "write '{\"name\": 0.3}', or check the path"
        raise UserError(f"--entropies is {source!r:.80} ({why})", "a JSON object or a file", remedy) from error
    if not isinstance(entropies, dict):
        raise UserError(f"--entropies is {source!r:.80}", "a JSON object")
    labels = [region.label for region in Region]
    for label, value in entropies.items():
        if label not in labels:
            raise UserError(f"--entropies has the unknown key {label!r}", f"one of {', '.join(labels)}")
        if not isinstance(value, (int, float)) or not value >= 0:
            raise UserError(f"--entropies has {value!r:.80} for {label!r}", "a number of at least 0")
    return {label: float(value) for label, value in entropies.items()}
