"""Arrow columns of numbers and strings, none of them null, from Python and numpy and back.

Not by Arrow's own `pa.array` and `to_numpy`: they import pandas wherever it is installed, once in every worker, which
takes as long as reading 40 MB of JSON lines.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from megagpt.atomic_files import written


@contextmanager
def new_arrow_file(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchFileWriter]:
    """An Arrow file, which has its name once the block ends well."""
    with written(path) as temporary, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as sink:
        yield sink


def to_arrow(values: np.ndarray) -> pa.Array:
    """The same numbers, of the same type; shared, but for truth values."""
    type_ = pa.from_numpy_dtype(values.dtype)
    data = np.packbits(values, bitorder="little") if pa.types.is_boolean(type_) else np.ascontiguousarray(values)
    return pa.Array.from_buffers(type_, len(values), [None, pa.py_buffer(data)])


def number_column(values: Sequence[int], type_: pa.DataType) -> pa.Array:
    """Raises OverflowError for a number that the type cannot hold."""
    return to_arrow(np.array(values, type_.to_pandas_dtype()))  # numpy's, in spite of its name


def string_column(values: Sequence[bytes], type_: pa.DataType) -> pa.Array:
    """Of UTF-8; `type_` is string or large_string."""
    offsets = np.zeros(len(values) + 1, np.int32 if pa.types.is_string(type_) else np.int64)
    np.cumsum(list(map(len, values)), out=offsets[1:])
    return pa.Array.from_buffers(type_, len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))])


def hash_column(values: Sequence[bytes], size: int) -> pa.FixedSizeBinaryArray:
    return pa.Array.from_buffers(pa.binary(size), len(values), [None, pa.py_buffer(b"".join(values))])


def to_numpy(array: pa.Array) -> np.ndarray:
    """The numbers of a column, shared with it, but for truth values."""
    data, end = array.buffers()[1] or b"", array.offset + len(array)
    if pa.types.is_boolean(array.type):
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[array.offset : end].astype(bool)
    return np.frombuffer(data, array.type.to_pandas_dtype())[array.offset : end]
