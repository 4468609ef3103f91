"""Input files, here or in an object store, opened and decompressed."""

import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from megagpt.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Kind = Literal["text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "warc", "html"]


@dataclass(frozen=True)
class InputFile:
    path: str  # absolute, or a URL
    kind: Kind
    compression: str  # "" is none
    size: int  # bytes
    state: str  # changes when the file does
    named: bool  # by the user, rather than found in a folder
    encoding: str  # that was asked for


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
    fs, inside = remote(path)
    return io.BufferedReader(fs.open(inside, "rb", block_size=2**23))  # which knows readline(limit); its files do not


def remote(url: str) -> tuple[Any, str]:
    """(file system, path in it). Credentials and endpoints come from the environment, as fsspec documents it."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} needs another package: {error}; install it with pip") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; give a path, or a URL such as s3://bucket/a.jsonl") from error


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
