"""Tables: no row of CSV is cut or mixed up in silence, and columns of every layout give their text."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from data_support import all_documents, run
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reader_support import TEXTS, read_all, skipped, texts_of

from data_tools.build import build
from data_tools.config import BuildConfig
from data_tools.readers.document_pieces import DocumentPiece
from data_tools.readers.formats.csv_rows import DOES_NOT_FIT, ESCAPED, NO_ROW, SWALLOWED
from megagpt.errors import UserError

FIELDS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=8).filter(
    lambda field: not field.endswith("\\")
)
ROWS = st.lists(st.lists(FIELDS, min_size=1, max_size=4), max_size=8)


@settings(max_examples=60)
@given(rows=ROWS, separator=st.sampled_from(",;\t|"))
def test_a_csv_row_is_read_as_it_was_written_or_counted(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], separator: str
) -> None:
    written = io.StringIO()
    writer = csv.writer(written, delimiter=separator, lineterminator="\n")
    writer.writerows([["id", "text"], *rows])
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_text(written.getvalue(), newline="")
    items = list(read_all(path))
    expected = [row[1] for row in rows if len(row) == 2 and row[1] and not row[1].isspace()]
    # a text of lines that each have a tab could be rows as well
    assume(SWALLOWED not in [item.reason for item in skipped(iter(items))])
    assert [item.text for item in items if isinstance(item, DocumentPiece)] == expected
    misfits = [item for item in skipped(iter(items)) if item.reason == DOES_NOT_FIT]
    assert len(misfits) == sum(len(row) != 2 for row in rows)


BAD_ROWS = {
    "surplus": ("1,Hello, world", DOES_NOT_FIT),
    "missing": ("Hello", DOES_NOT_FIT),
    "escapes of another dialect": (r'1,"He said \"hi\" to me"', NO_ROW),
    "a quotation mark that ends too early": ('1,"Hello" world', NO_ROW),
    "an escape before the separator": (r'"He said \", and went away"', ESCAPED),
    "an escape at the end of a line": (r'1,"He said \"', ESCAPED),
    "an inch": ('1,"a 5" disk"', NO_ROW),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_row_that_does_not_fit_is_counted_shown_and_fatal_under_strict(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, reason = BAD_ROWS[kind]
    path = tmp_path / "a.csv"
    path.write_text(f"id,text\n0,before\n{line}\n2,after\n")
    command = ("build", "--input", path, "--out", tmp_path / "out", "tokenizer_type=char", "val_fraction=0")
    assert run(*command, "strict=true") == 2
    assert f"{path} row 1: {reason}" in capsys.readouterr().err
    assert run(*command) == 0
    assert f"skipped 1: {reason} (first: {path} row 1)" in capsys.readouterr().out
    assert all_documents(tmp_path / "out") == ["after", "before"]


BROKEN = {  # content -> the reasons for its lines; none of them is a document
    '2,"first line\nsecond "bad" line\nthen, tail of the broken row"\n': [NO_ROW] * 3,
    '2,"first "bad" line\nmiddle, of the row\nthen, tail"\n': [NO_ROW] * 3,
}


@pytest.mark.parametrize("content", BROKEN)
def test_no_line_of_a_broken_row_is_a_document(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'id,text\n1,before\n{content}3,"after"\n')
    items = list(read_all(tmp_path / "a.csv"))
    assert [item.text for item in items if isinstance(item, DocumentPiece)] == ["before", "after"]
    assert [item.reason for item in skipped(iter(items))] == BROKEN[content]


def test_a_broken_row_to_the_end_of_the_file_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"one "bad" line\n2,two\n')
    with pytest.raises(UserError, match=r"lacks a quotation mark: a field opened in line 2"):
        list(read_all(tmp_path / "a.csv"))


def test_rows_of_tsv_between_two_quotation_marks_are_counted_and_no_document(tmp_path: Path) -> None:
    rows = '1\t"Yes, he said\n2\tplain\n3\tthe "end"\n4\tafter\n'
    (tmp_path / "a.tsv").write_text("id\ttext\n" + rows.replace('the "', "the "))
    items = list(read_all(tmp_path / "a.tsv"))
    assert [item.text for item in items if isinstance(item, DocumentPiece)] == ["after"]
    assert [item.reason for item in skipped(iter(items))] == [SWALLOWED] * 3
    with pytest.raises(UserError, match=r"a\.tsv row 0: a quoted field of lines that look like rows"):
        list(read_all(tmp_path / "a.tsv", strict=True))
    (tmp_path / "a.tsv").write_text("id\ttext\n" + rows)
    items = list(read_all(tmp_path / "a.tsv"))
    assert [item.text for item in items if isinstance(item, DocumentPiece)] == ["after"]
    assert [item.reason for item in skipped(iter(items))] == [NO_ROW] * 3


def test_a_quoted_tsv_field_with_tabs_and_line_breaks_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"a\tb\nc\nd\te"\n')
    assert texts_of(read_all(tmp_path / "a.tsv")) == ["a\tb\nc\nd\te"]


def test_a_quotation_mark_in_an_unquoted_field_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n3,He said "hi" to me\n4,a 5" disk\n')
    assert texts_of(read_all(tmp_path / "a.csv")) == ['He said "hi" to me', 'a 5" disk']


@pytest.mark.parametrize("separator", ["\t", ";", "|"])
def test_the_separator_of_a_csv_file_is_that_of_its_header(separator: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'id{separator}text\n1{separator}"one, two"\n')
    assert texts_of(read_all(tmp_path / "a.csv")) == ["one, two"]


@pytest.mark.parametrize("line", ["sep=;", '"sep=;"', "sep=;\r"])
def test_the_line_that_excel_reads_the_separator_from_is_no_header(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"{line}\nid;text\n1;a, b\n2;c\n")
    assert texts_of(read_all(tmp_path / "a.csv")) == ["a, b", "c"]


def test_blanks_around_the_names_of_columns_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id; text\n1; one\n")
    assert texts_of(read_all(tmp_path / "a.csv")) == [" one"]
    assert texts_of(read_all(tmp_path / "a.csv", text_field=" text")) == [" one"]


@pytest.mark.parametrize("content", [b"id,text\r1,one\r2,two\r", b'"id" "text"\n1 "one"\n'])
def test_a_header_that_is_not_csv_is_told(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.csv: not CSV: .*, in its first line, which names the columns"):
        list(read_all(tmp_path / "a.csv"))


def test_a_quotation_mark_that_is_never_closed_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"one\ntwo"\n2,"three\n3,four\n')
    with pytest.raises(UserError, match=r"a\.csv is truncated, or lacks a quotation mark: a field opened in line 4"):
        list(read_all(tmp_path / "a.csv"))


def as_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)


def as_arrow(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def as_jsonl(path: Path, table: pa.Table) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


WRITERS: dict[str, Callable[[Path, pa.Table], None]] = {
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
    "a.jsonl": as_jsonl,
}


@pytest.mark.parametrize("write", [as_parquet, as_arrow])
def test_two_columns_of_one_name_are_refused_unless_they_hold_no_text(
    write: Callable[[Path, pa.Table], None], tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet" if write is as_parquet else tmp_path / "a.arrow"
    write(path, pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["text", "text", "id"]))
    with pytest.raises(UserError, match=r"has 2 columns 'text'; rename all but one"):
        list(read_all(path))
    write(path, pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], names=["id", "id", "text"]))
    assert texts_of(read_all(path)) == ["c"]


def test_two_csv_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\none,two\n")
    with pytest.raises(UserError, match=r"a\.csv has 2 columns 'text'; rename all but one"):
        list(read_all(tmp_path / "a.csv"))


LAYOUTS: dict[str, Callable[[list[str]], pa.Array]] = {
    "run-end encoded": lambda texts: pc.run_end_encode(pa.array(texts)),
    "dictionary": lambda texts: pa.array(texts).dictionary_encode(),
    "string view": lambda texts: pa.array(texts, pa.string_view()),
    "binary": lambda texts: pa.array([text.encode() for text in texts], pa.binary()),
    "extension": lambda texts: pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_column_of_text_is_read_in_every_layout_of_arrow(layout: str, tmp_path: Path) -> None:
    texts = [text for text in TEXTS for _ in range(2)]
    as_arrow(tmp_path / "a.arrow", pa.table({"text": LAYOUTS[layout](texts)}))
    assert texts_of(read_all(tmp_path / "a.arrow")) == texts


@pytest.mark.parametrize("name", WRITERS)
def test_a_nested_field_is_given_by_its_path(name: str, tmp_path: Path) -> None:
    rows = [{"text": text, "choices": [{"text": f"choice {text}"}], "a.b": {"c": f"dotted {text}"}} for text in TEXTS]
    WRITERS[name](tmp_path / name, pa.table({"data": pa.array(rows)}))
    assert texts_of(read_all(tmp_path / name, text_field="data.text")) == TEXTS
    assert texts_of(read_all(tmp_path / name, text_field="data.choices.0.text")) == [f"choice {t}" for t in TEXTS]
    assert texts_of(read_all(tmp_path / name, text_field="data.a.b.c")) == [f"dotted {t}" for t in TEXTS]
    with pytest.raises(UserError, match=r"has no field 'data.txt'; it has data.a.b.c, data.choices, data.text; set"):
        list(read_all(tmp_path / name, text_field="data.txt"))
    WRITERS[name](tmp_path / name, pa.table({"data": pa.array(rows), "data.text": ["whole name"] * len(rows)}))
    assert texts_of(read_all(tmp_path / name, text_field="data.text")) == ["whole name"] * len(rows)


CHAT = [{"role": "user", "content": "Hi {you}"}, {"role": "assistant", "content": ""}]
WRITTEN_OUT = {
    "chatml": "<|im_start|>user\nHi {you}<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\nHi {you}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n<|eot_id|>",
    "plain": "user: Hi {you}\n\nassistant: \n\n",
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("template", WRITTEN_OUT)
def test_a_chat_is_written_out_by_a_named_template(name: str, template: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, pa.table({"messages": pa.array([CHAT, CHAT])}))
    options = {"text_field": "messages", "chat_template": template}
    assert texts_of(read_all(tmp_path / name, **options)) == [WRITTEN_OUT[template]] * 2
    with pytest.raises(UserError, match=r"a list of chat messages as 'messages'; set chat_template=NAME; known are c"):
        list(read_all(tmp_path / name, text_field="messages"))


def test_chats_of_sharegpt_and_of_parts_are_read_and_those_without_text_counted(tmp_path: Path) -> None:
    chats = [
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "assistant", "content": None, "tool_calls": []}],
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}],
        [{"role": "assistant", "content": "I look", "function_call": {"name": "f"}}],
        [{"role": "assistant", "content": "", "refusal": "I can't"}],
        [{"role": "assistant", "content": "Ho", "tool_calls": [], "function_call": None, "refusal": None}],
        [],
        "no chat",
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"chat": chat}) + "\n" for chat in chats))
    items = list(read_all(tmp_path / "a.jsonl", text_field="chat", chat_template="plain"))
    assert [item.text for item in items if isinstance(item, DocumentPiece)] == [
        "user: Hi\n\nassistant: Ho\n\n",
        "user: ab\n\n",
        "assistant: Ho\n\n",
    ]
    reasons = [*["a chat message without text"] * 5, "empty", "no list of chat messages"]
    assert [re.split(" as |, ", item.reason)[0] for item in skipped(iter(items))] == reasons


def test_a_message_about_a_huge_header_fits_on_a_screen(tmp_path: Path) -> None:
    for header in ("x" * 2_500_000, ",".join(f"column{i}" for i in range(100_000))):
        (tmp_path / "a.csv").write_text(header + "\n1\n")
        with pytest.raises(UserError) as refused:
            list(read_all(tmp_path / "a.csv"))
        assert len(str(refused.value)) < 1000
    (tmp_path / "a.jsonl").write_text(json.dumps({f"field{i}" * 100: 1 for i in range(10_000)}))
    with pytest.raises(UserError) as refused:
        list(read_all(tmp_path / "a.jsonl"))
    assert len(str(refused.value)) < 2500


def test_options_newer_than_a_dataset_leave_no_trace_at_their_default(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    config = BuildConfig(tokenizer_type="char", val_fraction=0)
    assert "chat_template" not in str(config.pipeline(config.with_inputs(["a"])))
    assert build([tmp_path / "a.txt"], tmp_path / "out", config)["documents"] == 1
