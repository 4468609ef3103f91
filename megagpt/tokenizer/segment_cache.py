"""A cache for tokenizing: texts are cut where no token can reach across, and each distinct segment is tokenized once.

Most segments of a text were seen before. Where it is exact to cut depends on the tokenizer: cuts_between_pieces and
cuts_before_spaces say so.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat

import numpy as np
import pyarrow as pa

REMEMBERED_SEGMENTS, REMEMBERED_IDS = 2**20, 2**23  # about 200 MB; beyond either the cache is emptied
BETWEEN = b"\xff"  # occurs in no UTF-8


class SegmentEncoder:
    """Encodes whole texts from the token ids of their segments, which `encode` tokenizes one by one."""

    def __init__(self, separable: np.ndarray, encode: Callable[[list[str]], list[list[int]]]) -> None:
        """separable[a, b] tells whether a text may be cut between the bytes a and b: bool, (256, 256)."""
        self._separable = separable.ravel()
        self._encode = encode
        self._lock = threading.Lock()  # of all that follows: threads of a user's program may share a model
        self._known: dict[bytes, int] = {}  # segment -> its number
        self._begins = self._lengths = np.empty(0, np.int32)  # of the ids of each number, in self._ids
        self._ids = np.empty(0, np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Return the ids (int32) of each text, given as UTF-8; they depend on nothing but that text."""
        text_ends = np.cumsum([len(text) for text in texts])
        data = b"".join(texts)
        if not data:
            return [np.empty(0, np.int32) for _ in texts]
        begins = self._cut(data, text_ends[:-1])
        distinct = _distinct(data, begins)
        with self._lock:
            segments = self._numbers_of(distinct)
            first, lengths, known_ids = self._begins[segments], self._lengths[segments], self._ids
        ends = np.cumsum(lengths, dtype=np.int32)
        # Where each id of the texts stands in known_ids: within a segment one after the other.
        where = np.repeat(first - (ends - lengths), lengths)
        where += np.arange(len(where), dtype=np.int32)
        after_text = np.searchsorted(begins, text_ends[:-1])  # segments up to each text's end
        return np.split(np.take(known_ids, where), np.concatenate([[0], ends])[after_text])

    def _cut(self, data: bytes, text_ends: np.ndarray) -> np.ndarray:
        """Return where segments begin: int64, ascending."""
        codes = np.frombuffer(data, np.uint8)
        pairs = codes[:-1].astype(np.uint16)
        pairs <<= 8
        pairs |= codes[1:]
        is_begin = np.ones(len(codes) + 1, bool)
        np.take(self._separable, pairs, out=is_begin[1:-1])
        is_begin[text_ends] = True
        return np.flatnonzero(is_begin[:-1])

    def _numbers_of(self, distinct: pa.DictionaryArray) -> np.ndarray:
        """Return the number of each segment in the cache; new ones are tokenized and added."""
        if len(self._known) > REMEMBERED_SEGMENTS or len(self._ids) > REMEMBERED_IDS:
            self._forget()
        segments = distinct.dictionary.to_pylist()
        numbers = np.fromiter(map(self._known.get, segments, repeat(-1)), np.int32, len(segments))
        new = np.flatnonzero(numbers < 0)
        numbers[new] = self._remember([segments[i] for i in new])
        return numbers[np.frombuffer(distinct.indices.buffers()[1], np.int32, len(distinct))]

    def _remember(self, segments: Sequence[bytes]) -> np.ndarray:
        """Tokenize new segments and add them to the cache; returns their numbers."""
        numbers = np.arange(len(self._known), len(self._known) + len(segments))
        encoded = self._encode([segment.decode() for segment in segments])
        lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
        ids = np.fromiter(chain.from_iterable(encoded), np.int32, lengths.sum())
        self._known.update(zip(segments, numbers.tolist(), strict=True))
        self._begins = np.concatenate([self._begins, len(self._ids) + np.cumsum(lengths, dtype=np.int32) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._ids = np.concatenate([self._ids, ids])
        return numbers

    def _forget(self) -> None:
        self._known = {}
        self._begins = self._lengths = self._ids = np.empty(0, np.int32)


def cuts_between_pieces(pieces: Iterable[bytes]) -> np.ndarray:
    """Return where a text may be cut whose tokens are `pieces`, or single characters that the model has no piece for.

    Two neighboring bytes that no piece holds side by side lie in two tokens, whatever the model prefers, and what is
    best (unigram) or merged first (BPE) on one side does not depend on the other.
    """
    codes = np.frombuffer(BETWEEN.join(pieces), np.uint8)
    separable = np.ones((256, 256), bool)
    separable[codes[:-1], codes[1:]] = False
    separable[:, 0x80:0xC0] = False  # UTF-8's continuation bytes: never within a character
    return separable


def cuts_before_spaces() -> np.ndarray:
    r"""Return where a text may be cut that GPT-2's pattern splits into words, which are tokenized one by one.

        's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

    No alternative has white space after another character, so a word always ends before white space. The words after
    that depend on no character before it, because the pattern looks ahead only; and it looks ahead after white space
    only, so those before it do not depend on what follows.
    """
    separable = np.zeros((256, 256), bool)
    separable[0x21:0x7F, [*b"\t\n\v\f\r "]] = True
    return separable


def _distinct(data: bytes, begins: np.ndarray) -> pa.DictionaryArray:
    """Return each segment as an index into the distinct ones."""
    offsets = np.append(begins, len(data))
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.large_binary(), len(begins), buffers).dictionary_encode()
