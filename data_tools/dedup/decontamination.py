"""Training documents that contain what the model will be tested on are found by runs of words they share.

The rule of GPT-3 (Brown et al., 2020, appendix C: runs of 13 words) as datatrove's n-gram filter applies it: a
document with a run in common is left out as a whole. Words are those of `data_tools.dedup.ngrams`.
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
    ngram: int = Field(default=13, gt=0, description="words in a run; a text with fewer is not looked for")
    min_hits: int = Field(default=1, gt=0, description="a document with so many different runs in common is left out")


def write_ngrams(texts: Iterable[Iterable[str]], out: Path, cfg: DecontaminationConfig) -> dict[str, int]:
    """The runs of texts, each given in pieces, as a .npy file of rising uint64; how many texts, how many of them too
    short for a run, how many runs.

    Raises UserError if there are none to look for. Memory: 24 bytes for each run of the texts.
    """
    runs = [np.concatenate([np.empty(0, np.uint64), *_runs(pieces, cfg.ngram)]) for pieces in texts]
    unique = np.unique(np.concatenate([np.empty(0, np.uint64), *runs]))
    if not len(unique):
        raise UserError(
            f"decontamination: none of {len(runs)} texts has a run of ngram={cfg.ngram} words; set a smaller ngram"
        )
    with written(out) as temporary, temporary.open("wb") as file:
        np.save(file, unique)
    return {"texts": len(runs), "short": sum(len(found) == 0 for found in runs), "ngrams": len(unique)}


def read_ngrams(path: Path) -> np.ndarray:
    """The runs, memory-mapped."""
    ngrams: np.ndarray = np.load(path, mmap_mode="r")
    return ngrams


def is_contaminated(pieces: Iterable[str], ngrams: np.ndarray, cfg: DecontaminationConfig) -> bool:
    """Whether a text, given in pieces, has cfg.min_hits different runs among `ngrams`, which are `read_ngrams`'."""
    found: set[int] = set()
    for runs in _runs(pieces, cfg.ngram):
        runs = np.sort(runs)  # in order, the search goes through memory once
        at = np.minimum(np.searchsorted(ngrams, runs), len(ngrams) - 1)
        found.update(runs[ngrams[at] == runs].tolist())
        if len(found) >= cfg.min_hits:
            return True
    return False


def _runs(pieces: Iterable[str], n: int) -> Iterator[np.ndarray]:
    """The hashes of a text's runs of n words; a piece is cut between words, and its last ones go on in the next."""
    last = np.empty(0, np.uint64)
    for text in pieces:
        words = np.concatenate([last, word_hashes(text)])
        yield ngram_hashes(words, n)
        last = words[len(words) - min(n - 1, len(words)) :]
