"""Open input files, on disk or in an object store, and decompress them."""

import io
import lzma
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, EIO, ENOENT, EPERM
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.executor.progress import advance
from data_tools.readers.input_file import EXPANSION, InputFile, UnreadableFile
from data_tools.readers.remote_files import open_file_system
from megagpt.errors import UserError, limit_reached
from megagpt.git_pointers import MOST_POINTER, pointer_instead_of

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}  # ending of a file's name -> codec

SHOWN = 300  # letters, of a path and of an error that may quote it: somebody may give a text in its place


@contextmanager
def open_bytes(file: InputFile) -> Iterator[IO[bytes]]:
    """Open a file as a stream of its decompressed bytes, which may be read in blocks of any size.

    Raises UserError for a file that cannot be reached, is not in its compression's format, or is truncated.
    """
    with reading(file.path), _open(file) as raw:
        if file.compression in STREAMS:
            yield io.BufferedReader(_StreamReader(_CountedReads(raw), file.compression), 2**20)
        elif file.compression:
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(_CountedReads(raw), "r"), file.compression))
        else:
            yield raw


class _CountedReads(io.RawIOBase):
    """Counts what is read of a compressed file as progress: how much text will be in it is not known."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, target: "WriteableBuffer") -> int:
        data = self._raw.read(len(memoryview(target).cast("B")))
        memoryview(target).cast("B")[: len(data)] = data
        advance(EXPANSION * len(data))
        return len(data)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn the errors of reading a file into a UserError that names the file."""
    try:
        yield
    except (UserError, GeneratorExit):
        raise
    except (OSError, EOFError, lzma.LZMAError, zstd.ZstdError, pa.ArrowException) as error:
        if limit := limit_reached(error):
            raise limit from error
        why = str(error) or type(error).__name__
        way_out = "set workers=1" if "not enough memory" in why else "repair it or leave it out"
        kind = UnreadableFile if _is_the_files_fault(error, path) else UserError
        raise kind(f"cannot read {path[:SHOWN]}: {why[:SHOWN]}; {way_out}") from error
    except Exception as error:
        # an object store's client raises errors of its own types; these four are mistakes in our code instead
        if "://" in path and not isinstance(error, AssertionError | TypeError | AttributeError | LookupError):
            raise UserError(f"cannot read {path}: {type(error).__name__}: {error}") from error
        raise


def _is_the_files_fault(error: Exception, path: str) -> bool:
    """Tell whether a file is at fault, rather than a network or a machine that may do better at the next try."""
    if isinstance(error, TimeoutError | ConnectionError):
        return False
    errno = getattr(error, "errno", None)  # None: what a decompressor raises
    return errno in (None, EACCES, ENOENT, EPERM) or (errno == EIO and "://" not in path)


class _Decompressor(Protocol):
    """The part of the standard library's interface that decompresses one stream."""

    @property
    def eof(self) -> bool: ...

    @property
    def needs_input(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def _new_xz() -> _Decompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)


def _new_zstd() -> _Decompressor:
    # `zstd --long=31` looks back 2 GiB; by default, libzstd refuses more than 128 MiB
    largest = zstd.DecompressionParameter.window_log_max.bounds()[1]
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: largest})


# codec -> its decompressor, and what may lie between its streams and at the end
STREAMS: dict[str, tuple[Callable[[], _Decompressor], bytes]] = {"xz": (_new_xz, b"\0"), "zstd": (_new_zstd, b"")}


class _StreamReader(io.RawIOBase):
    """Decompress the streams of a file. Unlike lzma.open, it refuses anything else that follows them."""

    def __init__(self, raw: io.RawIOBase, codec: str) -> None:
        self._raw, (self._new, self._padding) = raw, STREAMS[codec]
        self._stream = self._new()

    def readable(self) -> bool:
        return True

    def readinto(self, target: "WriteableBuffer") -> int:
        view, data = memoryview(target).cast("B"), b""
        while not data:
            if self._stream.eof:
                packed = self._stream.unused_data.lstrip(self._padding)
                while not packed:
                    if not (block := self._raw.read(2**16)):
                        return 0
                    packed = block.lstrip(self._padding)
                self._stream = self._new()
            else:
                packed = self._raw.read(2**16) if self._stream.needs_input else b""
                if self._stream.needs_input and not packed:
                    raise EOFError("it ends within a stream")
            data = self._stream.decompress(packed, len(view))
        view[: len(data)] = data
        return len(data)


@contextmanager
def _open(file: InputFile) -> Iterator[IO[bytes]]:
    if "://" not in file.path:
        with Path(file.path).open("rb") as local:
            _refuse_pointer(file, local)
            yield local
        return
    fs, inside = open_file_system(file.path)
    with fs.open(inside, "rb", block_size=2**23) as raw:
        if (size := getattr(raw, "size", None)) not in (None, file.size):
            raise UserError(f"{file.path} has {size:,} bytes, and {file.size:,} when it was found; run the build again")
        # buffered, because the files of fsspec do not support readline(limit)
        buffered = io.BufferedReader(raw)
        _refuse_pointer(file, buffered)
        yield buffered


def _refuse_pointer(file: InputFile, raw: io.BufferedReader) -> None:
    """Raise UnreadableFile for the few lines that Git keeps in place of a large file."""
    if file.size > MOST_POINTER:
        return
    if message := pointer_instead_of(file.path, raw.peek(MOST_POINTER)):
        raise UnreadableFile(message)


def _is_about_content(error: Exception) -> bool:
    """Tell whether Arrow refused what it read, rather than the network, the disk or a limit stopped the reading."""
    # Arrow's own OSError has no number: "Couldn't deserialize thrift"
    return not isinstance(error, TimeoutError | ConnectionError) and getattr(error, "errno", None) is None


@contextmanager
def open_parquet(file: InputFile) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file to read single row groups. Raises UserError if it is not one."""
    with reading(file.path), _open(file) as raw:
        try:
            parquet = pq.ParquetFile(raw, pre_buffer=False, buffer_size=2**20)
        except (pa.ArrowException, OSError) as error:
            if not _is_about_content(error):
                raise
            raise UnreadableFile(f"{file.path} is not a Parquet file: {error}; repair it or leave it out") from error
        yield parquet


@contextmanager
def open_arrow(file: InputFile) -> Iterator[pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader]:
    """Open an Arrow IPC file or stream, whichever it is. Raises UserError if it is neither."""
    # a pointer is too small to be worth a memory map
    is_mapped = "://" not in file.path and file.size > MOST_POINTER
    with reading(file.path), pa.memory_map(file.path) if is_mapped else _open_as_arrow(file) as raw:
        for open_ in (pa.ipc.open_file, partial(_from_start, pa.ipc.open_stream)):
            try:
                reader = open_(raw)
            except (pa.ArrowException, OSError) as error:
                if not _is_about_content(error):
                    raise
                continue
            yield reader
            return
        raise UnreadableFile(f"{file.path} is not an Arrow file or stream; repair it or leave it out")


@contextmanager
def _open_as_arrow(file: InputFile) -> Iterator[pa.PythonFile]:
    with _open(file) as raw, pa.PythonFile(raw, "r") as arrow:
        yield arrow


def _from_start(open_: Callable[[pa.NativeFile], Any], raw: pa.NativeFile) -> Any:
    raw.seek(0)
    return open_(raw)
