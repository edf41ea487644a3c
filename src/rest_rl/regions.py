"""Which region every sampled token lies in, found from the token ids' own bytes.

Shapes: B responses, T completion tokens, R regions, V token ids. Text is never encoded again: the bytes of the sampled
ids, joined, are the text that is parsed, and a token covers exactly its own bytes. For byte-level BPE and
SentencePiece-style tokenizers these bytes are a table; a tokenizer whose decoder looks at its neighbours (a plain
word-level one joins words by spaces) goes through the tokenizers library's incremental decoder.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from operator import itemgetter
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from rest_rl.errors import UserError
from rest_rl.formats import ToolFormat, get_format
from rest_rl.response import NUM_REGIONS, Region, Span

TIE_ORDER = (Region.NAME, Region.ARGUMENTS, Region.FORMAT, Region.REASONING, Region.ANSWER, Region.OTHER)
"""A token with as many bytes in two regions takes the one that stands earlier here."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of every token id of one tokenizer.

    `pieces_V[i]` are the bytes of id i; the end-of-sequence id and the last place, which stands for every unknown id,
    have none. `pieces_V` is empty when the decoder depends on context and the incremental one must be used.
    """

    tokenizer: Tokenizer
    pieces_V: tuple[bytes, ...]
    lengths_V: np.ndarray
    eos_id: int | None
    special_ids: frozenset[int]
    """Ids of special tokens; a run of them at the end of a response carries no text."""
    trims_offsets: bool
    """The tokenizer's own character offsets leave out the spaces around a token."""

    def known(self, ids_BT: np.ndarray) -> np.ndarray:
        """The ids, those beyond the vocabulary (a padded embedding samples them) mapped to the last place."""
        unknown = len(self.pieces_V) - 1 if self.pieces_V else self.tokenizer.get_vocab_size()
        return np.where((ids_BT >= 0) & (ids_BT < unknown), ids_BT, unknown)

    def split(self, known_ids: Sequence[int]) -> list[bytes]:
        """The bytes of each known id in turn."""
        if not self.pieces_V:
            return self._stream(known_ids)
        if len(known_ids) < 2:  # itemgetter of one item returns no tuple
            return [self.pieces_V[i] for i in known_ids]
        return list(itemgetter(*known_ids)(self.pieces_V))

    def text_pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each id within the tokenizer's own decoded text, which may lack a space put before the first."""
        pieces = self.split(self.known(np.array(ids, dtype=np.int64)).tolist())
        text = self.tokenizer.decode([i for i in ids if i != self.eos_id], skip_special_tokens=False)
        if b"".join(pieces).decode("utf-8", "replace") == " " + text:
            first = next(i for i, piece in enumerate(pieces) if piece)
            pieces[first] = pieces[first][1:]
        return pieces

    def _stream(self, ids: Sequence[int]) -> list[bytes]:
        stream, size = DecodeStream(skip_special_tokens=False), self.tokenizer.get_vocab_size()
        pieces: list[bytes] = []
        for i in ids:
            if i >= size or i == self.eos_id:
                pieces.append(b"")
                continue
            try:
                chunk = stream.step(self.tokenizer, i)
            except Exception:  # the library raises a bare Exception when a decoder rewrites what it has already emitted
                stream = DecodeStream(skip_special_tokens=False)
                chunk = self.tokenizer.decode([i], skip_special_tokens=False)
            pieces.append((chunk or "").encode("utf-8", "surrogateescape"))
        return pieces

    def count_text_tokens(self, ids: Sequence[int], keep: frozenset[int] = frozenset()) -> int:
        """How many ids are left when the run of special tokens at the end is taken off (`keep` stops the run)."""
        n = len(ids)
        while n and ids[n - 1] in self.special_ids and ids[n - 1] not in keep:
            n -= 1
        return n


def get_token_bytes(tokenizer: Any) -> TokenBytes:
    """The byte table of a transformers fast tokenizer or a `tokenizers.Tokenizer`, built once per vocabulary.

    ValueError for a tokenizer that is not backed by the tokenizers library.
    """
    if isinstance(tokenizer, TokenBytes):
        return tokenizer
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"a tokenizer of type {type(tokenizer).__name__}",
            "one backed by the tokenizers library",
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)",
        )
    return _build_token_bytes(tokenizer, backend, backend.get_vocab_size())


@lru_cache(maxsize=8)
def _build_token_bytes(tokenizer: Any, backend: Tokenizer, size: int) -> TokenBytes:
    del size  # part of the key alone: a tokenizer that has gained tokens needs a new table
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    special.update(getattr(tokenizer, "all_special_ids", ()))
    pieces, eos_id = _byte_table(backend), getattr(tokenizer, "eos_token_id", None)
    if pieces and eos_id is not None:
        pieces[eos_id] = b""
    return TokenBytes(
        tokenizer=backend,
        pieces_V=tuple(pieces),
        lengths_V=np.array([len(piece) for piece in pieces], dtype=np.int64),
        eos_id=eos_id,
        special_ids=frozenset(special),
        trims_offsets=not pieces or _trims_offsets(backend),
    )


def _trims_offsets(backend: Tokenizer) -> bool:
    if backend.post_processor is None:
        return False
    config = json.loads(backend.post_processor.__getstate__())
    parts = config["processors"] if config["type"] == "Sequence" else [config]
    return any(part["type"] in ("ByteLevel", "Roberta") and part["trim_offsets"] for part in parts)


def _byte_table(backend: Tokenizer) -> list[bytes]:
    """The bytes of every id and none for an unknown one; [] when the decoder needs more than one token at a time."""
    steps = _decoder_steps(backend)
    if steps is None:
        return []
    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values(), default=-1) + 2)
    for token, i in vocabulary.items():
        piece: str | bytes = token
        for step in steps:
            piece = step(piece) if isinstance(piece, str) else piece
        pieces[i] = piece.encode("utf-8", "surrogateescape") if isinstance(piece, str) else piece
    return pieces


def _decoder_steps(backend: Tokenizer) -> list[Callable[[str], str | bytes]] | None:
    """The decoder as functions of a single token; None when it has a step that needs more than one."""
    if backend.decoder is None:  # tokens are joined by spaces
        return None
    config = json.loads(backend.decoder.__getstate__())
    parts = config["decoders"] if config["type"] == "Sequence" else [config]
    steps: list[Callable[[str], str | bytes]] = []
    for at, part in enumerate(parts):
        if part["type"] == "ByteLevel":
            steps.append(_decode_byte_level)
        elif part["type"] == "ByteFallback":
            steps.append(_decode_byte_fallback)
        elif part["type"] == "Metaspace":
            steps.append(_make_replacer(part["replacement"], " "))
        elif part["type"] == "Replace" and "String" in part["pattern"]:
            steps.append(_make_replacer(part["pattern"]["String"], part["content"]))
        elif part["type"] == "Strip" and any(earlier["type"] == "Fuse" for earlier in parts[:at]):
            continue  # takes a space off the start of the whole text, which is no start here: the prompt precedes it
        elif part["type"] != "Fuse":
            return None
    return steps


def _make_replacer(old: str, new: str) -> Callable[[str], str]:
    return lambda token: token.replace(old, new)


def _decode_byte_fallback(token: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match.group(1), 16)]) if match else token


@lru_cache(maxsize=1)
def _bytes_by_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (https://github.com/openai/gpt-2, encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _decode_byte_level(token: str) -> bytes:
    table = _bytes_by_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:  # an added token may hold characters that stand for no byte; the library keeps its text
        return token.encode("utf-8", "surrogateescape")


def decode_ids(ids: Sequence[int], tokenizer: Any, tags: Sequence[str] = ()) -> str:
    """The exact text of the sampled ids, special tokens included but for those that end the response.

    A special token that is one of `tags` is text also at the end. Bytes that are not UTF-8 become U+FFFD.
    """
    table = get_token_bytes(tokenizer)
    known_ids = table.known(np.array(ids, dtype=np.int64)).tolist()
    known_ids = known_ids[: table.count_text_tokens(known_ids, _tag_ids(table, tags))]
    return b"".join(table.split(known_ids)).decode("utf-8", "replace")


def token_char_lengths(ids: Sequence[int], tokenizer: Any, tags: Sequence[str] = ()) -> list[int]:
    """How many characters of `decode_ids` each id adds; they sum to its length.

    A character belongs to the id that completes it, an incomplete last one to the last id; an id that adds none, such
    as the end of sequence, has 0.
    """
    table = get_token_bytes(tokenizer)
    known_ids = table.known(np.array(ids, dtype=np.int64)).tolist()
    num_text = table.count_text_tokens(known_ids, _tag_ids(table, tags))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    lengths = [len(decoder.decode(piece)) for piece in table.split(known_ids[:num_text])]
    if lengths:
        lengths[-1] += len(decoder.decode(b"", final=True))
    return lengths + [0] * (len(ids) - num_text)


def _tag_ids(table: TokenBytes, tags: Sequence[str]) -> frozenset[int]:
    ids = (table.tokenizer.token_to_id(tag) for tag in tags)
    return frozenset(i for i in ids if i is not None)


def find_turns(mask_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, first token, token after the last) of every run of ones, row by row: turn k of a row is its k-th run."""
    num_rows, width = mask_BT.shape
    apart = np.zeros((num_rows, width + 1), dtype=bool)  # a gap before each row, so that no run goes on into the next
    apart[:, 1:] = mask_BT
    flat = np.append(apart.ravel(), False)
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    rows = edges[::2] // (width + 1)
    return rows, edges[::2] - rows * (width + 1), edges[1::2] - rows * (width + 1)


def tag_regions(
    ids_BT: Tensor,
    mask_BT: Tensor,
    tokenizer: Any,
    format: str | ToolFormat | Callable[[str], Sequence[Span]] = "toolrl",
) -> Tensor:
    """The region of every token: int64 (B, T); tokens that the mask leaves out are OTHER.

    `format` reads the text of one turn, or is a function from it to its spans. Each run of ones in a row's mask is one
    turn and is parsed on its own: pass `completion_mask * tool_mask` for rows with tool results. A
    token that straddles regions takes the one that owns most of its bytes (ties: `TIE_ORDER`); a turn's
    end-of-sequence token and the special tokens after it are FORMAT; a token without bytes, such as the first part of
    a character under an incremental decoder, takes the region at its position.
    """
    if ids_BT.shape != mask_BT.shape or ids_BT.ndim != 2:
        raise ValueError(
            f"got ids of shape {tuple(ids_BT.shape)} and a mask of {tuple(mask_BT.shape)}, expected one (B, T)"
        )
    find_spans, tags = _span_finder(format)
    table = get_token_bytes(tokenizer)
    tag_ids = _tag_ids(table, tags)
    mask = mask_BT.detach().cpu().numpy().astype(bool)
    ids = table.known(ids_BT.detach().cpu().numpy())
    ids_N = ids[mask]  # the unmasked tokens of all turns, one after the other
    layout, tokens, at = _ByteLayout(), ids_N.tolist(), 0
    _, starts, ends = find_turns(mask)
    for end in np.cumsum(ends - starts).tolist():
        _append_turn(layout, tokens[at:end], table, tag_ids, find_spans)
        at = end
    if table.pieces_V:
        layout.token_lengths = [table.lengths_V[ids_N]]
    regions_N = _regions_of_tokens(layout)
    if table.eos_id is not None:
        regions_N[ids_N == table.eos_id] = int(Region.FORMAT)
    regions = np.full(ids.shape, int(Region.OTHER), dtype=np.int64)
    regions[mask] = regions_N
    return torch.from_numpy(regions).to(ids_BT.device)


def _span_finder(
    format: str | ToolFormat | Callable[[str], Sequence[Span]],
) -> tuple[Callable[[str], Sequence[Span]], Sequence[str]]:
    """The function from text to spans, and the tags that are text although a tokenizer calls them special."""
    if not isinstance(format, str) and not hasattr(format, "parse"):
        return cast("Callable[[str], Sequence[Span]]", format), ()
    tool_format = get_format(cast("str | ToolFormat", format))
    return lambda text: tool_format.parse(text).spans, tool_format.tags


@dataclass
class _ByteLayout:
    """All turns end to end in bytes, one byte of padding after each, so that an empty last token stays inside."""

    segment_starts: list[int] = field(default_factory=lambda: [0])
    segment_regions: list[int] = field(default_factory=lambda: [int(Region.OTHER)])
    token_lengths: list[np.ndarray] = field(default_factory=list)
    num_tokens: list[int] = field(default_factory=list)
    num_text_tokens: list[int] = field(default_factory=list)
    total: int = 0


def _append_turn(
    layout: _ByteLayout,
    ids: list[int],
    table: TokenBytes,
    tag_ids: frozenset[int],
    find_spans: Callable[[str], Sequence[Span]],
) -> None:
    num_text = table.count_text_tokens(ids, tag_ids)
    pieces = table.split(ids[:num_text])
    if not table.pieces_V:
        layout.token_lengths.append(np.array([*map(len, pieces)] + [0] * (len(ids) - num_text), dtype=np.int64))
    layout.num_tokens.append(len(ids))
    layout.num_text_tokens.append(num_text)
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    _append_spans(layout, text, find_spans(text))


def _append_spans(layout: _ByteLayout, text: str, spans: Sequence[Span]) -> None:
    """Append the runs of one turn; characters become bytes on the way."""
    bounds = [bound for span in spans for bound in (span.start, span.end)] + [len(text)]
    if not text.isascii():
        parts = [text[a:b].encode("utf-8", "surrogateescape") for a, b in zip([0, *bounds], bounds, strict=False)]
        bounds = list(accumulate(map(len, parts)))
    base = layout.total
    layout.total += bounds[-1] + 1
    layout.segment_starts.extend([base + bound for bound in bounds[:-1]])
    layout.segment_regions.extend([region for span in spans for region in (span.region, Region.OTHER)])
    layout.segment_starts.append(layout.total)
    layout.segment_regions.append(Region.OTHER)


def _regions_of_tokens(layout: _ByteLayout) -> np.ndarray:
    """The region of every token of the layout, in order: that of most of its bytes."""
    segment_starts = np.array(layout.segment_starts, dtype=np.int64)
    segment_regions = np.array(layout.segment_regions, dtype=np.int64)
    keep = np.append(
        segment_starts[1:] > segment_starts[:-1], True
    )  # of runs that start together only the last has bytes
    segment_starts, segment_regions = segment_starts[keep], segment_regions[keep]
    turn_starts = np.cumsum([0, *layout.num_tokens])
    tails = [
        slice(turn_starts[turn] + num_text, turn_starts[turn + 1])
        for turn, num_text in enumerate(layout.num_text_tokens)
    ]
    lengths = np.concatenate([*layout.token_lengths, np.zeros(0, dtype=np.int64)])
    for tail in tails:
        lengths[tail] = 0
    ends = np.cumsum(lengths) + np.repeat(np.arange(len(layout.num_tokens)), layout.num_tokens)
    starts = ends - lengths
    first = _segments_at(starts, segment_starts)
    last = _segments_at(np.maximum(ends - 1, starts), segment_starts)
    regions = segment_regions[first]
    straddling = np.flatnonzero((segment_regions[last] != regions) | (last - first > 1))
    if len(straddling):
        order = np.array(TIE_ORDER)
        is_region = segment_regions[:, None] == order
        before = np.zeros((len(segment_starts), NUM_REGIONS), dtype=np.int64)  # bytes of each region before each run
        before[1:] = np.cumsum(np.diff(segment_starts)[:, None] * is_region[:-1], axis=0)

        def bytes_before(position: np.ndarray, run: np.ndarray) -> np.ndarray:
            return before[run] + (position - segment_starts[run])[:, None] * is_region[run]

        owned = bytes_before(ends[straddling], last[straddling]) - bytes_before(starts[straddling], first[straddling])
        regions[straddling] = order[np.argmax(owned, axis=1)]
    for tail in tails:
        regions[tail] = int(Region.FORMAT)
    return regions


def _segments_at(positions: np.ndarray, segment_starts: np.ndarray) -> np.ndarray:
    """The run that holds each position; both ascend, so the few runs are looked up among the many positions."""
    entered = np.bincount(np.searchsorted(positions, segment_starts, side="left"), minlength=len(positions) + 1)
    return np.cumsum(entered)[: len(positions)] - 1


def region_sums(values_BT: Tensor, regions_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of any per-token values over each region, and its number of tokens: two float64 (R,) on the values' device.

    Sums and counts add up over micro-batches and ranks; their quotient is the mean over the global batch.
    """
    if not values_BT.shape == regions_BT.shape == mask_BT.shape:
        raise ValueError(
            f"got values {tuple(values_BT.shape)}, regions {tuple(regions_BT.shape)} and mask {tuple(mask_BT.shape)}, "
            "expected one shape"
        )
    bins_N = torch.where(
        mask_BT.bool(), regions_BT, NUM_REGIONS
    ).flatten()  # masked tokens fall into a bin of their own
    sums = torch.bincount(bins_N, weights=values_BT.detach().double().flatten(), minlength=NUM_REGIONS + 1)
    counts = torch.bincount(bins_N, minlength=NUM_REGIONS + 1)
    return sums[:NUM_REGIONS], counts[:NUM_REGIONS].double()


def region_means(values_BT: Tensor, regions_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of any per-token values over each region: float64 (R,), NaN for a region without tokens."""
    sums_R, counts_R = region_sums(values_BT, regions_BT, mask_BT)
    return sums_R / counts_R
