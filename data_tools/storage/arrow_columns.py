"""Make Arrow columns without nulls from Python and numpy values, and read them back as numpy arrays.

Arrow's own `pa.array` and `to_numpy` do the same, but import pandas wherever it is installed: in every worker, that
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
    """Write an Arrow file, which gets its name only when the block ends without an error."""
    with written(path) as temporary, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, schema) as sink:
        yield sink


def to_arrow(values: np.ndarray) -> pa.Array:
    """Return a numpy array as an Arrow column of the same type, without a copy unless it is of booleans."""
    type_ = pa.from_numpy_dtype(values.dtype)
    data = np.packbits(values, bitorder="little") if pa.types.is_boolean(type_) else np.ascontiguousarray(values)
    return pa.Array.from_buffers(type_, len(values), [None, pa.py_buffer(data)])


def number_column(values: Sequence[int], type_: pa.DataType) -> pa.Array:
    """Integers or booleans as a column. Raises OverflowError for a number that the type cannot hold."""
    # to_pandas_dtype gives numpy's type, in spite of its name
    return to_arrow(np.array(values, type_.to_pandas_dtype()))


def string_column(values: Sequence[bytes], type_: pa.DataType) -> pa.Array:
    """Strings, given as UTF-8, as a column of `type_`: string or large_string."""
    offsets = np.zeros(len(values) + 1, np.int32 if pa.types.is_string(type_) else np.int64)
    np.cumsum(list(map(len, values)), out=offsets[1:])
    return pa.Array.from_buffers(type_, len(values), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(values))])


def hash_column(values: Sequence[bytes], size: int) -> pa.FixedSizeBinaryArray:
    """Hashes of `size` bytes each as a column."""
    return pa.Array.from_buffers(pa.binary(size), len(values), [None, pa.py_buffer(b"".join(values))])


def to_numpy(array: pa.Array) -> np.ndarray:
    """Return the numbers of a column without nulls, without a copy unless they are booleans."""
    data, end = array.buffers()[1] or b"", array.offset + len(array)
    if pa.types.is_boolean(array.type):
        return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[array.offset : end].astype(bool)
    return np.frombuffer(data, array.type.to_pandas_dtype())[array.offset : end]
