"""A corpus of any size for the benchmarks of the builder, made of this machine's own text: Python and its packages.

python tests/benchmarks/corpus.py OUT.jsonl --megabytes 64
"""

import argparse
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

FOLDERS = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc")
SUFFIXES = {".py", ".md", ".rst", ".txt"}
DOCUMENT_CHARACTERS = 4000  # about


def jsonl_corpus(path: Path, n_bytes: int, seed: int, *, near_duplicates: float = 0.0) -> int:
    """Write {"text": ...} lines until the texts have n_bytes in UTF-8; returns the number of documents.

    Files come in a random order, and `near_duplicates` of the documents are edited copies of earlier ones, their
    expected Jaccard similarity one of 0.5, 0.6, 0.7, 0.8, 0.9. The same on the same machine, until a package changes.
    """
    rng = random.Random(seed)
    files = _files()
    rng.shuffle(files)
    kept: list[str] = []
    written = n_documents = 0
    with path.open("w", encoding="utf-8") as out:
        for text in (text for file in files for text in _documents(file)):
            copy = bool(kept) and rng.random() < near_duplicates
            if copy:
                text = near_duplicate(rng.choice(kept), rng.choice([0.5, 0.6, 0.7, 0.8, 0.9]), rng)
            elif near_duplicates and len(kept) < 10_000:
                kept.append(text)
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            n_documents += 1
            written += len(text.encode())
            if written >= n_bytes:
                return n_documents
    raise SystemExit(f"this machine has {written} bytes of text, not {n_bytes}; ask for fewer")


def near_duplicate(text: str, jaccard: float, rng: random.Random, *, ngram: int = 5) -> str:
    """The text with words replaced at random, so that the expected Jaccard similarity of their n-grams is as given.

    With a share p of words replaced, an n-gram survives with probability c = (1 - p)^n, and the similarity of two
    sets of equal size with a share c in common is c / (2 - c).
    """
    replaced = 1 - (2 * jaccard / (1 + jaccard)) ** (1 / ngram)
    return re.sub(r"\w+", lambda word: f"w{rng.getrandbits(40):x}" if rng.random() < replaced else word[0], text)


def _files() -> list[Path]:
    """Sorted, each once: the packages' folder lies within the library's."""
    found = {path for folder in FOLDERS for path in Path(folder).rglob("*") if path.suffix in SUFFIXES}
    return sorted(path for path in found if path.is_file() and not path.is_symlink())


def _documents(path: Path) -> Iterator[str]:
    """The file cut at ends of lines; files that are not UTF-8 are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except ValueError:
        return
    gathered: list[str] = []
    size = 0
    for line in lines:
        gathered.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS:
            yield "".join(gathered)
            gathered, size = [], 0
    if size:
        yield "".join(gathered)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--megabytes", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--near-duplicates", type=float, default=0.0, help="share of edited copies")
    args = parser.parse_args()
    n = jsonl_corpus(args.out, args.megabytes * 10**6, args.seed, near_duplicates=args.near_duplicates)
    print(f"{n} documents in {args.out}")
