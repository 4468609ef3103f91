"""The builder's command line: what is typed in the words of other programs, its help, and its own name in advice."""

import re
import sys
from pathlib import Path

import pytest
from data_support import run, write_text

import megagpt.__main__
from data_tools.arguments import option_defaults
from data_tools.config import BuildConfig, load_config
from megagpt.config.schema_keys import typed_keys

OUT = "--input in --out out "


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (OUT + "--vocab_size 8000", "options are key=value: write vocab_size=8000 and not --vocab_size"),
        (OUT + "--vocab-size=8000", "write vocab_size=8000 and not --vocab-size=8000"),
        (OUT + "--vocab-size 8k", "vocab_size='8k' is not a number; write vocab_size=8000"),
        (OUT + "--vocabsize 8000", "there is no option --vocabsize; did you mean vocab_size=8000?"),
        (OUT + "--dedup near", "dedup='near' is not a section {...}; write dedup.method=near"),
        (OUT + "--dedup.method near seed=3", "write dedup.method=near and not --dedup.method"),
        (OUT + "--tokenizer x.model", "write tokenizer=x.model and not --tokenizer"),
        (OUT + "--num-workers 4", "write workers=4 and not --num-workers"),
        (OUT + "--sceduler slurm", "there is no option --sceduler; did you mean --scheduler slurm?"),
        (OUT + "--frobnicate", "there is no option --frobnicate; options are key=value, see --help"),
        (OUT + "vocab_size 8000", "write vocab_size=8000 and not vocab_size"),
        (OUT + "vocab_size = 8000", "write vocab_size=8000 and not vocab_size"),
        (OUT + "vocab_size= 8000", "write vocab_size=8000 and not vocab_size="),
        (OUT + "val=some/where", "there is no val=some/where; write --val some/where"),
        ("input=in --out out", "there is no input=in; write --input in"),
        (OUT + "--model_prefix m", "there is no --model_prefix; write --out m"),
        (OUT + "strict", "write strict=true and not strict"),
        (OUT + "dedup.method near", "write dedup.method=near and not dedup.method"),
        ("--input in --output out", "there is no --output; write --out out"),
        ("--input in -o out", "there is no -o; write --out out"),
        ("-i in --out out", "there is no -i; write --input in"),
        ("in --out out", "in is no option; paths to read go after --input: --input in"),
        ("some/where out", "paths to read go after --input: --input some/where"),
        (
            "--input in",
            "--out is missing; give what to write, as in python -m data_tools build --input PATH --out PATH",
        ),
        ("--out out", "there is nothing to read; give --input PATH"),
    ],
)
def test_what_other_programs_would_take_is_one_message_with_the_right_words(
    typed: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "in", "some text")
    assert run("build", *typed.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert meant in said
    if found := re.search(r"write (\S+=\S+)", said):
        load_config(BuildConfig, None, [found[1].replace("x.model", str(tmp_path))])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_empty_value_is_a_value(tmp_path: Path) -> None:
    write_text(tmp_path / "in.txt", "some text " * 40)
    paths = ("--input", tmp_path / "in.txt", "--out", tmp_path / "out")
    assert (
        run("build", *paths, "split_text_at=", "vocab_size=268", "val_fraction=0", "strict=true", "chat_template=null")
        == 0
    )


def test_each_default_in_the_help_is_the_default_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    default = BuildConfig().model_dump(mode="json")
    found = {key: shown for key, shown, _ in option_defaults(BuildConfig)}
    sections = {key.rpartition(".")[0] for key in found} | {"rules"}
    assert found.keys() == (typed_keys(BuildConfig) - sections) | {key for key in sections if key in found}
    for key, shown in found.items():
        head, _, leaf = key.rpartition(".")
        # these have an effect with others alone
        base = {"dedup": ["dedup.method=near"], "subword": ["subword.variants=1"]}.get(head, [])
        base = ["rules.language.model=x", *base] if head == "rules.language" else base
        if leaf == "model" or key in ("dedup.method", "subword.variants"):
            continue
        typed = load_config(BuildConfig, None, [*base, f"{key}={shown}"]).model_dump(mode="json")
        if base or (head.startswith("rules.") and head != "rules.clean"):
            on = load_config(BuildConfig, None, base or [f"{head}=true"]).model_dump(mode="json")
            assert typed == on, key
        else:
            assert typed == default, key


def test_the_help_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("build", "train-tokenizer", "compare-tokenizers", "verify", "inspect"):
        with pytest.raises(SystemExit, match="0"):
            run(command, "--help")
        lines = capsys.readouterr().out.splitlines()
        # a default that is longer than a line is one word, to be copied
        assert [line for line in lines if len(line) > 80 and " " in line.strip()] == []
        if command == "build":
            described = [line for line in lines if re.match(r"  [a-z_.]+=\S* +\S", line)]
            assert len(described) > 20
            assert {line[33] for line in described} == {" "}
            assert {line[34] != " " for line in described} == {True}


@pytest.mark.parametrize(
    ("started", "name"),
    [
        ("/usr/bin/megagpt", "megagpt data"),
        ("/x/megagpt/__main__.py", "python -m megagpt data"),
        ("/x/data_tools/__main__.py", "python -m data_tools"),
    ],
)
def test_advice_names_the_builder_as_it_was_typed(
    started: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    with pytest.raises(SystemExit, match="0"):
        megagpt.__main__.main(["data", "build", "--help"])
    shown = capsys.readouterr().out
    assert f"usage: {name} build --input" in shown
    assert f"example:\n  {name} build --input books/" in shown
    assert megagpt.__main__.main(["data", "verify", str(tmp_path / "none")]) == 2
    assert f"make it with `{name} build --input" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        megagpt.__main__.main(["data", "bild"])
    assert f"usage: {name} " in capsys.readouterr().err
