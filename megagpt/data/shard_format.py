"""The Arrow format, version 1, which data_tools writes and training reads.

    manifest.json       written last, atomically: without it the build is unfinished
    tokenizer.model     the exact bytes the data was tokenized with
    index.arrow         one row per record batch: where its rows and tokens lie in the split
    train/v0/shard-000000.arrow ...    train/v1/...    val/v0/...    test/v0/...

A shard is an uncompressed Arrow IPC file, one document per row, whose last token is the end-of-document id. A document
too long for one row has several, numbered by `part`, and only the last of them ends in that id.
The tokens of a record batch are contiguous, so one column serves as documents and as a flat stream.
Compression would cost the zero-copy reads; `list`, with its 32-bit offsets, would overflow at 2^31 tokens.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import xxhash

from megagpt.config.parsing import Strict
from megagpt.data.manifest import FORMAT, VERSION, Split
from megagpt.errors import UserError, limit_reached

INDEX, TOKENIZER_MODEL, REPORT = "index.arrow", "tokenizer.model", "report.json"
METADATA_KEY = "megagpt"
HASH_BYTES = 16  # blake2b of a document's UTF-8 text

# row0 and tok0 are the batch's first row and token, counted from the start of the split's variant.
INDEX_COLUMNS = {
    "split": pa.string(),
    "variant": pa.uint16(),
    "shard": pa.uint32(),
    "batch": pa.uint32(),
    "row0": pa.uint64(),
    "tok0": pa.uint64(),
    "n_rows": pa.uint64(),
    "n_tokens": pa.uint64(),
    "byte_offset": pa.uint64(),
    "xxh3": pa.uint64(),
}
INDEX_SCHEMA = pa.schema([pa.field(name, type_, nullable=False) for name, type_ in INDEX_COLUMNS.items()])


class ShardHeader(Strict):
    """A shard's description of itself in its schema's metadata, so that no other file can take its place."""

    format: Literal["megagpt-arrow"] = FORMAT
    version: Literal[1] = VERSION
    build_id: str
    split: Split
    variant: int
    shard: int
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    eod_id: int
    tokenizer_sha256: str

    @property
    def path(self) -> str:
        return f"{self.split}/v{self.variant}/shard-{self.shard:06d}.arrow"

    @property
    def schema(self) -> pa.Schema:
        return document_schema(self.dtype).with_metadata({METADATA_KEY: self.model_dump_json()})


def document_schema(dtype: Literal["uint16", "uint32"]) -> pa.Schema:
    """Return the schema of a shard whose token ids are of this type, without metadata."""
    ids = pa.field("item", pa.uint16() if dtype == "uint16" else pa.uint32(), nullable=False)
    fields = {
        "tokens": pa.large_list(ids),
        "doc": pa.binary(HASH_BYTES),
        "source": pa.uint16(),
        "part": pa.uint32(),  # 0, and 1, 2, ... in the other rows of a long document
    }
    return pa.schema([pa.field(name, type_, nullable=False) for name, type_ in fields.items()])


def token_dtype(vocab_size: int) -> Literal["uint16", "uint32"]:
    """Return the smallest type that holds the ids of a vocabulary."""
    return "uint16" if vocab_size <= 65536 else "uint32"


def read_batch(reader: pa.RecordBatchFileReader, batch: int, path: Path) -> pa.RecordBatch:
    """Read a record batch and check its buffers' sizes: reading past them would kill the process. Raises UserError."""
    try:
        record_batch = reader.get_batch(batch)
        record_batch.validate()
    except (pa.ArrowException, OSError, SystemError) as error:
        raise damaged(path, f"record batch {batch}: {error}") from error
    return record_batch


def map_file(path: Path) -> pa.Buffer:
    """Memory-map a file and close it: however many are mapped, none counts towards the limit of open files."""
    with pa.memory_map(str(path)) as file:
        # a slice keeps the map alive after the file is closed; its parent is the whole map
        return file.read_buffer(1).parent if file.size() else pa.py_buffer(b"")


def batch_xxh3(batch: pa.RecordBatch) -> int:
    """Hash a record batch at memory speed, to find which one is damaged; the shard's sha256 proves that none is."""
    digest = xxhash.xxh3_64()
    for array in (batch["tokens"].values, batch["tokens"].offsets, batch["source"], batch["part"]):
        digest.update(numbers(array).data)
    digest.update(batch["doc"].buffers()[1][: HASH_BYTES * len(batch)])
    return digest.intdigest()


def damaged(path: Path, why: object) -> UserError:
    """Return the error to raise for a file of a dataset that cannot be read: it is damaged, or a limit is too low."""
    if isinstance(why, OSError) and (limit := limit_reached(why)):
        return limit
    return UserError(f"{path} is damaged ({why}); restore it or build the dataset again")


def numbers(array: pa.Array) -> np.ndarray:
    """View an integer column without nulls as a read-only array, without a copy.

    Arrow's own to_numpy imports pandas wherever it is installed: half a second, and tens of megabytes.
    """
    dtype = np.dtype(array.type.to_pandas_dtype())
    return np.frombuffer(array.buffers()[1], dtype)[array.offset : array.offset + len(array)]
