"""The files of a source: folders, globs and object stores, in a fixed order; empty files are no mistake in a folder."""

import gzip
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reader_support import FORMATS, TEXTS, arrow, arrow_stream, jsonl, parquet, read_all, skipped, texts_of

import data_tools.readers.work_units
from data_tools.build import build
from data_tools.config import BuildConfig, SourceConfig
from data_tools.readers.find_files import find_files
from megagpt.errors import UserError


def test_globs_and_folders_find_the_same_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    assert texts_of(read_all(tmp_path)) == ["a.jsonl", "b.jsonl", "c/d.jsonl"]
    assert texts_of(read_all(tmp_path / "*.jsonl")) == ["a.jsonl", "b.jsonl"]
    assert texts_of(read_all(tmp_path / "**" / "*.jsonl")) == ["a.jsonl", "b.jsonl", "c/d.jsonl"]


def test_a_glob_that_matches_only_folders_reads_them(tmp_path: Path) -> None:
    for name in ("x1/a.jsonl", "x1/y/b.jsonl", "x2/c.jsonl", "z/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(jsonl([name]))
    assert texts_of(read_all(tmp_path / "x*")) == ["x1/a.jsonl", "x1/y/b.jsonl", "x2/c.jsonl"]


def test_a_folder_of_symbolic_links_says_how_to_read_them(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(jsonl(TEXTS))
    (tmp_path / "snapshot" / "data").mkdir(parents=True)
    (tmp_path / "snapshot" / "data" / "a.jsonl").symlink_to(tmp_path / "blob")
    with pytest.raises(UserError, match="holds only symbolic links") as refused:
        find_files(SourceConfig(name="test", paths=(str(tmp_path / "snapshot"),)))
    pattern = str(refused.value).split("'")[1]
    assert texts_of(read_all(pattern)) == TEXTS


def test_the_output_of_a_build_is_no_input_of_it(tmp_path: Path) -> None:
    for name in ("a.txt", "out/b.txt", "out/.build/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def found(path: str) -> list[str]:
        files = find_files(SourceConfig(name="test", paths=(str(tmp_path / path),)), leave_out=tmp_path / "out")
        return [str(Path(file.path).relative_to(tmp_path)) for file in files]

    assert found(".") == found("*") == found("**/*.txt") == ["a.txt"]
    for path in ("out", "out/b.txt", "out/../out/b.txt"):
        with pytest.raises(UserError, match=r"is in the output folder, .*out; give another --out, or leave it out"):
            found(path)


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("hello")
    with pytest.raises(UserError, match=r"the file name '.*caf\\udce9\.txt' is not UTF-8; rename it or leave it out"):
        list(read_all(tmp_path))


def parquet_without_groups() -> bytes:
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, pa.schema({"text": pa.string()})).close()
    return sink.getvalue().to_pybytes()


EMPTY: dict[str, bytes] = {
    **{f"a.{ending}": b"" for ending in ("txt", "jsonl", "json", "csv", "parquet", "arrow", "html", "warc")},
    "a.jsonl.gz": gzip.compress(b""),
    "a.json.gz": gzip.compress(b""),
    "a.csv.gz": gzip.compress(b""),
    "no rows.parquet": parquet([]),
    "no groups.parquet": parquet_without_groups(),
    "no batches.arrow": arrow([]),
    "no batches in the stream.arrow": arrow_stream([]),
    "no values.json": b"[]",
    "no rows.csv": b"id,text\n",
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_file_without_documents_is_no_mistake_in_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(EMPTY[name])
    assert {item.reason for item in skipped(read_all(tmp_path))} <= {"empty"}


def test_files_without_documents_are_built_from_beside_others_and_not_alone(tmp_path: Path) -> None:
    config = BuildConfig(tokenizer_type="char", val_fraction=0, workers=1)
    for name, content in EMPTY.items():
        (tmp_path / name.split(".")[0]).mkdir(exist_ok=True)
        (tmp_path / name.split(".")[0] / name).write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(jsonl(TEXTS))
    empties = [tmp_path / name for name in {name.split(".")[0]: 0 for name in EMPTY}]
    report = build([*empties, tmp_path / "good.jsonl"], tmp_path / "beside", config)
    assert report["skipped"]["empty"]["documents"] == 12
    for folder in empties:
        with pytest.raises(UserError, match="there is no text to train a tokenizer on"):
            build([folder], tmp_path / "alone", config)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A real object-store server on this machine, and the environment that leads to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        store = boto3.client("s3", endpoint_url=endpoint)
        store.create_bucket(Bucket="corpus")
        for name, content in FORMATS.items():
            store.put_object(Bucket="corpus", Key=f"{name.split('.')[0]}/{name}", Body=content(TEXTS))
        store.put_object(Bucket="corpus", Key="tree/.git/x.py", Body=b"hidden")
        store.put_object(Bucket="corpus", Key="tree/b/x.py", Body=b"print('b')")
        store.put_object(Bucket="corpus", Key="tree/a.py", Body=b"print('a')")
        yield "s3://corpus"
    server.stop()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.csv", "a.parquet", "file.arrow"])
def test_an_object_store_gives_the_same_documents(name: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_tools.readers.work_units, "MIN_UNIT_BYTES", 500)
    assert texts_of(read_all(f"{bucket}/{name.split('.')[0]}/{name}")) == TEXTS


def test_an_object_stores_folders_and_globs(bucket: str) -> None:
    assert texts_of(read_all(f"{bucket}/tree")) == ["print('a')", "print('b')"]
    assert texts_of(read_all(f"{bucket}/tree/*.py")) == ["print('a')"]
    assert texts_of(read_all(f"{bucket}/tree", include=("x.*",))) == ["print('b')"]
    with pytest.raises(UserError, match="s3://corpus/nothing: there is no such file or folder"):
        list(read_all(f"{bucket}/nothing"))


def test_a_url_that_leads_nowhere_is_named(bucket: str) -> None:
    with pytest.raises(UserError, match=r"s3://no-such-bucket/a\.jsonl"):
        list(read_all("s3://no-such-bucket/a.jsonl"))
    with pytest.raises(UserError, match=r"foo://bar: Protocol not known"):
        list(read_all("foo://bar"))
