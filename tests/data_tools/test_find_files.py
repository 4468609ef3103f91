"""The files of a source: folders and globs, in a fixed order; empty files are no mistake in a folder."""

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_support import write_texts
from reader_support import TEXTS, arrow, arrow_stream, jsonl, parquet, read_all, skipped, texts_of

from data_tools.__main__ import main
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


def test_a_name_is_taken_as_it_stands_before_it_is_a_pattern(tmp_path: Path) -> None:
    for name in (
        "odd[1].jsonl",
        "odd1.jsonl",
        "odd[1]/a.jsonl",
        "odd1/a.jsonl",
        "wh?t.jsonl",
        "what.jsonl",
        "a%20b.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([name]) if name.endswith("jsonl") else name.encode())
    (tmp_path / "a b.txt").write_text("a b.txt")
    (tmp_path / "c d.txt").write_text("c d.txt")
    for start in (str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}"):
        for name in ("odd[1].jsonl", "odd1.jsonl", "odd[1]/a.jsonl", "wh?t.jsonl", "a%20b.txt", "a b.txt"):
            assert texts_of(read_all(f"{start}/{name}")) == [name]
        assert texts_of(read_all(f"{start}/odd[1]")) == ["odd[1]/a.jsonl"]
        assert texts_of(read_all(f"{start}/odd[1]/*.jsonl")) == ["odd[1]/a.jsonl"]
        assert texts_of(read_all(f"{start}/odd?/*.jsonl")) == ["odd1/a.jsonl"]
    assert texts_of(read_all(f"file://{tmp_path}/c%20d.txt")) == ["c d.txt"]


def test_a_url_of_a_local_file_keeps_the_rules_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("a")
    with pytest.raises(UserError, match="is in the output folder"):
        find_files(SourceConfig(name="test", paths=(f"file://{tmp_path}/out/a.txt",)), leave_out=tmp_path / "out")


def test_what_is_no_file_is_named_with_a_way_out(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    wrong = {
        "": r"an input path is empty, perhaps an unset variable; give a file, a folder or `\.`",
        str(tmp_path / "pipe"): r"pipe is a pipe or a device, and input is read several times; write it to a file",
        "a text in place of a path " * 1000: r"^cannot read a text in .{0,900}repair it or leave it out$",
    }
    for path, message in wrong.items():
        with pytest.raises(UserError, match=message):
            list(read_all(path))


def test_an_option_that_is_repeated_adds_to_the_paths_before(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_texts(tmp_path / name, 20)
    options = ["tokenizer_type=char", "vocab_size=300", "val_fraction=0", "dedup.method=none", "workers=1"]
    inputs = [word for name in "ab" for word in ("--input", str(tmp_path / name))]
    assert main(["build", *inputs, "--out", str(tmp_path / "out"), *options]) == 0
    assert "40 documents" in capsys.readouterr().out
