"""Inputs to units of work: find the files, here or in an object store, and cut them into slices of similar size.

Units depend on the inputs alone, never on the number of workers, so neither does anything built from them.
"""

import fnmatch
import glob
import io
import lzma
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.config import Format, SourceConfig
from data_tools.encodings import has_plain_newlines, marked
from megagpt.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "warc", "html"]
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".warc": "warc",
    ".html": "html",
    ".htm": "html",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
LEFT_OUT = {"__pycache__", "site-packages", "dist-packages", "node_modules"}  # and everything hidden
MIN_UNIT_BYTES, MAX_UNIT_BYTES = 2**23, 2**28
STATES = ("ETag", "etag", "md5Hash", "mtime", "LastModified")  # how object stores tell that a file was replaced
UNITS = 1000  # about so many, between those sizes
EXPANSION = 4  # of compressed text: a guess, for planning only


@dataclass(frozen=True)
class InputFile:
    path: str  # absolute, or a URL
    kind: Kind
    compression: str  # "" is none
    size: int  # bytes
    state: str  # changes when the file does
    named: bool  # by the user, rather than found in a folder
    encoding: str  # that was asked for


@dataclass(frozen=True)
class Slice:
    """A part of one file: bytes of JSON lines, row groups of Parquet, record batches of Arrow, all of anything else."""

    file: InputFile
    start: int
    end: int
    size: int  # of its text, roughly


@dataclass(frozen=True)
class Unit:
    """What one task reads: slices of one source."""

    source: str
    slices: tuple[Slice, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.slices)


def find_files(source: SourceConfig, leave_out: Path | None = None) -> list[InputFile]:
    """The source's files in a fixed order: as given, folders and globs sorted. Raises UserError if there are none.

    What is in `leave_out`, the output of the same build, is no input: not found in folders, and refused if given.
    """
    own = leave_out.resolve() if leave_out else None
    files = [file for path in source.paths for file in _find(path, source, own)]
    if not files:
        pattern = f" (with include={','.join(source.include)})" if source.include else ""
        raise UserError(f"no files to read in {', '.join(source.paths)}{pattern}")
    return files


def plan_units(sources: Sequence[tuple[str, Sequence[InputFile]]]) -> list[Unit]:
    """Consecutive slices of each source, in units of similar size."""
    total = sum(file.size for _, files in sources for file in files)
    unit_bytes = min(max(total // UNITS, MIN_UNIT_BYTES), MAX_UNIT_BYTES)
    units = []
    for name, files in sources:
        slices: list[Slice] = []
        for piece in (piece for file in files for piece in _slices(file, unit_bytes)):
            slices.append(piece)
            if sum(piece.size for piece in slices) >= unit_bytes:
                units.append(Unit(name, tuple(slices)))
                slices = []
        if slices:
            units.append(Unit(name, tuple(slices)))
    return units


@contextmanager
def open_bytes(file: InputFile) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed, as a stream that may be read in blocks of any size.

    Raises UserError for what cannot be reached, is no archive, or was cut off.
    """
    with reading(file.path), _open(file.path) as raw:
        if file.compression == "xz":
            yield io.BufferedReader(_Xz(raw), 2**20)
        elif file.compression:  # Arrow's, because it alone notices a truncated .zst
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), file.compression))
        else:
            yield raw


@contextmanager
def reading(path: str) -> Iterator[None]:
    """What goes wrong while a file is read is the file's fault, and says so."""
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise UserError(f"cannot read {path}: {error or type(error).__name__}; repair it or leave it out") from error
    except Exception as error:
        if "://" in path and not isinstance(error, AssertionError | TypeError | AttributeError | LookupError):
            raise UserError(f"cannot read {path}: {type(error).__name__}: {error}") from error  # a store's own kinds
        raise


class _Xz(io.RawIOBase):
    """The streams of an .xz file. Unlike lzma.open, it refuses whatever else comes behind them."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._stream = raw, lzma.LZMADecompressor(lzma.FORMAT_XZ)

    def readable(self) -> bool:
        return True

    def readinto(self, target: "WriteableBuffer") -> int:
        view, data = memoryview(target).cast("B"), b""
        while not data:
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(b"\0")  # padding
                while not packed:
                    if not (block := self._raw.read(2**16)):
                        return 0
                    packed = block.lstrip(b"\0")
                self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            else:
                packed = self._raw.read(2**16) if self._stream.needs_input else b""
                if self._stream.needs_input and not packed:
                    raise EOFError("it ends within a stream")
            data = self._stream.decompress(packed, len(view))
        view[: len(data)] = data
        return len(data)


def _open(path: str) -> IO[bytes]:
    if "://" not in path:
        return Path(path).open("rb")
    fs, inside = _remote(path)
    return io.BufferedReader(fs.open(inside, "rb", block_size=2**23))  # which knows readline(limit); its files do not


def _remote(url: str) -> tuple[Any, str]:
    """(file system, path in it). Credentials and endpoints come from the environment, as fsspec documents it."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs another package: {error}; install it with pip") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; give a path, or a URL such as s3://bucket/a.jsonl") from error


def _find(path: str, source: SourceConfig, own: Path | None) -> Iterator[InputFile]:
    include = source.include
    files = _find_remote(path, include) if "://" in path else _find_local(path, include, own)
    for found, size, state, named in files:
        kind, compression = _kind(found, source.format)
        yield InputFile(found, kind, compression, size, state, named, source.encoding)


Found = tuple[str, int, str, bool]  # path, size, state, named by the user


def _find_local(path: str, include: Sequence[str], own: Path | None) -> Iterator[Found]:
    if own is not None and Path(path).resolve().is_relative_to(own):
        raise UserError(f"{path} is in the output folder, {own}; give another --out, or leave it out")
    if Path(path).is_dir():
        yield from (_found(found, named=False) for found in _files_in(Path(path), include, own))
    elif Path(path).is_file():
        if Path(path).stat().st_size == 0:
            raise UserError(f"{path} is empty; leave it out")
        yield _found(Path(path).absolute(), named=True)
    elif glob.has_magic(path) and (matches := sorted(glob.glob(path, recursive=True))):
        yield from (_found(found, named=False) for found in _matched(matches, include, own))
    else:
        hint = "; key=value options go after --out or before --input" if "=" in Path(path).name else ""
        raise UserError(f"{path}: there is no such file or folder{hint}")


def _found(path: Path, *, named: bool) -> Found:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{str(path)!r} is no name in UTF-8; rename it or leave it out") from error
    stat = path.stat()
    return str(path), stat.st_size, f"{stat.st_mtime_ns}", named


def _matched(matches: Sequence[str], include: Sequence[str], own: Path | None) -> Iterable[Path]:
    """The files among the matches or, if there are only folders, what is in them."""
    paths = [Path(match).absolute() for match in matches]
    paths = [path for path in paths if own is None or not path.resolve().is_relative_to(own)]
    files = [path for path in paths if path.is_file()]
    return files or dict.fromkeys(file for path in paths for file in _files_in(path, include, own))


def _files_in(root: Path, include: Sequence[str], own: Path | None) -> list[Path]:
    paths = list(_walk(root, include, own))
    files = [path for path in paths if not path.is_symlink()]
    if paths and not files:
        pattern = root / os.path.relpath(paths[0].parent, root.absolute()) / ("*" + paths[0].suffix)
        raise UserError(
            f"{root} holds only symbolic links, which are not followed in folders; give them by their names or by a "
            f"pattern such as '{pattern}'"
        )
    return files


def _walk(root: Path, include: Sequence[str], own: Path | None) -> Iterator[Path]:
    for folder, folders, names in os.walk(root.absolute(), onerror=_refuse):
        folders[:] = sorted(name for name in folders if _is_wanted_folder(name) and Path(folder, name).resolve() != own)
        for name in sorted(names):
            path = Path(folder, name)
            if _is_wanted(name, include) and path.is_file():
                yield path


def _is_wanted_folder(name: str) -> bool:
    return name not in LEFT_OUT and not name.startswith(".")


def _is_wanted(name: str, include: Sequence[str]) -> bool:
    matches = not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
    return matches and not name.startswith(".")


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename}: {error.strerror}; repair it or leave it out")


def _find_remote(url: str, include: Sequence[str]) -> Iterator[Found]:
    fs, root = _remote(url)
    with reading(url):
        if glob.has_magic(root):
            infos, named = fs.glob(root, detail=True), False
        elif fs.isdir(root):
            infos, named = fs.find(root, detail=True), False
        elif fs.exists(root):
            infos, named = {root: fs.info(root)}, True
        else:
            raise UserError(f"{url}: there is no such file or folder")
        for found, info in sorted(infos.items()):
            *folders, name = PurePosixPath(found.removeprefix(root)).parts if not named else (found,)
            unwanted = not all(map(_is_wanted_folder, (part for part in folders if part != "/")))
            if info["type"] != "file" or (not named and (unwanted or not _is_wanted(name, include))):
                continue
            state = next((str(info[key]) for key in STATES if key in info), "")
            yield fs.unstrip_protocol(found), info["size"], state, named


def _kind(path: str, given: Format) -> tuple[Kind, str]:
    """(kind, compression) by the name's endings; what is not known there is text."""
    name = path.lower()
    ending = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    name = name.removesuffix(ending)
    kind: Kind = next((kind for suffix, kind in KINDS.items() if name.endswith(suffix)), "text")
    if given != "auto" and (given, kind) != ("csv", "tsv"):
        kind = given
    if ending and kind in ("parquet", "arrow"):
        raise UserError(f"{path}: a {kind} file is read at any place, so it cannot be compressed as a whole; unpack it")
    return kind, COMPRESSIONS.get(ending, "")


def _slices(file: InputFile, unit_bytes: int) -> Iterator[Slice]:
    if not file.size:
        yield Slice(file, 0, 0, 0)
    elif file.kind == "jsonl" and not file.compression and _can_be_cut(file):
        for start in range(0, file.size, unit_bytes):
            end = min(start + unit_bytes, file.size)
            yield Slice(file, start, end, end - start)
    elif file.kind in ("parquet", "arrow"):
        groups = ROW_GROUPS[file.kind](file)
        yield from (Slice(file, i, i + 1, size) for i, size in enumerate(groups))
        if not groups:
            yield Slice(file, 0, 0, 0)
    else:
        yield Slice(file, 0, file.size, file.size * (EXPANSION if file.compression else 1))


def _can_be_cut(file: InputFile) -> bool:
    """At byte 10, because that ends a line."""
    encoding: str | None = file.encoding
    if encoding == "auto":
        with open_bytes(file) as raw:
            encoding = marked(raw.read(4))
    return encoding is None or has_plain_newlines(encoding)


def _parquet_groups(file: InputFile) -> list[int]:
    with open_parquet(file) as parquet:
        return [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.metadata.num_row_groups)]


def _arrow_batches(file: InputFile) -> list[int]:
    """A file can be entered at any batch; a stream, such as Hugging Face datasets writes, is read from its start."""
    with open_arrow(file) as reader:
        if isinstance(reader, pa.ipc.RecordBatchStreamReader):
            return [file.size]
        n_batches = reader.num_record_batches
        return [file.size // n_batches] * n_batches if n_batches else []


ROW_GROUPS: dict[str, Callable[[InputFile], list[int]]] = {"parquet": _parquet_groups, "arrow": _arrow_batches}


@contextmanager
def open_parquet(file: InputFile) -> Iterator[pq.ParquetFile]:
    with reading(file.path), _open(file.path) as raw:
        try:
            parquet = pq.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{file.path} is not a Parquet file: {error}") from error
        yield parquet


@contextmanager
def open_arrow(file: InputFile) -> Iterator[pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader]:
    """An Arrow IPC file or stream, whichever it is."""
    local = "://" not in file.path
    with reading(file.path), pa.memory_map(file.path) if local else pa.PythonFile(_open(file.path), "r") as raw:
        for open_ in (pa.ipc.open_file, partial(_from_start, pa.ipc.open_stream)):
            try:
                reader = open_(raw)
            except (pa.ArrowException, OSError):
                continue
            yield reader
            return
        raise UserError(f"{file.path} is not an Arrow file or stream; repair it or leave it out")


def _from_start(open_: Callable[[pa.NativeFile], Any], raw: pa.NativeFile) -> Any:
    raw.seek(0)
    return open_(raw)
