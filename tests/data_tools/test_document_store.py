"""Documents between the stages of a build are written in batches and read back."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_tools.storage.document_store
from data_tools.storage.document_store import open_documents, read_documents, read_pieces


@given(sizes=st.lists(st.tuples(st.integers(1, 3), st.booleans()), max_size=20), rows=st.integers(1, 8))
def test_documents_are_written_in_batches_as_if_in_one(
    sizes: list[tuple[int, bool]], rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.mktemp("texts") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_tools.storage.document_store, "BATCH_ROWS", rows)
        with open_documents(prefix) as writer:
            for number, (n_pieces, kept) in enumerate(sizes):
                writer.begin()
                for piece in range(n_pieces):
                    writer.add(f"{number}.{piece}")
                writer.end(7, number, kept=kept)
    assert list(read_pieces(prefix)) == [
        (number, f"{number}.{piece}") for number, (n_pieces, _) in enumerate(sizes) for piece in range(n_pieces)
    ]
    documents = read_documents(prefix)
    assert [(document.position, document.slice, document.kept) for document in documents] == [
        (number, 7, kept) for number, (_, kept) in enumerate(sizes)
    ]
    kept_ones = [document for document in documents if document.kept]
    assert (writer.kept, writer.kept_bytes) == (len(kept_ones), sum(document.bytes for document in kept_ones))
    assert writer.sha256 == hashlib.sha256(b"".join(document.doc for document in kept_ones)).hexdigest()
