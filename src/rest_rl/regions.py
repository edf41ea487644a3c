"""Assigns a region to every sampled token, from the bytes of the token ids.

Text is never tokenized again, because that could give other ids than were sampled. Instead the bytes of the sampled ids
are joined and parsed, and each token covers exactly its own bytes. For byte-level BPE and SentencePiece tokenizers the
bytes of an id come from a table. If the decoder depends on neighboring tokens (a word-level tokenizer joins words with
spaces), the tokenizers library's incremental decoder is used.

Shapes: B responses, T completion tokens, R regions, V token ids, N unmasked tokens.
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

# If a token has equally many bytes in several regions, the first of them in this order wins.
TIE_ORDER = (Region.NAME, Region.ARGUMENTS, Region.FORMAT, Region.REASONING, Region.ANSWER, Region.OTHER)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of every token id of a tokenizer.

    `pieces_V[i]` are the bytes of id i. The end-of-sequence id has no bytes, and neither has the last entry, which is
    used for all unknown ids. `pieces_V` is empty if the bytes of an id depend on its neighbors.
    """

    tokenizer: Tokenizer
    pieces_V: tuple[bytes, ...]
    lengths_V: np.ndarray
    eos_id: int | None
    special_ids: frozenset[int]
    """Ids of the special tokens; at the end of a response, these do not count as text."""
    trims_offsets: bool
    """Whether the tokenizer's character offsets exclude the spaces around a token."""

    def to_known_ids(self, ids_BT: np.ndarray) -> np.ndarray:
        """Map ids outside the vocabulary, which can be sampled if the embedding is padded, to the unknown id."""
        unknown = len(self.pieces_V) - 1 if self.pieces_V else self.tokenizer.get_vocab_size()
        return np.where((ids_BT >= 0) & (ids_BT < unknown), ids_BT, unknown)

    def to_bytes(self, known_ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each id; the ids come from `to_known_ids`."""
        if not self.pieces_V:
            return self._stream(known_ids)
        if len(known_ids) < 2:  # itemgetter with a single item returns no tuple
            return [self.pieces_V[i] for i in known_ids]
        return list(itemgetter(*known_ids)(self.pieces_V))

    def text_pieces(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each id, without a leading space that the tokenizer's `decode` would drop."""
        pieces = self.to_bytes(self.to_known_ids(np.array(ids, dtype=np.int64)).tolist())
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
            except Exception:  # tokenizers raises a bare Exception if a decoder changes text that it already emitted
                stream = DecodeStream(skip_special_tokens=False)
                chunk = self.tokenizer.decode([i], skip_special_tokens=False)
            pieces.append((chunk or "").encode("utf-8", "surrogateescape"))
        return pieces

    def count_text_tokens(self, ids: Sequence[int], text_ids: frozenset[int] = frozenset()) -> int:
        """Count the ids before the special tokens at the end; special tokens in `text_ids` count as text."""
        n = len(ids)
        while n and ids[n - 1] in self.special_ids and ids[n - 1] not in text_ids:
            n -= 1
        return n


def get_token_bytes(tokenizer: Any) -> TokenBytes:
    """Return the bytes of all token ids of a transformers fast tokenizer or `tokenizers.Tokenizer`, cached.

    Raises:
        UserError: The tokenizer is not backed by the tokenizers library.
    """
    if isinstance(tokenizer, TokenBytes):
        return tokenizer
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(
            f"the tokenizer is of type {type(tokenizer).__name__}",
            "one that is backed by the tokenizers library",
            "load it with AutoTokenizer.from_pretrained(..., use_fast=True)",
        )
    return _build_token_bytes(tokenizer, backend, backend.get_vocab_size())


@lru_cache(maxsize=8)
def _build_token_bytes(tokenizer: Any, backend: Tokenizer, size: int) -> TokenBytes:
    del size  # only a part of the cache key: a tokenizer to which tokens were added needs a new table
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
    # Runs the decoder's steps on each token by itself. That is exact only if no step looks at other tokens; otherwise
    # the table is empty. A step may return bytes (part of a character); the later steps only apply to text.
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
    if backend.decoder is None:  # the library then joins tokens with spaces
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
            continue  # strips the start of the whole text, but a response follows its prompt
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
    # GPT-2 maps the 256 bytes to printable characters (https://github.com/openai/gpt-2, encoder.py).
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _decode_byte_level(token: str) -> bytes:
    table = _bytes_by_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:  # an added token with a character that encodes no byte; the library keeps its text
        return token.encode("utf-8", "surrogateescape")


def decode_ids(ids: Sequence[int], tokenizer: Any, tags: Sequence[str] = ()) -> str:
    """Decode sampled ids to the text that the formats parse.

    Special tokens are kept, except for those at the end that are not in `tags`. Invalid UTF-8 becomes U+FFFD.
    """
    table = get_token_bytes(tokenizer)
    known_ids = table.to_known_ids(np.array(ids, dtype=np.int64)).tolist()
    known_ids = known_ids[: table.count_text_tokens(known_ids, _tag_ids(table, tags))]
    return b"".join(table.to_bytes(known_ids)).decode("utf-8", "replace")


def token_char_lengths(ids: Sequence[int], tokenizer: Any, tags: Sequence[str] = ()) -> list[int]:
    """Return the number of characters that each id adds to the result of `decode_ids`.

    A character counts for the id that completes it, and an incomplete character at the end for the last id.
    """
    table = get_token_bytes(tokenizer)
    known_ids = table.to_known_ids(np.array(ids, dtype=np.int64)).tolist()
    num_text = table.count_text_tokens(known_ids, _tag_ids(table, tags))
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    lengths = [len(decoder.decode(piece)) for piece in table.to_bytes(known_ids[:num_text])]
    if lengths:
        lengths[-1] += len(decoder.decode(b"", final=True))
    return lengths + [0] * (len(ids) - num_text)


# A tokenizer can make a format's tags special tokens. At the end of a response these are text, unlike end-of-sequence.
def _tag_ids(table: TokenBytes, tags: Sequence[str]) -> frozenset[int]:
    ids = (table.tokenizer.token_to_id(tag) for tag in tags)
    return frozenset(i for i in ids if i is not None)


def find_turns(mask_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three arrays, the row, start and end of each turn; a turn is a run of ones in a row of the mask."""
    num_rows, width = mask_BT.shape
    # A zero before each row keeps a run at the end of one row apart from a run at the start of the next. In the
    # flattened mask every change of value is then an edge, alternately the start and the end of a turn.
    padded = np.zeros((num_rows, width + 1), dtype=bool)
    padded[:, 1:] = mask_BT
    flat = np.append(padded.ravel(), False)
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    rows = edges[::2] // (width + 1)
    return rows, edges[::2] - rows * (width + 1), edges[1::2] - rows * (width + 1)


def tag_regions(
    ids_BT: Tensor,
    mask_BT: Tensor,
    tokenizer: Any,
    format: str | ToolFormat | Callable[[str], Sequence[Span]] = "toolrl",
) -> Tensor:
    """Return the region of every token, OTHER where masked. Shape (B, T), int64.

    Each run of ones in a row of the mask is a turn and is parsed separately; for rows with tool results, pass
    `completion_mask * tool_mask`. A token in several regions gets the region that contains most of its bytes (ties:
    `TIE_ORDER`). The special tokens at the end of a turn are FORMAT. A token without bytes (one that starts a character
    of several tokens, where the decoder outputs nothing yet) gets the region of the text where it occurs. `format` can
    also be a function that returns the spans of a turn's text.
    """
    if ids_BT.shape != mask_BT.shape or ids_BT.ndim != 2:
        raise ValueError(
            f"ids have shape {tuple(ids_BT.shape)} and mask has shape {tuple(mask_BT.shape)}, expected (B, T) for both"
        )
    find_spans, tags = _span_finder(format)
    table = get_token_bytes(tokenizer)
    tag_ids = _tag_ids(table, tags)
    mask = mask_BT.detach().cpu().numpy().astype(bool)
    ids = table.to_known_ids(ids_BT.detach().cpu().numpy())
    ids_N = ids[mask]  # the unmasked tokens of all turns, concatenated
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
    # Returns the function from text to spans, and the tags that are text even if the tokenizer makes them special.
    if not isinstance(format, str) and not hasattr(format, "parse"):
        return cast("Callable[[str], Sequence[Span]]", format), ()
    tool_format = get_format(cast("str | ToolFormat", format))
    return lambda text: tool_format.parse(text).spans, tool_format.tags


@dataclass
class _ByteLayout:
    # All turns of a batch, concatenated in bytes. A segment is a stretch of bytes in one region; it starts at
    # segment_starts[i] and ends where the next one starts. One padding byte follows each turn, so that a last token
    # without bytes has a position inside its own turn.

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
    pieces = table.to_bytes(ids[:num_text])
    if not table.pieces_V:
        layout.token_lengths.append(np.array([*map(len, pieces)] + [0] * (len(ids) - num_text), dtype=np.int64))
    layout.num_tokens.append(len(ids))
    layout.num_text_tokens.append(num_text)
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    _append_spans(layout, text, find_spans(text))


def _append_spans(layout: _ByteLayout, text: str, spans: Sequence[Span]) -> None:
    # Spans count characters, segments count bytes. Both are the same for ASCII; otherwise the stretches between the
    # bounds are encoded once each, which keeps this linear. Every span is followed by an OTHER segment, often empty.
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
    # Token i covers the bytes [starts[i], ends[i]); we find the segments of its first and last byte with one merge of
    # two sorted arrays. If both are the same segment, or adjacent ones of the same region, that is the answer. For the
    # few other tokens, a cumulative sum over segments gives the number of bytes of each region before any position;
    # the difference between a token's end and start is what each region owns of it. O(tokens + segments) in NumPy.
    segment_starts = np.array(layout.segment_starts, dtype=np.int64)
    segment_regions = np.array(layout.segment_regions, dtype=np.int64)
    # Of segments that start at the same byte only the last is not empty.
    is_filled = np.append(segment_starts[1:] > segment_starts[:-1], True)
    segment_starts, segment_regions = segment_starts[is_filled], segment_regions[is_filled]
    turn_starts = np.cumsum([0, *layout.num_tokens])
    tails = [
        slice(turn_starts[turn] + num_text, turn_starts[turn + 1])
        for turn, num_text in enumerate(layout.num_text_tokens)
    ]
    lengths = np.concatenate([*layout.token_lengths, np.zeros(0, dtype=np.int64)])
    for tail in tails:  # the special tokens at the end of each turn are not part of its text
        lengths[tail] = 0
    # One padding byte per earlier turn shifts the positions.
    ends = np.cumsum(lengths) + np.repeat(np.arange(len(layout.num_tokens)), layout.num_tokens)
    starts = ends - lengths
    first = _segments_at(starts, segment_starts)
    last = _segments_at(np.maximum(ends - 1, starts), segment_starts)
    regions = segment_regions[first]
    straddling = np.flatnonzero((segment_regions[last] != regions) | (last - first > 1))
    if len(straddling):
        order = np.array(TIE_ORDER)
        is_region = segment_regions[:, None] == order
        before = np.zeros((len(segment_starts), NUM_REGIONS), dtype=np.int64)  # bytes per region before each segment
        before[1:] = np.cumsum(np.diff(segment_starts)[:, None] * is_region[:-1], axis=0)

        def bytes_before(position: np.ndarray, segment: np.ndarray) -> np.ndarray:
            return before[segment] + (position - segment_starts[segment])[:, None] * is_region[segment]

        owned = bytes_before(ends[straddling], last[straddling]) - bytes_before(starts[straddling], first[straddling])
        regions[straddling] = order[np.argmax(owned, axis=1)]  # argmax takes the first maximum: TIE_ORDER
    for tail in tails:
        regions[tail] = int(Region.FORMAT)
    return regions


def _segments_at(positions: np.ndarray, segment_starts: np.ndarray) -> np.ndarray:
    # The index of the segment that contains each position. Both arrays are sorted and there are far fewer segments, so
    # we search for the segments among the positions and count how many have started at each position.
    entered = np.bincount(np.searchsorted(positions, segment_starts, side="left"), minlength=len(positions) + 1)
    return np.cumsum(entered)[: len(positions)] - 1


def region_sums(values_BT: Tensor, regions_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return each region's sum of per-token values and number of tokens. Shape (R,) each, float64.

    Both can be added over micro-batches and ranks; the quotient is then the mean over the global batch.
    """
    if not values_BT.shape == regions_BT.shape == mask_BT.shape:
        raise ValueError(
            f"values, regions and mask have shapes {tuple(values_BT.shape)}, {tuple(regions_BT.shape)} and "
            f"{tuple(mask_BT.shape)}, expected (B, T) for all"
        )
    bins_N = torch.where(mask_BT.bool(), regions_BT, NUM_REGIONS).flatten()  # an extra bin for masked tokens
    sums = torch.bincount(bins_N, weights=values_BT.detach().double().flatten(), minlength=NUM_REGIONS + 1)
    counts = torch.bincount(bins_N, minlength=NUM_REGIONS + 1)
    return sums[:NUM_REGIONS], counts[:NUM_REGIONS].double()


def region_means(values_BT: Tensor, regions_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the mean of per-token values by region, NaN for a region without tokens. Shape (R,), float64."""
    sums_R, counts_R = region_sums(values_BT, regions_BT, mask_BT)
    return sums_R / counts_R
