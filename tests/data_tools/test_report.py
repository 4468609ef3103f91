"""The report: counts that agree from stage to stage, and a page that shows them and contains nothing active."""

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from data_support import all_documents, document, small_tokenizer
from support import DRAW_SVG

from data_tools.build import build
from data_tools.config import BuildConfig, load_config
from data_tools.report import plots
from data_tools.report.html_page import page_of
from data_tools.report.plots import bars
from megagpt.atomic_files import sha256_of
from megagpt.data.dataset import open_dataset
from megagpt.data.manifest import SPLITS
from megagpt.svg_plots import COLORS

NAMED_BADLY = "<script>alert('$1$')<&>.jsonl"
HOSTILE = "{ </pre><script>alert(1)</script>\n<b>no</b> \u202esentence"
HEADINGS = ("In and out", "What was left out", "Examples", "Lengths of documents", "Tokens per byte")
HEADINGS += ("How it was built", "Time")


@pytest.fixture(scope="module", autouse=True)
def _plots_are_drawn():
    """Elsewhere they are blank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_svg", DRAW_SVG)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(dataset, report) of three sources: one with copies, one with short and broken records, one wholly rejected."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "tokenizer.model").write_bytes(small_tokenizer().model_bytes)
    books = [document(i) for i in range(30)] + [document(i) for i in range(6)]
    web = [document(100 + i) for i in range(20)] + ["too short"] * 4
    for name, texts in (("books.jsonl", books), (NAMED_BADLY, web), ("bad.jsonl", [HOSTILE] * 3)):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with (folder / NAMED_BADLY).open("a") as file:
        file.write("{\n[1]\n{\n")
    options = {
        "tokenizer": str(folder / "tokenizer.model"),
        "val_fraction": 0.2,
        "test_fraction": 0.1,
        "dedup": {"method": "exact"},
        "subword": {"variants": 1},
        "sources": {
            "books": str(folder / "books.jsonl"),
            "<script>": {"paths": str(folder / NAMED_BADLY), "rules": {"gopher_quality": {"min_stop_words": 0}}},
            "bad": {"paths": str(folder / "bad.jsonl"), "rules": {"c4": True}},
        },
    }
    (folder / "build.json").write_text(json.dumps(options))
    typed = "data_tools build --input 's3://me:word@b/a.jsonl' 'https://x.org/a.jsonl?X-Amz-Signature=abc' <b>"
    report = build([], folder / "out", load_config(BuildConfig, folder / "build.json", []), command=typed)
    return folder / "out", report


class Page(HTMLParser):
    """The tags, the text and the rows of the tables of a page, as a browser would find them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())
        if self._in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False


def documents_in(counts: dict[str, dict[str, Any]]) -> int:
    return sum(rule["documents"] for rule in counts.values())


# --- the figures ----------------------------------------------------------------------------------------------


def test_documents_flow_from_stage_to_stage(built: tuple[Path, dict[str, Any]]) -> None:
    _, report = built
    for source, n_read, n_rejected, n_dropped, n_skipped in zip(
        report["sources"], (36, 24, 3), (0, 4, 3), (6, 0, 0), (0, 3, 0), strict=True
    ):
        assert source["read"]["documents"] == n_read
        assert documents_in(source["rejected"]) == n_rejected
        assert documents_in(source["dropped"]) == n_dropped
        assert documents_in(source["skipped"]) == n_skipped  # never read, so not of n_read
        assert source["after_rules"]["documents"] == n_read - n_rejected
        assert documents_in(source["splits"]) == n_read - n_rejected - n_dropped
        assert sum(source["bytes_log2"].values()) == n_read - n_rejected
        assert sum(source["tokens_log2"].values()) == n_read - n_rejected - n_dropped
    for how in ("skipped", "rejected", "dropped"):
        assert documents_in(report[how]) == sum(documents_in(source[how]) for source in report["sources"])
    for split in SPLITS:
        for unit in ("documents", "bytes", "tokens"):
            assert report["splits"][split][unit] == sum(source["splits"][split][unit] for source in report["sources"])


def test_the_page_is_written_and_the_manifest_knows_its_hash(built: tuple[Path, dict[str, Any]]) -> None:
    out, report = built
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "report.html").read_text() == page_of(report, "out")
    assert open_dataset(out).manifest.other_files["report.html"] == sha256_of(out / "report.html")


def test_the_tables_hold_the_figures_of_the_report(built: tuple[Path, dict[str, Any]]) -> None:
    _, report = built
    page = Page(page_of(report, "out"))
    for fact in (
        f"{report['documents']:,}",
        f"{report['tokens']:,}",
        f"{report['bytes_per_token']:.2f}",
        "13 documents",
        "3",
    ):
        assert fact in page.words
    for source in report["sources"]:
        splits = [source["splits"][split]["documents"] for split in SPLITS]
        flow = [source["read"]["documents"], source["after_rules"]["documents"], sum(splits), *splits]
        assert [source["name"], *map(str, flow)] in page.rows
        for when, key in (("by a rule", "rejected"), ("afterwards", "dropped")):
            for rule, counts in source[key].items():
                assert [source["name"], rule, when, str(counts["documents"])] in [row[:4] for row in page.rows]
        for reason, skipped in source["skipped"].items():
            assert [source["name"], reason, str(skipped["documents"]), skipped["first"]] in page.rows
    all_splits = [report["splits"][split]["documents"] for split in SPLITS]
    assert ["all", "63", "56", "50", *map(str, all_splits)] in page.rows
    variant = report["variants"][1]
    assert ["variant 1", f"{variant['tokens']:,}", f"{variant['times_canonical']:.4f}"] in page.rows
    for stage, seconds in report["seconds"].items():
        assert [stage, f"{seconds:,.2f}"] in page.rows


def test_lengths_are_shown_in_their_units(built: tuple[Path, dict[str, Any]]) -> None:
    _, report = built
    page = Page(page_of(report, "out"))
    counts = {row[0]: list(map(int, row[1:])) for row in page.rows if " to " in row[0]}
    by_source = [source["bytes_log2"].get("9", 0) for source in report["sources"]]  # bit length 9: 256 to 511
    assert sorted(counts["256 to 511"]) == sorted(by_source)
    assert sum(by_source) > 40  # most documents are some 300 bytes long
    assert {"256 B", "512 B"} <= set(page.words)


# --- the page -------------------------------------------------------------------------------------------------


def test_what_a_file_is_called_is_text_and_nothing_else(built: tuple[Path, dict[str, Any]]) -> None:
    _, report = built
    assert NAMED_BADLY in report["skipped"]["bad JSON"]["first"]
    content = page_of(report, "<img src=x onerror=alert(1)>")
    page = Page(content)
    assert not page.tags & {"script", "img", "b", "link", "iframe"}
    assert any(NAMED_BADLY in row[-1] for row in page.rows)  # the very letters
    assert "<img src=x onerror=alert(1)>" in page.words


def test_letters_that_turn_or_break_a_line_are_escaped(built: tuple[Path, dict[str, Any]]) -> None:
    report = copy.deepcopy(built[1])
    report["sources"][0]["name"] = "a\u202eb\x1b[31m\udcff\n日本"
    content = page_of(report, "out")
    assert "a\\u202eb\\x1b[31m\\udcff\\n日本" in Page(content).words
    assert not {"\u202e", "\x1b", "\udcff"} & set(content)


def test_the_page_needs_no_other_file(built: tuple[Path, dict[str, Any]]) -> None:
    content = page_of(built[1], "out")
    outside = [(name, value) for name, value in Page(content).attributes if value and "://" in value]
    assert {name.split(":")[0] for name, _ in outside} <= {"xmlns"}  # names of languages, which nothing fetches
    assert not re.search(r"@import|url\((?!#)", content)
    assert all(f"<h2>{heading}</h2>" in content for heading in HEADINGS)


def test_examples_are_documents_that_a_rule_left_out_and_that_stayed(built: tuple[Path, dict[str, Any]]) -> None:
    out, report = built
    left_out, kept = report["examples"], {source["name"]: source["examples"] for source in report["sources"]}
    assert left_out.keys() == report["rejected"].keys() | report["dropped"].keys()
    [rule] = report["sources"][2]["rejected"]
    assert [one["text"] for one in left_out[rule]] == [HOSTILE] * 3
    assert {one["text"] for one in left_out["gopher_quality: fewer than 50 words"]} == {"too short"}
    copies = [document(i) for i in range(6)]
    assert all(any(text.startswith(one["text"]) for text in copies) for one in left_out["exact duplicate"])
    assert {name: len(own) for name, own in kept.items()} == {"books": 3, "<script>": 3, "bad": 0}
    texts = all_documents(out)
    assert all(any(text.startswith(one["text"]) for text in texts) for own in kept.values() for one in own)
    page = page_of(report, "out")
    # as text, with its line ends; what turns the direction of writing is written out
    assert "{ &lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;\n&lt;b&gt;no&lt;/b&gt; \\u202esentence</pre>" in page
    assert "<script>" not in page
    assert "Content-Security-Policy" in page


def test_the_page_tells_how_it_was_built_and_no_secret(built: tuple[Path, dict[str, Any]]) -> None:
    _, report = built
    content = page_of(report, "out")
    page = Page(content)
    for row in (
        ["val_fraction", "0.2"],
        ["dedup.method", "exact"],
        ["rules.gopher_quality.min_stop_words", "0"],
        ["rules.c4.min_sentences", "5"],
    ):
        assert row in page.rows
    # those of a rule that is off, or of another method
    assert not [row for row in page.rows if row[0] in ("dedup.bands", "rules.fineweb.short_line", "rules.clean.nfc")]
    assert "s3://b/a.jsonl" in content
    assert "https://x.org/a.jsonl" in content
    assert not re.search("word@|Signature|abc'", content)
    assert "sentencepiece" in content
    assert f"Built {report['settings']['at']} with megagpt " in content


def test_what_took_most_bytes_is_first_and_sources_have_one_order(built: tuple[Path, dict[str, Any]]) -> None:
    report = copy.deepcopy(built[1])
    report["sources"].reverse()
    page = Page(page_of(report, "out"))
    sizes = {source["name"]: source["read"]["bytes"] for source in report["sources"]}
    largest_first = sorted(sizes, key=lambda name: -sizes[name])
    head = next(row for row in page.rows if row[0] == "bytes per document")
    assert head[1:] == largest_first
    at = page.rows.index(["bytes", "read", "after rules", "after deduplication", *SPLITS])
    assert [row[0] for row in page.rows[at + 1 : at + 4]] == largest_first
    for how in ("rejected", "dropped"):
        taken = [counts["bytes"] for counts in report[how].values()]
        assert taken == sorted(taken, reverse=True)


def test_a_split_without_documents_has_no_column(built: tuple[Path, dict[str, Any]]) -> None:
    report = copy.deepcopy(built[1])
    for counts in (report, *report["sources"]):
        counts["splits"]["test"] = {"documents": 0, "bytes": 0, "tokens": 0}
    page = Page(page_of(report, "out"))
    assert ["bytes", "read", "after rules", "after deduplication", "train", "val"] in page.rows
    assert "test tokens" not in page.words
    assert "test" not in page.words


def test_a_legend_wraps_only_where_its_names_do_not_fit() -> None:
    heights = []
    for names in (["a", "b"], ["cmake", "python", "awscli", "perl", "docs"], ["x" * 40, "y" * 40]):
        svg = bars("test", ["read"], {name: [1.0] for name in names}, str)
        found = re.search(r'height="([\d.]+)pt"', svg)
        assert found is not None
        heights.append(float(found[1]))
    assert heights[0] == heights[1] < heights[2]


def test_a_source_whose_name_begins_with_an_underscore_is_in_the_legend() -> None:
    svg = bars("test", ["read"], {"_web": [1.0], "books": [1.0]}, str)
    assert {"_web", "books"} <= {name.strip() for name in re.findall(r"<text[^>]*>([^<]*)</text>", svg)}


def test_equal_reports_give_equal_pages(built: tuple[Path, dict[str, Any]]) -> None:
    content = page_of(built[1], "out")
    assert page_of(json.loads(json.dumps(built[1])), "out") == content
    other = copy.deepcopy(built[1])
    other["splits"]["train"]["tokens"] += 1
    assert page_of(other, "out") != content


def test_a_plain_build_of_one_source_has_a_page_without_empty_plots(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    (tmp_path / "small.model").write_bytes(small_tokenizer().model_bytes)
    options = BuildConfig(tokenizer=tmp_path / "small.model", val_fraction=0)
    content = page_of(build([tmp_path / "a.txt"], tmp_path / "out", options), "out")
    page = Page(content)
    assert "Nothing: every document that was read is in a split." in page.words
    assert "None." in page.words
    assert content.count("<svg") == 6  # documents, bytes, two lengths, tokens per byte, seconds
    assert not [row for row in page.rows if row[0] in ("all sources", "variant 1")]


def test_many_sources_share_the_last_color(built: tuple[Path, dict[str, Any]]) -> None:
    report = copy.deepcopy(built[1])
    n = len(COLORS) + 5
    report["sources"] = [copy.deepcopy(report["sources"][0]) | {"name": f"source {i}"} for i in range(n)]
    page = Page(page_of(report, "out"))
    assert "6 other sources" in page.words
    heads = [row for row in page.rows if row[0] == "bytes per document"]
    assert [len(row) for row in heads] == [1 + len(COLORS)]


@pytest.mark.process
def test_help_needs_no_matplotlib() -> None:
    script = "import sys, data_tools.__main__; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
