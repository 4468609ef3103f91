"""Recognize the splits that file and folder names tell, such as `wiki.valid.tokens` or `validation/data-00000.arrow`.

The words are those by which Hugging Face's `datasets` names splits.
"""

import glob
import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from data_tools.config import SourceConfig
from data_tools.readers.by_format import METADATA
from data_tools.readers.input_file import InputFile
from megagpt.data.manifest import Split
from megagpt.errors import UserError

WORDS: dict[str, Split] = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"test": "test", "testing": "test"},
}
WEAK_WORDS: dict[str, Split] = {"eval": "test", "evaluation": "test"}  # eval/val.jsonl is for validation


def split_in_names(path: str, given: Sequence[str]) -> Split | None:
    """Return the split that the names in a file's path tell; `given` are the source's paths, one of which led to it.

    The nearest folder decides, then the file's own name, and last the name of what the user gave: folders above that
    are the user's affair. Raises UserError for a name with words of two splits.
    """
    root, *folders, name = _names_from(path, given)
    for words, part in itertools.product((WORDS, WEAK_WORDS), (*reversed(folders), name, root)):
        found = {words[word] for word in re.split("[^a-z]+", part.lower()) if word in words}
        if len(found) > 1:
            raise UserError(
                f"{path}: {part!r} names several splits ({', '.join(sorted(found))}); rename it, or give its files "
                "by --input, --val and --test without splits=by-name"
            )
        if found:
            return found.pop()
    return None


def _names_from(path: str, given: Sequence[str]) -> list[str]:
    """Return the names in the path from the given folder on, or from the part of a glob before its first `*`.

    Of a file that was named itself: its folder and its name.
    """
    for one in given:
        root = one if "://" in one else str(Path(one).absolute())
        fixed = root if not glob.has_magic(root) else re.split(r"[*?\[]", root)[0].rpartition("/")[0]
        fixed = fixed.rstrip("/")
        if path.startswith(fixed + "/"):
            return [fixed.rpartition("/")[2], *path.removeprefix(fixed).strip("/").split("/")]
    return path.rstrip("/").split("/")[-2:]


def given_split(file: InputFile, source: SourceConfig) -> Split | None:
    """Return the split to which a file's documents are assigned; None if their hashes decide.

    With splits=by-name, what is named train is not held out: a split that nobody gave is a fraction of it.
    Raises UserError for a file whose name tells no split.
    """
    if source.split is not None or source.splits == "by-hash" or file.kind == METADATA:
        return source.split
    split = split_in_names(file.path, source.paths)
    if split is None:
        words = ", ".join([*WORDS, *WEAK_WORDS])
        raise UserError(
            f"splits=by-name: no name in {file.path} tells a split ({words}); rename it, leave it out with include, or "
            "give files by --input, --val and --test without splits=by-name"
        )
    return None if split == "train" else split


def names_like_splits(paths: Sequence[str], given: Sequence[str]) -> dict[Split, str]:
    """Return a file of each split that names tell, if most files have such names, of train and of another; or none."""
    found: dict[Split, list[str]] = {}
    for path in paths:
        try:
            split = split_in_names(path, given)
        except UserError:
            continue
        if split is not None:
            found.setdefault(split, []).append(path)
    named = sum(map(len, found.values()))
    is_likely = len(found) > 1 and "train" in found and 2 * named >= len(paths)
    return {split: files[0] for split, files in found.items()} if is_likely else {}
