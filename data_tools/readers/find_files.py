"""Find the files of a source: folders, globs and object stores, searched in a fixed order."""

import fnmatch
import glob
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from urllib.parse import unquote

from data_tools.config import SourceConfig
from data_tools.readers.by_format import FORMATS, METADATA, format_of
from data_tools.readers.hugging_face import NOT_DATA, folders_of_data, is_about_repository, is_in_cache, metadata_among
from data_tools.readers.input_file import InputFile
from data_tools.readers.open_file import COMPRESSIONS, reading
from data_tools.readers.remote_files import escape_folder, list_remote, open_file_system, path_in
from megagpt.config.mistakes import did_you_mean
from megagpt.errors import UserError
from megagpt.user_paths import similar_path

IGNORED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}  # as are hidden ones
LOCAL_SCHEMES = ("file://", "local://")
MOST_METADATA = 2**24  # bytes that are read of a file


Found = tuple[str, int, str, bool]
"""(path, size, state, named by the user): see InputFile."""


def find_files(source: SourceConfig, leave_out: Path | None = None) -> list[InputFile]:
    """Return the source's files in a fixed order: as given, folders and globs sorted.

    Files in `leave_out`, the output folder of the same build, are not found in folders, and refused if named.
    Raises UserError if there are no files, and for a format that does not exist.
    """
    known = {"auto", *FORMATS} - {METADATA}
    if source.format not in known:
        raise UserError(f"format={source.format!r} of {source.name} is unknown{did_you_mean(source.format, known)}")
    own = leave_out.resolve() if leave_out else None
    files = [file for path in source.paths for file in _find(path, source, own)]
    if not files:
        pattern = f" (with include={','.join(source.include)})" if source.include else ""
        raise UserError(f"there are no files to read in {', '.join(source.paths)}{pattern}; give other paths")
    return files


def _find(path: str, source: SourceConfig, own: Path | None) -> Iterator[InputFile]:
    if not path:
        raise UserError("an input path is empty, perhaps an unset variable; give a file, a folder or `.`")
    with reading(path):
        find = _find_local(_local(path), source.include, own) if _is_local(path) else _find_remote(path, source.include)
        files = list(find)
        metadata = _metadata_among(files, path, source)
    for found, size, state, named in files:
        if named and PurePath(found).name in NOT_DATA:
            raise UserError(f"{found} is metadata of a Hugging Face dataset; give the folder {PurePath(found).parent}")
        if named and not source.include and is_about_repository(found, _local_text_of):
            folder, name = found.rsplit("/", 1)
            raise UserError(
                f"{found} is beside a Hugging Face dataset, but no data; give the folder {folder}, or, to read "
                f"this file, --input {shlex.quote(folder)} and include={shlex.quote(name)}"
            )
        is_data = found not in metadata
        kind, compression = _format_and_compression(found, source.format) if is_data else (METADATA, "")
        yield InputFile(found, kind, compression, size, state, named, source.encoding)


def _metadata_among(files: Sequence[Found], path: str, source: SourceConfig) -> set[str]:
    """Return the paths of those files, found in the folder `path`, that are a Hugging Face dataset's metadata."""
    paths = [found for found, _, _, named in files if not named]
    if not paths:
        return set()
    listed = set(paths)

    def read(name: str) -> str:
        # a store may answer with any error to a question about a file that it does not list
        return _text_of(name) if "://" not in name or name in listed else ""

    root = os.path.abspath(_local(path)) if _is_local(path) else path.rstrip("/")
    return metadata_among(paths, root, read, is_selected=bool(source.include))


def _text_of(path: str) -> str:
    """Return the text of a small file; empty if there is no such file on this machine."""
    if "://" in path:
        fs, inside = open_file_system(path)
        content: bytes = fs.cat_file(inside, end=MOST_METADATA)
        return content.decode(errors="replace")
    try:
        with open(path, "rb") as file:
            return file.read(MOST_METADATA).decode(errors="replace")
    except OSError:
        return ""


def _local_text_of(path: str) -> str:
    return "" if "://" in path else _text_of(path)


def _is_local(path: str) -> bool:
    return "://" not in path or path.startswith(LOCAL_SCHEMES)


def _local(path: str) -> str:
    """Return a path without file://; what comes after may be a path as it stands or percent-encoded, as in a URI."""
    if not path.startswith(LOCAL_SCHEMES):
        return path
    path = path.partition("://")[2]
    return path if os.path.lexists(path) else unquote(path)


def _find_local(path: str, include: Sequence[str], own: Path | None) -> Iterator[Found]:
    if own is not None and Path(path).resolve().is_relative_to(own):
        raise UserError(f"{path} is in the output folder, {own}; give another --out, or leave it out")
    if Path(path).is_dir():
        yield from (_found(found, named=False) for found in _files_in(Path(path), include, own))
    elif Path(path).is_file():
        if Path(path).stat().st_size == 0:
            raise UserError(f"{path} is empty; leave it out")
        yield _found(Path(path).absolute(), named=True)
    elif Path(path).exists():
        raise UserError(f"{path} is a pipe or a device, and input is read several times; write it to a file")
    elif glob.has_magic(path) and (matches := sorted(glob.glob(escape_folder(path, os.path.isdir), recursive=True))):
        yield from (_found(found, named=False) for found in _matched(matches, include, own))
    else:
        hint = "; key=value options go after --out or before --input" if "=" in Path(path).name else ""
        if near := similar_path(Path(path), lambda other: True):
            hint = f"; did you mean {near}?"
        raise UserError(f"{path}: there is no such file or folder{hint}")


def _found(path: Path, *, named: bool) -> Found:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the file name {str(path)!r} is not UTF-8; rename it or leave it out") from error
    stat = path.stat()
    return str(path), stat.st_size, f"{stat.st_mtime_ns}", named


def _matched(matches: Sequence[str], include: Sequence[str], own: Path | None) -> Iterable[Path]:
    """Return the files among the matches of a glob or, if all are folders, the files in them."""
    paths = [Path(match).absolute() for match in matches]
    paths = [path for path in paths if own is None or not path.resolve().is_relative_to(own)]
    files = [path for path in paths if path.is_file()]
    return files or dict.fromkeys(file for path in paths for file in _files_in(path, include, own))


def _files_in(root: Path, include: Sequence[str], own: Path | None) -> list[Path]:
    paths = list(_walk(root, include, own))
    files = [path for path in paths if not path.is_symlink() or is_in_cache(path)]
    if paths and not files:
        pattern = root / os.path.relpath(paths[0].parent, root.absolute()) / ("*" + paths[0].suffix)
        raise UserError(
            f"{root} holds only symbolic links, which are not followed in folders; name them or give a "
            f"pattern such as '{pattern}'"
        )
    return files


def _walk(root: Path, include: Sequence[str], own: Path | None) -> Iterator[Path]:
    for folder, folders, names in os.walk(root.absolute(), onerror=_refuse):
        wanted = [name for name in folders_of_data(Path(folder), folders) if _is_wanted_folder(name)]
        folders[:] = sorted(name for name in wanted if Path(folder, name).resolve() != own)
        for name in sorted(names):
            path = Path(folder, name)
            if _is_wanted(name, include) and (is_in_cache(path) or path.is_file()):
                yield path


def _is_wanted_folder(name: str) -> bool:
    return name not in IGNORED_FOLDERS and not name.startswith(".")


def _is_wanted(name: str, include: Sequence[str]) -> bool:
    return _is_included(name, include) and not name.startswith(".")


def _is_included(name: str, include: Sequence[str]) -> bool:
    return not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; repair it or leave it out")


def _find_remote(url: str, include: Sequence[str]) -> Iterator[Found]:
    for file in list_remote(url):
        if file.named or (all(map(_is_wanted_folder, file.found)) and _is_included(file.name, include)):
            yield file.url, file.size, file.state, file.named


def _format_and_compression(path: str, given: str) -> tuple[str, str]:
    """Return (format, codec) of a file, by its name and the `format` option."""
    name = (path_in(path) if "://" in path else path).lower()
    ending = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    found = format_of(name.removesuffix(ending))
    # format=csv reads .tsv files too, with tabs
    if given != "auto" and (given, found) != ("csv", "tsv"):
        found = given
    if ending and not FORMATS[found].compressible:
        raise UserError(f"{path}: a {found} file is read in parts, so it cannot be compressed as a whole; unpack it")
    return found, COMPRESSIONS.get(ending, "")
