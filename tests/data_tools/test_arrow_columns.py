"""Our columns equal those that Arrow makes, and a small build does not import Dask or pandas."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_support import small_tokenizer, write_texts
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from data_tools.storage.arrow_columns import hash_column, number_column, string_column, to_arrow, to_numpy

BOUNDS = {pa.uint16(): 2**16, pa.uint32(): 2**32, pa.uint64(): 2**64, pa.bool_(): 2}
TYPES = pytest.mark.parametrize("type_", BOUNDS, ids=str)


@TYPES
@given(data=st.data())
def test_numbers_are_what_arrow_makes_of_them_and_come_back(type_: pa.DataType, data: st.DataObject) -> None:
    kind = st.booleans() if pa.types.is_boolean(type_) else st.integers(0, BOUNDS[type_] - 1)
    values = data.draw(st.lists(kind, max_size=40))
    made = number_column(values, type_)
    made.validate(full=True)
    assert made.equals(pa.array(values, type_))
    assert to_arrow(to_numpy(made)).equals(made)
    begin = data.draw(st.integers(0, len(values)))
    assert to_numpy(made[begin:]).tolist() == values[begin:]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string()], ids=str)
@given(values=st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_strings_are_what_arrow_makes_of_them(type_: pa.DataType, values: list[str]) -> None:
    made = string_column([value.encode() for value in values], type_)
    made.validate(full=True)
    assert made.equals(pa.array(values, type_))


@given(values=st.lists(st.binary(min_size=16, max_size=16)))
def test_hashes_are_what_arrow_makes_of_them(values: list[bytes]) -> None:
    assert hash_column(values, 16).equals(pa.array(values, pa.binary(16)))


def test_a_number_that_does_not_fit_is_refused() -> None:
    with pytest.raises(OverflowError):
        number_column([2**16], pa.uint16())
    with pytest.raises(OverflowError):
        number_column([-1], pa.uint64())


def test_a_view_shares_the_column_s_memory() -> None:
    values = np.arange(5, dtype=np.uint64)
    assert np.shares_memory(to_numpy(to_arrow(values)), values)


@pytest.mark.process
def test_a_small_build_imports_neither_dask_nor_pandas(tmp_path: Path) -> None:
    write_texts(tmp_path / "in", 20)
    (tmp_path / "t.model").write_bytes(small_tokenizer().model_bytes)
    args = ["build", "--input", tmp_path / "in", "--out", tmp_path / "out", f"tokenizer={tmp_path}/t.model"]
    script = (
        "import sys; from data_tools.__main__ import main; "
        f"assert main({list(map(str, args))}) == 0; "
        "assert not {'pandas', 'distributed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
