"""A build says what its rules and its comparison of documents took before anything that this causes."""

import re
from pathlib import Path

import pytest
from data_support import document, run, small_tokenizer, write_text

SHORT, LONG = "too short", 60  # fewer words than Gopher's 50, and more


def write_mixed(folder: Path, n_short: int, n_long: int) -> tuple[int, int]:
    """Write documents that gopher_quality rejects for their length, and others that it keeps; returns their bytes."""
    short = [write_text(folder / f"short-{i}.txt", f"{SHORT} {i:04d}" * 8) for i in range(n_short)]
    long = [write_text(folder / f"long-{i}.txt", document(i, LONG)) for i in range(n_long)]
    return sum(map(len, short)), sum(map(len, long))


RULES = ("rules.gopher_quality.min_stop_words=0", "rules.gopher_quality.min_alphabetic_words=null")


def test_what_rules_took_is_told_before_the_error_that_it_causes_and_the_way_out_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rejected, kept = write_mixed(tmp_path / "in", 200, 12)
    out = tmp_path / "out"
    build = ("build", "--input", tmp_path / "in", "--out", out, *RULES, "val_fraction=0")
    assert run(*build, "vocab_size=8000") == 2
    said = capsys.readouterr().err
    share = re.escape(f"{100 * kept / (kept + rejected):.3g}%")
    assert re.match(
        rf"warning: the rules left \S+ of \S+ kB of text \({share}\), 12 of 212 documents; they took:\n", said
    )
    assert f"  {rejected / 1000:.3g} kB  200 documents  gopher_quality: fewer than 50 words\n" in said
    assert "web prose: `python -m data_tools build --help` lists" in said
    assert said.index("warning: ") < said.index("error: vocab_size=8000 is more pieces than ")
    # all of the text was sampled, so a larger sample would change nothing
    assert f"than {kept / 1000:.3g} kB of text give, all that there is to train on; set vocab_size=" in said
    assert "sample_bytes" not in said
    assert f"\nWhat is done is kept in {out / '.build'}: run the command again, corrected, to resume, or delete" in said
    most = re.search(r"set vocab_size=(\d+), the most", said)
    assert most is not None
    assert run(*build, f"vocab_size={most[1]}") == 0
    shown = capsys.readouterr().out
    assert re.match(rf"12 documents, \S+ of \S+ kB of text \({share}\) kept -> ", shown)
    assert f"  less than half is kept: {out / 'report.html'} shows what was left out" in shown
    assert f"  rejected {rejected / 1000:.3g} kB in 200 documents: gopher_quality: fewer than 50 words\n" in shown
    assert f"{out} is ready; {out / 'report.html'} shows what is in it\n" in shown
    assert not (out / ".build").exists()


def test_rules_that_take_less_than_half_are_told_without_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_mixed(tmp_path / "in", 3, 12)
    (tmp_path / "a.model").write_bytes(small_tokenizer().model_bytes)
    build = ("build", f"tokenizer={tmp_path / 'a.model'}", "val_fraction=0", "--input", tmp_path / "in")
    assert run(*build, "--out", tmp_path / "out", *RULES) == 0
    shown = capsys.readouterr()
    assert shown.err.startswith("the rules left ")
    assert "warning" not in shown.err
    assert "less than half" not in shown.out
    assert run(*build, "--out", tmp_path / "all") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert re.match(r"15 documents, \S+ kB of text -> ", shown.out)


def test_a_larger_sample_is_advised_where_it_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # words of three letters: the more text, the more of them
    words = [f"{a}{b}{c}" for a in "bcdfghklmnpr" for b in "aeiou" for c in "bdgklmnprstz"]
    for i in range(40):
        write_text(tmp_path / "in" / f"{i:02d}.txt", " ".join(words[i * 17 :] + words[: i * 17]) * 4)
    train = ("train-tokenizer", "--input", tmp_path / "in", "--out", tmp_path / "a.model")
    assert run(*train, "sample_bytes=2000", "vocab_size=560") == 2
    said = capsys.readouterr().err
    assert "of text give, the sample to train on; set vocab_size=" in said
    assert said.endswith("or give a larger sample_bytes\n")
    assert "What is done is kept" not in said
    assert run(*train, "vocab_size=560") == 0


def test_copies_that_take_more_than_half_are_told_before_a_tokenizer_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, kept = write_mixed(tmp_path / "in", 0, 6)
    folders = [tmp_path / "in"] * 3
    assert run("build", "--input", *folders, "--out", tmp_path / "out", "vocab_size=90000", "val_fraction=0") == 2
    said = capsys.readouterr().err
    assert "are dropped, which leaves " in said
    assert "of text (33.3%), 6 of 18 documents:" in said
    assert f"  {2 * kept / 1000:.3g} kB  12 documents  exact duplicate\n" in said
    assert said.index("exact duplicate") < said.index("error: ")


def test_reasons_for_an_empty_build_are_counted_over_all_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source in ("a", "b"):
        for i in range(3):
            write_text(tmp_path / source / f"{i}.txt", f"{SHORT} {source}{i}")
    options = ("--out", tmp_path / "out", "rules.gopher_quality=true")
    assert run("build", "--input", tmp_path / "a", tmp_path / "b", *options) == 2
    assert (
        "no text to train a tokenizer on; rejected: 6 by gopher_quality: fewer than 50 words;"
        in capsys.readouterr().err
    )
