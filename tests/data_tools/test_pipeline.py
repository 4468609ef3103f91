"""The stages of a build together: sources with own rules, duplicates, contamination, variants, long documents."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sentencepiece
from data_support import all_documents, document, documents_of, run, small_tokenizer, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st

import data_tools.readers.document_pieces
import data_tools.readers.formats.plain_text
import data_tools.stages.pipeline
from data_tools.build import build
from data_tools.config import BuildConfig, load_config
from megagpt.data.dataset import open_dataset
from megagpt.data.provenance import origins


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(small_tokenizer().model_bytes)
    return path


def jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return path


def rejects(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((folder / "rejects").glob("*.jsonl.zst")):
        with pa.input_stream(str(path)) as file:
            yield from map(json.loads, file.read().splitlines())


NASTY = [
    "</s>",
    "<s>",
    "<unk>",
    "<pad>",
    "a\0b",
    "\r\n",
    "\r",
    " \u2581 ",
    "\ufeff",
    "\u0301",
    "\U0001f468\u200d\U0001f469",
    "<0x41>",
]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(NASTY)


@settings(max_examples=25)
@given(texts=st.lists(st.lists(any_text, max_size=4).map("".join), min_size=1, max_size=8))
def test_any_text_comes_back_from_a_whole_build(
    texts: list[str], model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    kept = [text for text in texts if text.strip()]
    options = BuildConfig(tokenizer=model, val_fraction=0, dedup={"method": "none"}, subword={"variants": 1})
    if not kept:
        return
    build([jsonl(folder / "a.jsonl", texts)], folder / "out", options)
    assert all_documents(folder / "out") == sorted(kept)
    dataset, eod = open_dataset(folder / "out"), small_tokenizer().eod_id
    for variant in (0, 1):
        stream = dataset.stream("train", variant)
        ids = np.zeros(stream.n_tokens, np.int64)
        stream.copy(0, ids)
        assert np.count_nonzero(ids == eod) == len(kept)  # a literal control token never becomes the control id
        assert [small_tokenizer().decode(row) for row in stream.documents()] == documents_of(folder / "out")["train"]


def test_sources_have_fields_formats_and_rules_of_their_own(tmp_path: Path, model: Path) -> None:
    (tmp_path / "rules_of_the_wiki.py").write_text(
        "def no_secrets(text):\n    return 'secret' if 'hidden' in text else True\n"
    )
    jsonl(tmp_path / "wiki" / "a.jsonl", ["clean \r\n text", "hidden text"], field="body")
    write_texts(tmp_path / "code", 2)
    config = {
        "tokenizer": str(model),
        "val_fraction": 0,
        "sources": {
            "wiki": {
                "paths": str(tmp_path / "wiki" / "*.jsonl"),
                "text_field": "body",
                "rules": {"clean": True, "custom": "rules_of_the_wiki:no_secrets"},
            },
            "code": [str(tmp_path / "code")],
        },
    }
    (tmp_path / "build.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        assert run("build", "--config", tmp_path / "build.json", "--out", tmp_path / "out") == 0
    assert all_documents(tmp_path / "out") == sorted(["clean \n text", document(0), document(1)])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    wiki, code = report["sources"]
    assert (wiki["name"], wiki["read"]["documents"], wiki["after_rules"]["documents"]) == ("wiki", 2, 1)
    assert wiki["cleaned"] == {"newlines": 1}
    assert wiki["rejected"] == {"custom: rules_of_the_wiki:no_secrets: secret": {"documents": 1, "bytes": 11}}
    assert (code["read"]["documents"], code["rejected"]) == (2, {})
    [dropped] = rejects(tmp_path / "out")
    assert (dropped["rule"], dropped["text"]) == ("custom: rules_of_the_wiki:no_secrets: secret", "hidden text")
    assert dropped["file"] == str(tmp_path / "wiki" / "a.jsonl")


def edited(text: str) -> str:
    words = text.split(" ")
    words[len(words) // 2] = "edited"
    return " ".join(words)


@pytest.mark.parametrize("duplicates", ["remove", "keep"])
def test_no_copy_crosses_a_split_and_only_copies_are_dropped(duplicates: str, tmp_path: Path, model: Path) -> None:
    originals = [document(i, n_words=300) for i in range(30)]
    copies = [edited(text) for text in originals]
    jsonl(tmp_path / "a.jsonl", originals)
    jsonl(tmp_path / "b.jsonl", copies + originals[:5])
    options = BuildConfig(
        tokenizer=model,
        val_fraction=0.3,
        test_fraction=0.3,
        dedup={"method": "near", "duplicates": duplicates, "bands": 40, "rows": 3},
    )
    report = build([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", options)
    splits = documents_of(tmp_path / "out")
    assert len(splits) == 3
    where = {text: split for split, texts in splits.items() for text in texts}
    if duplicates == "remove":
        assert sorted(where) == sorted(originals)  # the first of each cluster stays
        assert report["dropped"]["exact duplicate"]["documents"] == 5
        assert report["dropped"]["near duplicate"]["documents"] == 30
        assert sorted(row["text"] for row in rejects(tmp_path / "out")) == sorted(copies + originals[:5])
    else:
        assert sorted(text for texts in splits.values() for text in texts) == sorted(originals + copies + originals[:5])
        assert report["dropped"] == {}
        assert all(where[original] == where[copy] for original, copy in zip(originals, copies, strict=True))


def test_what_an_evaluation_holds_is_not_trained_on(tmp_path: Path, model: Path) -> None:
    question = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    (tmp_path / "eval.txt").write_text(question)
    texts = [document(0), f"before {question.upper()} after", document(1)]
    jsonl(tmp_path / "a.jsonl", texts)
    options = BuildConfig(tokenizer=model, val_fraction=0, decontamination={"files": [str(tmp_path / "eval.txt")]})
    report = build([tmp_path / "a.jsonl"], tmp_path / "out", options)
    assert all_documents(tmp_path / "out") == sorted([texts[0], texts[2]])
    assert report["dropped"] == {"contaminated": {"documents": 1, "bytes": len(texts[1])}}


def test_a_long_document_is_judged_compared_and_written_like_a_short_one(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (data_tools.readers.document_pieces, data_tools.readers.formats.plain_text):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", 100)
    long, short = document(0, n_words=500), document(1, n_words=20)
    for name, text in {"a": long, "b": short, "c": long.replace("\n", "\n\n"), "d": short + "\0"}.items():
        (tmp_path / "in" / f"{name}.json").parent.mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.json").write_text(json.dumps({"text": text}))
    options = BuildConfig(tokenizer=model, val_fraction=0, dedup={"method": "near"}, rules={"clean": True})
    report = build([tmp_path / "in"], tmp_path / "out", options)
    assert all_documents(tmp_path / "out") == sorted([long, short])
    assert report["sources"][0]["cleaned"] == {"control_characters": 1}
    assert report["dropped"]["exact duplicate"]["documents"] == 2
    assert run("verify", tmp_path / "out") == 0


def test_what_is_dropped_is_nobodys_original(tmp_path: Path, model: Path) -> None:
    question = " ".join(f"word{i}" for i in range(14))
    (tmp_path / "eval.txt").write_text(question)
    rest = document(7, n_words=300)
    jsonl(tmp_path / "a.jsonl", [f"{question} {rest}", f"{question.replace('word7', 'other')} {rest}"])
    options = BuildConfig(
        tokenizer=model,
        val_fraction=0,
        dedup={"method": "near", "bands": 40, "rows": 3},
        decontamination={"files": str(tmp_path / "eval.txt")},
    )
    report = build([tmp_path / "a.jsonl"], tmp_path / "out", options)
    assert {rule: counts["documents"] for rule, counts in report["dropped"].items()} == {"contaminated": 1}
    assert all_documents(tmp_path / "out") == [f"{question.replace('word7', 'other')} {rest}"]


def test_a_file_listed_twice_gives_two_whole_documents(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.readers.formats.plain_text, "PIECE_CHARACTERS", 100)
    [text] = write_texts(tmp_path / "in", 1, n_words=200)
    options = BuildConfig(tokenizer=model, val_fraction=0, dedup={"method": "none"})
    build([tmp_path / "in", tmp_path / "in"], tmp_path / "a", options)
    sources = {"sources": {"both": {"paths": [str(tmp_path / "in"), str(tmp_path / "in" / "doc-000.txt")]}}}
    build(
        [],
        tmp_path / "b",
        BuildConfig.model_validate(options.model_dump(exclude={"sources"}, exclude_unset=True) | sources),
    )
    for folder in ("a", "b"):
        assert all_documents(tmp_path / folder) == [text, text]
        assert run("verify", tmp_path / folder) == 0


def test_a_piece_that_cleaning_empties_leaves_no_row(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tools.readers.formats.plain_text, "PIECE_CHARACTERS", 40)
    (tmp_path / "a.txt").write_text("first line of it\n" * 3 + "drop this line\n" * 9 + "last line of it\n" * 3)
    options = BuildConfig(tokenizer=model, val_fraction=0, rules={"clean": {"drop_patterns": "drop|this|line$"}})
    build([tmp_path / "a.txt"], tmp_path / "out", options)
    [text] = all_documents(tmp_path / "out")
    assert "drop" not in text
    assert run("verify", tmp_path / "out") == 0


def test_origins_are_right_however_small_the_shards(tmp_path: Path, model: Path) -> None:
    write_texts(tmp_path / "in", 20)
    build([tmp_path / "in"], tmp_path / "out", BuildConfig(tokenizer=model, val_fraction=0.2, shard_tokens=30))
    dataset = open_dataset(tmp_path / "out")
    for split in ("train", "val"):
        stream = dataset.stream(split)
        texts = [Path(origin.file).read_text() for origin in origins(dataset, split, range(stream.n_rows))]
        assert texts == [small_tokenizer().decode(ids) for ids in stream.documents()]


def test_shards_do_not_depend_on_how_many_passes_wrote_them(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "in", 20)
    options = BuildConfig(tokenizer=model, val_fraction=0)
    build([tmp_path / "in"], tmp_path / "one", options)
    monkeypatch.setattr(data_tools.stages.pipeline, "PASS_TOKENS", 500)
    build([tmp_path / "in"], tmp_path / "many", options)
    assert documents_of(tmp_path / "one") == documents_of(tmp_path / "many")
    assert open_dataset(tmp_path / "many").index("train")["batch"].max() > 3


def test_variants_are_other_tokenizations_of_the_same_documents_in_the_same_order(tmp_path: Path, model: Path) -> None:
    write_texts(tmp_path / "in", 30)
    options = BuildConfig(tokenizer=model, val_fraction=0.2, shard_tokens=2000, subword={"variants": 2})
    report = build([tmp_path / "in"], tmp_path / "out", options)
    dataset, tokenizer = open_dataset(tmp_path / "out"), small_tokenizer()
    ids = [[row.tolist() for row in dataset.stream("train", variant).documents()] for variant in range(3)]
    assert ids[0] != ids[1] != ids[2] != ids[0]
    assert len({tuple(map(tokenizer.decode, rows)) for rows in ids}) == 1
    assert [variant.kind for variant in dataset.manifest.splits["train"].variants] == [
        "canonical",
        *["unigram-sampling"] * 2,
    ]
    assert len(dataset.manifest.splits["val"].variants) == 1
    assert report["variants"][1]["times_canonical"] > 1.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dedup.metod=near"], "unknown key 'dedup.metod'; did you mean 'dedup.method'?"),
        (["dedup.method=fuzzy"], "dedup.method='fuzzy' is not 'none', 'exact' or 'near'"),
        (["rules.gopher_qualty=true"], "unknown key 'rules.gopher_qualty'; did you mean 'rules.gopher_quality'?"),
        (["rules.custom=no.such.module:f"], "cannot import no.such.module"),
        (["subword.alpha=0.5"], "subword.alpha=0.5 has no effect without variants; set subword.variants"),
        (["subword.variants=1", "tokenizer_type=char"], "has no effect with tokenizer_type=char"),
        (['sources={"a": {"pths": "x"}}'], "unknown key 'sources.a.pths'; did you mean 'sources.a.paths'?"),
        (["decontamination.files=/no/such.txt"], "/no/such.txt: there is no such file or folder"),
        (["seed.x=1"], "seed"),
        (["seed=5", "seed.x=3"], "there is no 'seed.x' to set, because seed=5 is not a section {...}"),
        (["rules.clean=true", "rules.clean.emails=true"], "because rules.clean=true is not a section"),
        (['sources=[{"name": "a", "paths": "x"}]'], "sources is not an object of options by name"),
        (["dedup.bands=20"], "dedup.bands has no effect with dedup.method='exact'; set dedup.method to near"),
        (["dedup.method=near", "dedup.bands=100000"], "dedup.bands=100000 is too large; set it to at most 256"),
        (["format=jsnl"], "format='jsnl' of in is unknown; did you mean 'jsonl'?"),
        (["seed=-1"], "seed=-1 is too small; set it to at least 0"),
    ],
)
def test_mistakes_at_any_depth_are_named(
    overrides: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "in", 3)
    assert run("build", "--input", tmp_path / "in", "--out", tmp_path / "out", *overrides) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown
    assert shown.count("\n") == 1


def test_nothing_to_read_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "--out", tmp_path / "out") == 2
    assert 'there is nothing to read; give --input PATH, or "sources" in --config' in capsys.readouterr().err


def test_the_same_name_twice_gets_a_number() -> None:
    config = load_config(BuildConfig, None, [])
    assert [source.name for source in config.with_inputs(["/a/x", "/b/x", "/c/y"])] == ["x", "x-2", "y"]
    assert [source.name for source in config.with_inputs(["/a/a-2", "/b/a", "/c/a"])] == ["a-2", "a", "a-3"]


def test_a_tokenizer_that_loses_text_is_taken_and_said_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "in", 5)
    lossy = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(document(0).split("\n")), model_writer=lossy, vocab_size=30, minloglevel=2
    )
    (tmp_path / "lossy.model").write_bytes(lossy.getvalue())
    arguments = ("--input", tmp_path / "in", "--out")
    assert run("build", *arguments, tmp_path / "a", f"tokenizer={tmp_path / 'lossy.model'}", "val_fraction=0") == 0
    assert re.search(r"the tokenizer loses \d+(\.\d+)?% of the text", capsys.readouterr().out)
    assert run("build", *arguments, tmp_path / "b", "vocab_size=300", "val_fraction=0") == 0
    assert "loses text" not in capsys.readouterr().out


def test_the_output_folder_within_the_input_is_no_input(tmp_path: Path, model: Path) -> None:
    texts = write_texts(tmp_path / "in", 5)
    out = tmp_path / "in" / "data"
    (out / ".build").mkdir(parents=True)
    (out / ".build" / "megagpt.lock").touch()
    (out / "report.json").write_text('{"documents": 1}')  # of a build that died while it published
    build([tmp_path / "in"], out, BuildConfig(tokenizer=model, val_fraction=0))
    assert all_documents(out) == sorted(texts)
