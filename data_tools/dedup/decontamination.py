"""Find documents that share n-grams of words with test sets: the algorithm (its tasks: stages/deduplicate.py).

The rule is GPT-3's (Brown et al. 2020, appendix C: 13-grams) as datatrove's n-gram filter applies it: a document that
shares an n-gram is dropped as a whole. Words are those of `ngrams.py`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from data_tools.dedup.ngrams import ngram_hashes, word_hashes
from data_tools.option_types import Paths
from megagpt.atomic_files import written
from megagpt.config.parsing import Strict
from megagpt.errors import UserError


class DecontaminationConfig(Strict):
    files: Paths = Field(default=(), description="test sets, text or .jsonl; none: no decontamination")
    ngram: int = Field(
        default=13, gt=0, le=10_000, description="words in an n-gram; a shorter test text is not looked for"
    )
    min_hits: int = Field(
        default=1, gt=0, le=10**12, description="drop a document that shares this many different n-grams"
    )


def write_ngrams(texts: Iterable[Iterable[str]], out: Path, cfg: DecontaminationConfig) -> dict[str, int]:
    """Write the n-grams of the test texts, each given in pieces, as a .npy file of sorted uint64.

    Returns counts: texts, texts too short for an n-gram, different n-grams. Raises UserError if there are none to look
    for. Memory: 24 bytes per n-gram.
    """
    per_text = [np.concatenate([np.empty(0, np.uint64), *_ngrams(pieces, cfg.ngram)]) for pieces in texts]
    unique = np.unique(np.concatenate([np.empty(0, np.uint64), *per_text]))
    if not len(unique):
        raise UserError(
            f"decontamination.ngram={cfg.ngram}: none of {len(per_text)} texts has that many words; set a smaller one"
        )
    with written(out) as temporary, temporary.open("wb") as file:
        np.save(file, unique)
    return {"texts": len(per_text), "short": sum(len(found) == 0 for found in per_text), "ngrams": len(unique)}


def read_ngrams(path: Path) -> np.ndarray:
    """Return the n-grams that write_ngrams wrote, memory-mapped."""
    ngrams: np.ndarray = np.load(path, mmap_mode="r")
    return ngrams


def is_contaminated(pieces: Iterable[str], ngrams: np.ndarray, cfg: DecontaminationConfig) -> bool:
    """Tell whether a text, given in pieces, has at least cfg.min_hits different n-grams among the sorted `ngrams`."""
    found: set[int] = set()
    for own in _ngrams(pieces, cfg.ngram):
        own = np.sort(own)  # so that the search reads memory in order
        at = np.minimum(np.searchsorted(ngrams, own), len(ngrams) - 1)
        found.update(own[ngrams[at] == own].tolist())
        if len(found) >= cfg.min_hits:
            return True
    return False


def _ngrams(pieces: Iterable[str], n: int) -> Iterator[np.ndarray]:
    """Yield the n-gram hashes of a text piece by piece. Pieces are cut between words; n-grams span the cuts."""
    last = np.empty(0, np.uint64)
    for text in pieces:
        words = np.concatenate([last, word_hashes(text)])
        yield ngram_hashes(words, n)
        last = words[len(words) - min(n - 1, len(words)) :]
