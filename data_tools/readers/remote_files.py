"""Find files behind a URL. A URL names an object before it is a folder, and either before it is a pattern."""

import glob
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import fsspec
from fsspec.archive import AbstractArchiveFileSystem

from megagpt.errors import UserError

STATES = ("ETag", "etag", "md5Hash", "mtime", "LastModified")  # keys by which object stores report a changed file
# Joins file systems in fsspec; in a key, it is two letters. As one string it would look like an address to listen on.
CHAIN = ":" * 2
VERSION_ID = "?versionId="  # s3fs reads what follows it in a URL as the version of the object


class RemoteFile(NamedTuple):
    url: str
    size: int
    state: str  # changes when the file does
    named: bool  # by the user, rather than found in a folder or by a pattern
    found: tuple[str, ...]  # the folders, and the name, that the user did not write

    @property
    def name(self) -> str:
        return path_in(self.url).rpartition("/")[2]


def open_file_system(url: str) -> tuple[Any, str]:
    """Return (file system, path in it) of a URL.

    Credentials and endpoints come from the environment, as fsspec documents.
    """
    try:
        if _is_chain(url):
            return fsspec.core.url_to_fs(url)
        # without any :: of the key, which fsspec takes for a chain
        fs, _ = fsspec.core.url_to_fs(url.partition(CHAIN)[0])
        return fs, fs._strip_protocol(url)
    except ImportError as error:
        raise UserError(f"{url} needs another package: {error}; install it with pip") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{url}: {error}; give a path, or a URL such as s3://bucket/a.jsonl") from error


def _is_chain(url: str) -> bool:
    """Tell whether `::` joins file systems, as in zip://a.jsonl::s3://bucket/a.zip, rather than stands in a key."""
    first, *rest = url.split(CHAIN)
    if not rest or "://" not in first or any("://" in part for part in rest):
        return bool(rest)
    return issubclass(fsspec.get_filesystem_class(first.partition("://")[0]), AbstractArchiveFileSystem)


def path_in(url: str) -> str:
    """Return a URL without what is no part of the file's path: other links of a chain, a query, a version."""
    if _is_chain(url):
        outer, _, inner = url.partition(CHAIN)
        url = outer if "://" in outer else inner
    if url.startswith(("http://", "https://")):
        return url.partition("?")[0].partition("#")[0]
    return url.partition(VERSION_ID)[0]


def list_remote(url: str) -> list[RemoteFile]:
    """Return the file that a URL names, or the files of the folder, or those that match the pattern, in order.

    Raises UserError if there is none, and for an object that could not be opened by the URL that names it.
    """
    fs, root = open_file_system(url)
    fs.invalidate_cache()  # what earlier listings left there: it may be old
    info = _info_of(fs, root)
    is_file = info is not None and info["type"] == "file" and not url.endswith("/") and not _is_index_page(url, info)
    if info is not None and is_file and info["size"] != 0:
        return [_remote_file(fs, url, root, info, named=True)]
    if info is not None and (files := _files_below(fs, root)):
        return [_remote_file(fs, url, path, below, unwritten=path[len(root) :]) for path, below in files]
    if is_file:
        raise UserError(f"{url} is empty; leave it out")
    if info is not None and info["type"] == "directory" and not glob.has_magic(root):
        return []
    if not glob.has_magic(root) or not (matches := fs.glob(escape_folder(root, fs.isdir), detail=True)):
        raise UserError(f"{url}: there is no such file or folder")
    matched = [(path, match) for path, match in sorted(matches.items()) if match["type"] == "file"]
    matched = [file for file in matched if not _is_marker(*file)]
    files = matched or [file for folder in sorted(matches) for file in _files_below(fs, folder)]
    return [_remote_file(fs, url, path, match, unwritten=_unwritten(path, root)) for path, match in files]


def escape_folder(pattern: str, is_folder: Callable[[str], bool]) -> str:
    """Escape the longest folder of a pattern that exists as it is written: odd[1] in odd[1]/*.jsonl."""
    folder = pattern.rpartition("/")[0]
    while glob.has_magic(folder):
        if is_folder(folder):
            return glob.escape(folder) + pattern[len(folder) :]
        folder = folder.rpartition("/")[0]
    return pattern


def _info_of(fs: Any, path: str) -> dict[str, Any] | None:
    try:
        info: dict[str, Any] = fs.info(path)
    except FileNotFoundError as error:
        cause = error.__cause__
        if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", 0) != 404:
            raise UserError(f"{fs.unstrip_protocol(path)} cannot be reached: {cause}") from error
        return None
    return info


def _is_index_page(url: str, info: dict[str, Any]) -> bool:
    """Tell whether a web server answered with the page that lists a folder."""
    return info.get("mimetype") == "text/html" and not url.lower().endswith((".html", ".htm"))


def _files_below(fs: Any, folder: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (path, info) of the objects in a folder, without the empty ones by which stores mark folders."""
    prefix = folder.rstrip("/") + "/" if folder else ""
    infos = {path: info for path, info in fs.find(folder, detail=True).items() if path != folder}
    if wrong := next((path for path in infos if not path.startswith(prefix)), None):
        # s3fs lists dir/ where //dir/ is asked for
        raise UserError(f"{fs.unstrip_protocol(folder)} cannot be listed: the store answers with {wrong!r}; name files")
    return [file for file in sorted(infos.items()) if not _is_marker(*file)]


def _is_marker(path: str, info: dict[str, Any]) -> bool:
    return path.endswith("/") and info["size"] == 0


def _unwritten(path: str, pattern: str) -> str:
    """Return the parts of a path that no part of the pattern spells; one that starts with a wildcard spells none."""
    spelled = [part for part in pattern.split("/") if not glob.has_magic(part[:1])]
    return "/".join(part for part in path.split("/") if not any(fnmatchcase(part, known) for known in spelled))


def _remote_file(
    fs: Any, url: str, path: str, info: dict[str, Any], *, named: bool = False, unwritten: str = ""
) -> RemoteFile:
    own_url = fs.unstrip_protocol(path)
    if _is_chain(url):
        outer, _, inner = url.partition(CHAIN)
        own_url = f"{own_url}{CHAIN}{inner}" if "://" in outer else f"{outer}{CHAIN}{own_url}"
    elif not named and (fs._strip_protocol(own_url) != path or VERSION_ID in path):
        raise UserError(f"{own_url!r} has a key that no URL can name; copy it to another key, or name the other files")
    if info["size"] is None and not named:
        info = fs.info(path)  # the page by which a web server lists a folder tells no sizes
    if info["size"] is None:
        raise UserError(f"{own_url} does not tell its size; download it and give the file")
    state = next((str(info[key]) for key in STATES if key in info), "")
    return RemoteFile(own_url, info["size"], state, named, tuple(part for part in unwritten.split("/") if part))
