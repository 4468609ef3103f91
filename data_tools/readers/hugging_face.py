"""Tell the data of a Hugging Face dataset from what lies beside it: a saved, a cached, a cloned or a downloaded one."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.formatting import listed
from megagpt.errors import UserError

NOT_DATA = frozenset(["dataset_dict.json", "dataset_info.json", "dataset_infos.json"])  # wherever they are found
TABLES = (".arrow", ".parquet")
UNFINISHED = ("cache-", "tmp")  # how the names begin of what map(), filter() and an unfinished download leave
# lines of .gitattributes, as the hub writes it: `git lfs track` adds one of them to any repository
HUB_LINES = ("*.arrow filter=lfs", "*.parquet filter=lfs", "saved_model/**/* filter=lfs")
ABOUT = re.compile(r"(\.git.*|(readme|licen[cs]e|citation)([._-][\w-]+)?(\.(md|rst|txt|cff|bib))?)", re.IGNORECASE)
FIGURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")
CARD = ("annotations_creators:", "configs:", "dataset_info:", "pretty_name:", "size_categories:", "task_categories:")
CACHE = {"blobs", "refs", "snapshots"}  # the folders of a repository in the hub's cache

Read = Callable[[str], str]
"""read(path): a small file's text; empty if there is none."""


def metadata_among(paths: Sequence[str], root: str, read: Read, *, is_selected: bool) -> set[str]:
    """Return those of the files found in the folder `root` that are not data. Raises UserError if some are missing.

    The user who selects files by `include` knows which of a repository's are data.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders[folder].append(name)
    left_out = {path for path in paths if PurePosixPath(path).name in NOT_DATA}
    for folder, names in folders.items():
        if any(name.endswith(TABLES) for name in names):
            left_out |= {f"{folder}/{name}" for name in _not_data(folder, names, read, is_selected=is_selected)}
    with_readme = sorted((folder for folder, names in folders.items() if "README.md" in names), key=len)
    # behind a URL each file that is opened takes long
    candidates = {root, *(with_readme[:1] if "://" in root else with_readme)}
    if not is_selected:
        for repository in (folder for folder in candidates if _is_repository(folder, read)):
            left_out |= {path for path in paths if _is_about(path, repository)}
    return left_out


def _is_about(path: str, repository: str) -> bool:
    """Tell whether a file is about the data of the repository: README, license, figures, loading script."""
    folder, _, name = path.rpartition("/")
    if not path.startswith(f"{repository}/"):
        return False
    is_script = folder == repository and name.endswith(".py")
    return is_script or name.lower().endswith(FIGURES) or bool(ABOUT.fullmatch(name))


def is_about_repository(path: str, read: Read) -> bool:
    """Tell whether a file is in the root of a dataset's repository, and about its data."""
    folder = path.rpartition("/")[0]
    return _is_about(path, folder) and _is_repository(folder, read)


def _not_data(folder: str, names: Iterable[str], read: Read, *, is_selected: bool) -> set[str]:
    """Return what is not data in a folder that `datasets` may have written: nothing, if it has not."""
    state = _parsed(read(f"{folder}/state.json"))
    if "_data_files" in state:
        data = {file["filename"] for file in state["_data_files"]}
        if not is_selected and (missing := sorted(data - set(names))):
            raise UserError(f"{folder}/state.json lists {missing[0]}, which is not there; copy it too")
    elif "features" in _parsed(read(f"{folder}/dataset_info.json")):
        data = {name for name in names if name.endswith(TABLES) and not name.startswith(UNFINISHED)}
    else:
        return set()
    return set(names) - data


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_repository(folder: str, read: Read) -> bool:
    """Tell whether a folder is a clone or a copy of a dataset's repository on the hub."""
    if folder.startswith("hf://") or _has_hub_lines(read(f"{folder}/.gitattributes")):
        return True
    text = read(f"{folder}/README.md").replace("\r\n", "\n")
    card = text.removeprefix("---\n").partition("\n---")[0] if text.startswith("---\n") else ""
    return any(line.startswith(CARD) for line in card.splitlines())


def _has_hub_lines(attributes: str) -> bool:
    return all(line in attributes for line in HUB_LINES)


def folders_of_data(folder: Path, names: Sequence[str]) -> list[str]:
    """Return those of the folders in a folder that may hold data: of a cache, the current revision's alone.

    Raises UserError if it is not known which of several revisions is meant.
    """
    if set(names) >= CACHE:
        return ["snapshots"]
    if folder.name == "snapshots" and (folder.parent / "blobs").is_dir():
        main = folder.parent / "refs" / "main"
        revision = main.read_text().strip() if main.is_file() else names[0] if len(names) == 1 else ""
        if revision not in names:
            raise UserError(f"{folder} holds several revisions: {listed(sorted(names))}; give the folder of one")
        return [revision]
    is_cache = folder.parts[-2:] == ("huggingface", "datasets")
    return [name for name in names if not name.endswith(".incomplete") and not (is_cache and name == "downloads")]


def is_in_cache(path: Path) -> bool:
    """Tell whether a file is a link into the hub's cache. Raises UserError if its download was not finished."""
    blob = path.resolve()
    is_blob = path.is_symlink() and blob.parent.name == "blobs" and (blob.parents[1] / "snapshots").is_dir()
    if is_blob and not blob.is_file():
        raise UserError(f"{path} is not downloaded, or not to its end; download the dataset again")
    return is_blob
