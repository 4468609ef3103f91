"""Augmentation: changes rows of text while training, so that epochs differ and less of the text is memorized.

Each method acts on a row of seq_len + 1 tokens, in this order:

    1. goldfish          marks 1/k of the tokens, chosen by the tokens before them in the text, as not targets
    2. fim, or           rearranges a chunk, which is the tokens of one document in the row: a random draw for each
       span_corruption   chunk decides which of the two acts, or neither. Tokens keep their marks when they are moved
    3. token_dropout     hides inputs; the targets stay

Goldfish depends on the text alone. The others draw from a Philox generator keyed by (data.seed, global sample number):
a resumed run, or one on another number of ranks, sees the same rows. Validation data is never augmented.

Shapes: B micro_batch, T seq_len.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from megagpt.config.augmentation import AugmentConfig, GoldfishConfig, PackingConfig, SpanCorruptionConfig
from megagpt.data.loss_mask import BatchTransform, Row, Tokens, split, unmarked
from megagpt.data.packing import PACKING
from megagpt.errors import UserError
from megagpt.tokenizer.tokenizer import Tokenizer

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, as in Knuth's multiplicative hashing
FIM_SENTINELS = 3  # prefix, suffix, middle
SHORTEST = 8  # a chunk of fewer tokens, or with less room for it, stays as it is


def batch_transform(
    cfg: AugmentConfig, packing: PackingConfig, tokenizer: Tokenizer, vocab_size: int, seed: int
) -> BatchTransform | None:
    """Return how a micro-batch's rows become inputs and targets; None if they are plain windows of the stream.

    `vocab_size` is the padded one. Raises UserError if there are no ids for the sentinels.
    """
    if cfg.fim.rate or cfg.span_corruption.rate or cfg.token_dropout.rate:
        fim_ids, span_ids = sentinels(cfg, tokenizer, vocab_size)
        hidden = (
            _piece_id(tokenizer, cfg.token_dropout.piece, "megagpt.augment.token_dropout.piece")
            if cfg.token_dropout.rate
            else 0
        )
        droppable = np.ones(vocab_size, dtype=np.bool_)
        droppable[[tokenizer.eod_id, *fim_ids, *span_ids]] = False  # they mark where documents and their chunks begin
        return Augment(cfg, seed, tokenizer.eod_id, fim_ids, span_ids, hidden, droppable)
    if cfg.goldfish.k or PACKING[packing.kind].marks_tokens:
        return lambda first, rows, targets: split(rows, targets)
    return None


@dataclass(frozen=True)
class Augment:
    """Steps 2 and 3 on a micro-batch, as a BatchTransform."""

    cfg: AugmentConfig
    seed: int
    eod_id: int
    fim_ids: Sequence[int]
    span_ids: Sequence[int]
    hidden_id: int  # replaces a dropped input
    droppable: NDArray[np.bool_]  # (V,): whether an input of this id may be dropped

    def __call__(self, first: int, rows: Row, targets: Row) -> None:
        generators = [sample_generator(self.seed, first + i) for i in range(len(rows))]
        if self.cfg.fim.rate or self.cfg.span_corruption.rate:
            for row, rng in zip(rows, generators, strict=True):
                row[:] = self._rearranged(row, rng)
        split(rows, targets)
        if self.cfg.token_dropout.rate:
            for row, rng in zip(rows, generators, strict=True):
                row[(rng.random(len(row)) < self.cfg.token_dropout.rate) & self.droppable[row]] = self.hidden_id

    def _rearranged(self, row: Row, rng: Generator) -> Row:
        """Rearrange some of the row's chunks; tokens that the sentinels push past its end are lost."""
        ends = np.flatnonzero(unmarked(row) == self.eod_id) + 1
        fim, spans = self.cfg.fim, self.cfg.span_corruption
        chunks: list[Row] = []
        room = len(row)
        for chunk in np.split(row, ends):
            size = min(room, len(chunk))
            draw = rng.random()
            if size >= SHORTEST and draw < fim.rate:
                chunk = fill_in_the_middle(chunk, room, self.eod_id, self.fim_ids, rng.random() < fim.spm_rate, rng)
            elif size >= SHORTEST and draw < fim.rate + spans.rate:
                chunk = corrupt_spans(chunk, room, self.eod_id, self.span_ids, spans, rng)
            chunks.append(chunk[:room])
            room -= len(chunks[-1])
            if room == 0:
                break
        return np.concatenate(chunks)


def sample_generator(seed: int, sample: int) -> Generator:
    """Return a generator for one global sample, a counter-based stream of its own (Salmon et al. 2011)."""
    return Generator(Philox(key=seed, counter=[0, 0, sample, 0]))


def fill_in_the_middle(chunk: Row, room: int, eod_id: int, ids: Sequence[int], spm: bool, rng: Generator) -> Row:
    """Cut a chunk in three at random places and move the middle to its end (Bavarian et al. 2022, sections 3 and 3.1).

    PSM: <prefix> p <suffix> s <middle> m. SPM: <prefix> <suffix> s <middle> p m. An end-of-document id stays last.
    Text that does not fit into `room` tokens with the three sentinels is cut off first.
    """
    body, end = _without_end(chunk, eod_id)
    text = body[: room - FIM_SENTINELS]
    a, b = np.sort(rng.integers(0, len(text) + 1, size=2))
    prefix, middle, suffix = np.split(text, [a, b])
    prefix_id, suffix_id, middle_id = np.array(ids).reshape(FIM_SENTINELS, 1)
    if spm:
        return np.concatenate([prefix_id, suffix_id, suffix, middle_id, prefix, middle, end])
    return np.concatenate([prefix_id, prefix, suffix_id, suffix, middle_id, middle, end])


def corrupt_spans(
    chunk: Row, room: int, eod_id: int, ids: Sequence[int], cfg: SpanCorruptionConfig, rng: Generator
) -> Row:
    """Replace spans by sentinels and append them, each after its sentinel (Raffel et al. 2020, for a decoder).

    a b c d e -> a <0> d <1> <0> b c <1> e. An end-of-document id stays last. If there are more spans than sentinels,
    these are used again from the first: their order tells which is which. Text that does not fit is cut off first.
    """
    body, end = _without_end(chunk, eod_id)
    n = len(body)
    # Too long with its sentinels: take the shortest text that fills the room, perhaps with a token or two too many.
    if _corrupted_length(n, cfg) > room:
        shorter = range(room // 2, n)
        n = room // 2 + bisect_left(shorter, room, key=lambda m: _corrupted_length(m, cfg))
        end = end[:0]
    n_noise, n_spans = _noise(n, cfg)
    # The text is kept and noise spans in turn, beginning with a kept one.
    noise, kept = _lengths(n_noise, n_spans, rng), _lengths(n - n_noise, n_spans, rng)
    is_noise = np.repeat(np.arange(2 * n_spans) % 2 == 1, np.stack([kept, noise], axis=1).ravel())
    sentinel = np.resize(ids, n_spans)
    text = np.insert(body[:n][~is_noise], np.cumsum(kept), sentinel)
    spans = np.insert(body[:n][is_noise], np.cumsum(noise) - noise, sentinel)
    return np.concatenate([text, spans, end])


def goldfish_mask(tokens: Row, eod_id: int, cfg: GoldfishConfig) -> NDArray[np.bool_]:
    """Return True where a token is not a target (Hans et al. 2024, section 3.1): one in k, by the h tokens before it.

    The same text drops the same tokens wherever it stands. The first h tokens of a document are all targets.
    """
    n, h = len(tokens), cfg.context
    up, down = _powers(n + 1)
    # A rolling hash modulo 2^64: so_far[i] is the sum of token j times MULTIPLIER^-j over all j < i.
    so_far = np.zeros(n + 1, dtype=np.uint64)
    np.cumsum(tokens.astype(np.uint64) * down[:n], out=so_far[1:])
    # Subtract all but the last h tokens, and multiply by MULTIPLIER^i, so that their place i does not matter.
    hashed = so_far[:n].copy()
    hashed[h:] -= so_far[: max(0, n - h)]
    hashed *= up[:n]
    for shift in (32, 29):
        hashed = (hashed ^ (hashed >> np.uint64(shift))) * MULTIPLIER
    place = np.arange(n)
    begin = np.zeros(n, dtype=np.int64)  # where each token's document begins, 0 if before `tokens`
    begin[1:] = np.maximum.accumulate(np.where(tokens[:-1] == eod_id, place[1:], 0))
    return (place - begin >= h) & ((hashed >> np.uint64(32)) % np.uint64(cfg.k) == 0)


@lru_cache(maxsize=4)
def _powers(n: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return MULTIPLIER^i and its inverse modulo 2^64, for i below n."""
    up, down = np.full((2, n), 1, dtype=np.uint64)
    up[1:], down[1:] = MULTIPLIER, pow(int(MULTIPLIER), -1, 2**64)
    return np.cumprod(up), np.cumprod(down)


class GoldfishTokens:
    """A stream whose goldfish tokens are marked.

    It reads the tokens before a window too, so that the marks do not depend on where windows begin.
    """

    def __init__(self, stream: Tokens, eod_id: int, cfg: GoldfishConfig) -> None:
        self._stream, self._eod_id, self._cfg = stream, eod_id, cfg
        self.n_tokens = stream.n_tokens

    def copy(self, start: int, out: Row) -> None:
        before = min(self._cfg.context, start)
        text = np.empty(before + len(out), dtype=np.int64)
        self._stream.copy(start - before, text)
        dropped = goldfish_mask(text, self._eod_id, self._cfg)[before:]
        out[:] = np.where(dropped, ~text[before:], text[before:])

    def open_all(self) -> None:
        self._stream.open_all()


def sentinels(cfg: AugmentConfig, tokenizer: Tokenizer, vocab_size: int) -> tuple[list[int], list[int]]:
    """Return the ids of fim's three sentinels and of span corruption's, each empty if that is off.

    They are the pieces that the run file names, or ids that only pad the vocabulary: fim has the first three of these
    and span corruption those after them, also if fim is off. Raises UserError if there are too few, or a name is wrong.
    """
    fim, spans = cfg.fim, cfg.span_corruption
    first_free = tokenizer.vocab_size
    fim_ids, span_ids = [], []
    if fim.rate:
        fim_ids = [_piece_id(tokenizer, piece, "megagpt.augment.fim.pieces") for piece in fim.pieces or ()]
        fim_ids = fim_ids or list(range(first_free, first_free + FIM_SENTINELS))
    if spans.rate:
        span_ids = [
            _piece_id(tokenizer, piece, "megagpt.augment.span_corruption.pieces") for piece in spans.pieces or ()
        ]
        span_ids = span_ids or [first_free + FIM_SENTINELS + i for i in range(spans.sentinels)]
    for key, ids in (("megagpt.augment.fim.pieces", fim_ids), ("megagpt.augment.span_corruption.pieces", span_ids)):
        if len(set(ids)) < len(ids):
            raise UserError(f"{key} names one piece twice; name different ones")
    last = max([*fim_ids, *span_ids], default=0)
    if last >= vocab_size:
        raise UserError(
            f"megagpt.augment needs {last + 1 - first_free} ids for sentinels, and the vocabulary of {first_free:,} "
            f"pieces, padded to {vocab_size:,}, leaves {vocab_size - first_free} free; build the data with vocab_size="
            f"{vocab_size - (last + 1 - first_free)} or less, or name control pieces of its tokenizer in "
            "megagpt.augment.fim.pieces and megagpt.augment.span_corruption.pieces"
        )
    return fim_ids, span_ids


def _piece_id(tokenizer: Tokenizer, piece: str, key: str) -> int:
    """Return the id of a piece that the run file's `key` names. Raises UserError if it cannot be a sentinel."""
    found = tokenizer.piece_id(piece)
    if found is None:
        raise UserError(f"{key}: the tokenizer has no piece {piece!r}; name one that it has")
    if found == tokenizer.eod_id:
        raise UserError(f"{key}: {piece!r} is the end of a document; name another piece")
    return found


def _without_end(chunk: Row, eod_id: int) -> tuple[Row, Row]:
    """Split a chunk into its text and its end-of-document id, which is empty if the document continues."""
    at = len(chunk) - int(max(chunk[-1], ~chunk[-1]) == eod_id)  # the id may be marked
    return chunk[:at], chunk[at:]


def _noise(n: int, cfg: SpanCorruptionConfig) -> tuple[int, int]:
    """Return how many of n tokens are noise, and in how many spans (T5's random_spans_noise_mask)."""
    n_noise = min(max(round(n * cfg.density), 1), n - 1)
    return n_noise, min(max(round(n_noise / cfg.mean_span), 1), n_noise, n - n_noise)


def _corrupted_length(n: int, cfg: SpanCorruptionConfig) -> int:
    """Return the length of n corrupted tokens: each span has its sentinel twice."""
    return n + 2 * _noise(n, cfg)[1]


def _lengths(total: int, n: int, rng: Generator) -> NDArray[np.int64]:
    """Draw n lengths of at least one that add up to `total`, all combinations equally likely."""
    cuts = np.sort(rng.choice(total - 1, size=n - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)
