"""Split a text into words and sentences as the published quality rules count them, once for all rules.

In these rules, a word is a token of a linguistic tokenizer: `foo (bar), isn't.` has nine, punctuation included. The
split rebuilds the part of spaCy's English tokenizer, which datatrove uses for these rules, that decides about counts:
punctuation at the edges of a chunk (text without white space), punctuation between letters, contractions, common
abbreviations, symbols, and URLs as one word. It leaves out rare exceptions, units (4GB), and languages without white
space between words.

It exists for speed. A whole build with every rule ran 12.5 times (published thresholds) and 18.6 times (thresholds that
let all documents pass) as fast per core as datatrove 0.10.1, which calls spaCy (tests/benchmarks/RESULTS.md).
"""

import re
import unicodedata
from collections import Counter
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray


def _characters(ranges: str) -> frozenset[str]:
    """'41 61-63' (hexadecimal) -> {'A', 'a', 'b', 'c'}."""
    bounds = [[int(end, 16) for end in item.split("-")] for item in ranges.split()]
    return frozenset(chr(code) for bound in bounds for code in range(bound[0], bound[-1] + 1))


# the two sets are those of datatrove 0.10.1 (utils/text.py)
TERMINAL_PUNCTUATION = _characters(
    "21 2e 3f 589 61d-61f 6d4 700-702 7f9 837 839 83d-83e 964-965 104a-104b 1362 1367-1368 166e 1735-1736 17d4-17d6 "
    "17d9-17da 1803 1809 1944-1945 1aa8-1aab 1b5a-1b5b 1b5e-1b5f 1b7d-1b7e 1c3b-1c3c 1c7e-1c7f 203c-203d 2047-2049 "
    "2e2e 2e3c 2e53-2e54 3002 a4ff a60e-a60f a6f3 a6f7 a876-a877 a8ce-a8cf a92f a9c8-a9c9 aa5d-aa5f aaf0-aaf1 abeb "
    "fe52 fe56-fe57 ff01 ff0e ff1f ff61 10a56-10a57 10f55-10f59 10f86-10f89 11047-11048 110be-110c1 11141-11143 "
    "111c5-111c6 111cd 111de-111df 11238-11239 1123b-1123c 112a9 1144b-1144c 115c2-115c3 115c9-115d7 11641-11642 "
    "1173c-1173e 11944 11946 11a42-11a43 11a9b-11a9c 11c41-11c42 11ef7-11ef8 11f43-11f44 16a6e-16a6f 16af5 "
    "16b37-16b38 16b44 16e98 1bc9f 1da88"
)
PUNCTUATION = TERMINAL_PUNCTUATION | _characters(
    "0-8 b-1f 22-2d 2f 3a-3e 40 5b-60 7b-9f ab b4 bb 2013-2014 2019 201c-201e 2026 2236 2501 25ba 3001 3008-300d "
    "3010-3011 ff05 ff08-ff09 ff0c ff11 ff1a-ff1b ff5e"
)

# characters that are words of their own at either end of a chunk; at the start, a few more are
EDGES = "…,:;!?¿¡()[]{}<>_#*&'\"`”“‘´’‚„»«—–·。？！，、；：～「」『』（）【】《》〈〉〔〕।،۔؛٪؟"  # noqa: RUF001
PREFIXES = EDGES + "§%=$£€¥"
SUFFIXES = EDGES + "."
LETTER, BEHIND_WORD = r"(?=[^\W\d_])", r"(?<=[^\W_].)"  # the second: before the character just read
INFIX = re.compile(
    "("
    + "|".join(  # each starts with a fixed character, which `re` can search for quickly
        [r"\.\.+", r"\.(?<=[a-zß-öø-ÿ'\"”“`‘´’].)(?=[A-ZÀ-ÖØ-Þ'\"”“`‘´’])", "…", r",(?<=[^\W\d_].)" + LETTER]  # noqa: RUF001
        + [rf"\{sign}(?<=[0-9].)(?=[0-9-])" for sign in "+-*^"]
        + [hyphens[0] + BEHIND_WORD + hyphens[1:] + LETTER for hyphens in ("--?-?", "——?", "–", "~")]  # noqa: RUF001
        + [sign + BEHIND_WORD + LETTER for sign in ":<>=/"]
    )
    + ")"
)
URL = re.compile(
    r"(?:[\w+.-]{2,}://)?(?:\S+@)?(?:(?:[A-Za-z0-9¡-\uffff][\w¡-\uffff-]*\.)+[a-z]{2,63}|\d{1,3}(?:\.\d{1,3}){3})"
    r"(?::\d{2,5})?(?:[/?#]\S*)?\Z"
)
LONGEST = 500  # characters; a longer chunk is not matched for URLs and contractions, which takes time with the square
CONTRACTION = re.compile(r"(.+)(n['’]t|['’](?:s|S|d|m|ll|re|ve))\Z")  # noqa: RUF001
ABBREVIATIONS = re.compile(
    "(?:e.g|i.e|E.g|I.e|a.m|p.m|vs|v.s|Mr|Mrs|Ms|Dr|Prof|St|Jr|Inc|Ltd|Co|co|Corp|Gen|Gov|Rep|Rev|Sen|Ph.D|Adm|Bros|Mt|"
    "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|Calif|Ill|Ind|Mass|Mich|Minn|Miss|Tenn|Va|Wash|Pa|Mo|Md|Ga|Fla|"
    "Colo|Conn)".replace(".", r"\.")
)
LEADING = re.compile(rf"(?:\.\.+|[{re.escape(PREFIXES)}])*")
EDGE_WORD = re.compile(
    r"\.\.+|\):|:[()\]}>*]|[=;]\)|=[(\[\]]|[(\[][:=]|''|."
)  # with spaCy's emoticons, which are frequent in source code
SYMBOL = re.compile("([¦©®°\u2300-\u23ff\u2500-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff])")
CACHED_CHUNKS = 2**16  # about 15 MB
CACHED_LENGTH = 100
MULTIPLIER = np.int64(0x1E3779B97F4A7C15)  # odd


class _WordsOfChunk(dict[str, tuple[str, ...]]):
    """A cache of chunk -> its words, because few different chunks make up most of any text."""

    def __missing__(self, chunk: str) -> tuple[str, ...]:
        words = _split_chunk(chunk)
        if len(chunk) <= CACHED_LENGTH:
            if len(self) >= CACHED_CHUNKS:
                self.clear()
            self[chunk] = words
        return words


_WORDS_OF = _WordsOfChunk()


def split_words(text: str) -> list[str]:
    """Return the words of a text, in order."""
    return list(chain.from_iterable(map(_WORDS_OF.__getitem__, text.split())))


def _split_chunk(chunk: str) -> tuple[str, ...]:
    if chunk.isalpha():
        return (chunk[:-3], chunk[-3:]) if chunk in ("cannot", "Cannot") else (chunk,)
    if not chunk.isascii() and SYMBOL.search(chunk):
        return tuple(chain.from_iterable(_split_edges(part) for part in SYMBOL.split(chunk) if part))
    return tuple(_split_edges(chunk))


def _split_edges(chunk: str) -> list[str]:
    """Split punctuation off both ends of a chunk, each character a word, and split the rest."""
    core = chunk.lstrip(PREFIXES)
    if core.startswith(".."):
        core = core[LEADING.match(core).end() :]  # type: ignore[union-attr]  # it always matches
    if core.startswith("+") and not core[1:2].isdecimal():
        core = core[1:]
    body = core.rstrip(SUFFIXES)
    n_before, tail = len(chunk) - len(core), core[len(body) :]
    if tail.startswith(".") and not tail.startswith("..") and _owns_its_dot(body):
        body, tail = body + ".", tail[1:]
    words = EDGE_WORD.findall(chunk[:n_before]) if n_before else []
    if body:
        words += _split_body(body)
    return words + EDGE_WORD.findall(tail) if tail else words


def _owns_its_dot(body: str) -> bool:
    """Tell whether the dot after `body` belongs to the word: yes in U.S., i.e. and b.; no in 3., end. and NASA."""
    if len(body) == 1 or ABBREVIATIONS.fullmatch(body):
        return body.isalpha() or len(body) > 1
    return body[-1:].isupper() and not body[-2:-1].isupper()


def _split_body(body: str) -> list[str]:
    """Split contractions, a unit sign after a number, and punctuation between letters; URLs stay whole."""
    if body.isidentifier() or body.isalnum():
        return [body]
    endings: list[str] = []
    if ("'" in body or "’" in body) and len(body) <= LONGEST:  # noqa: RUF001
        while found := CONTRACTION.match(body):
            body = found[1]
            endings.insert(0, found[2])
    if body[-1] in "%+$€£" and body[-2:-1].isdecimal():
        endings.insert(0, body[-1])
        body = body[:-1]
    parts = INFIX.split(body)
    if len(parts) == 1 or ("." in body and len(body) <= LONGEST and URL.match(body)):
        return [body, *endings]
    return [part for part in parts if part] + endings


def count_sentences(words: list[str]) -> int:
    """Return the number of sentences by spaCy's rule: one starts at the first word after sentence-final punctuation."""
    n, ended = 1, False
    for word in words:
        if word in TERMINAL_PUNCTUATION:
            ended = True
        elif ended and not all(unicodedata.category(character)[0] == "P" for character in word):
            n, ended = n + 1, False
    return n


class TextStatistics:
    """A text and what the rules need to know of it, each computed once, when first accessed."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        return split_words(self.text)

    @cached_property
    def counts(self) -> Counter[str]:
        """The frequency of each word, in the order of first occurrence."""
        return Counter(self.words)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Characters of each word. (words,)"""
        return np.fromiter(map(len, self.words), np.int64, len(self.words))

    @cached_property
    def hashes(self) -> NDArray[np.int64]:
        """A 64-bit hash of each word, valid in this process only, because Python salts them. (words,)"""
        return np.fromiter(map(hash, self.words), np.int64, len(self.words))

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Characters of all words before each one, and of all words at the end. (words + 1,)"""
        return np.concatenate(([0], self.lengths.cumsum()))

    def ngrams(self, n: int) -> NDArray[np.int64]:
        """Return a 64-bit hash of each n-gram of words: a polynomial in their hashes, modulo 2^64. (words - n + 1,)"""
        while len(self._ngrams) < n:
            self._ngrams.append(self._ngrams[-1][:-1] * MULTIPLIER + self.hashes[len(self._ngrams) :])
        return self._ngrams[n - 1]

    @cached_property
    def _ngrams(self) -> list[NDArray[np.int64]]:
        return [self.hashes]

    def ngram_lengths(self, n: int) -> NDArray[np.int64]:
        """Characters of each n-gram, without white space. (words - n + 1,)"""
        return self.ends[n:] - self.ends[: max(len(self.ends) - n, 0)]
