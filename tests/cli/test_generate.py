"""`megagpt generate`: prompts from files, JSON, what of a text is shown and when, and each mistake as one message."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, debug_run, environment

import megagpt
from megagpt.__main__ import main
from megagpt.cli.generate.command import Setting, print_texts
from megagpt.config.generation import GenerationConfig
from megagpt.model.generate import new_texts
from megagpt.train.trainer import train


@pytest.fixture(scope="module")
def trained(dataset, device, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("generate") / "run"
    train(debug_run(dataset, run, "megagpt.schedule.max_steps=2", "megagpt.schedule.warmup_steps=0"), device)
    return run


def generated(capsys, *words):
    capsys.readouterr()
    assert main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_prompts_of_a_file_are_continued_in_order_as_those_of_options(trained, tmp_path, capsys):
    prompts = ["abc", "", " def ghi", "x" * 70]
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfabc\r\n\r\n def ghi\r\n" + b"x" * 70)
    (tmp_path / "lines.jsonl").write_text("\n\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    expected = generated(capsys, trained, "--max-tokens", 6, *(word for p in prompts for word in ("--prompt", p)))
    assert expected.count("\n---\n") == 3
    for name in ("lines.txt", "lines.jsonl"):
        assert generated(capsys, trained, "--max-tokens", 6, "--prompts", tmp_path / name) == expected
    (tmp_path / "many.txt").write_text("abc\n" * 20)  # more than are continued at once
    options = ("--max-tokens", 3, "--batch", 2)
    together = generated(capsys, trained, "--prompts", tmp_path / "many.txt", *options)
    assert together == generated(capsys, trained, "--prompt", "abc", "--max-tokens", 3, "--batch", 40)
    [last] = together.split("\n---\n")[39:]
    assert generated(capsys, trained, "--prompt", "abc", "--max-tokens", 3, "--seed", 39) == last


def test_json_has_the_tokens_of_the_text_and_the_models_log_probabilities(trained, capsys):
    options = ["--max-tokens", 30, "--stop", "a", "--stop", r"b\nc", "--min-p", 0.01, "--repetition-penalty", 1.1]
    rows = generated(capsys, trained, "--prompt", "ab", "--prompt", "", *options, "--json").splitlines()
    model = megagpt.load(trained, device="cpu")
    assert [json.loads(row)["prompt"] for row in rows] == ["ab", ""]
    for row in map(json.loads, rows):
        ids = [model.tokenizer.eod_id, *model.tokenizer.encode(row["prompt"]).tolist(), *row["tokens"]]
        log_p = model.logits(ids[:-1])[-len(row["tokens"]) :].log_softmax(-1)
        picked = [log_p[i, token].item() for i, token in enumerate(row["tokens"])]
        assert row["log_probabilities"] == pytest.approx(picked, abs=1e-4)
        assert row["ended"] in ("stop", "length", "end of document")
        assert model.tokenizer.decode(row["tokens"]).startswith(row["text"])
        assert "a" not in row["text"]
    whole = generated(capsys, trained, "--prompt", "ab", "--prompt", "", *options)
    assert whole == "\n---\n".join(row["prompt"] + row["text"] for row in map(json.loads, rows)) + "\n"


def test_the_first_text_is_shown_as_it_comes_and_generation_ends_with_its_reader(trained, monkeypatch):
    model = megagpt.load(trained, device="cpu")
    setting = Setting(model.model, model.tokenizer, GenerationConfig(max_tokens=50, top_k=0), batch=1, json=False)
    texts = new_texts(model.tokenizer, ["abc", "de"], setting.cfg)
    shown = []

    def show(text, *, end):
        shown.append((text, len(texts[0].tokens)))
        return len(shown) < 4

    monkeypatch.setattr("megagpt.cli.generate.command.show", show)
    assert not print_texts(setting, texts)
    (prompt, n), *rest = shown
    assert (prompt, n) == ("abc", 0)
    assert "".join(text for text, _ in rest) == texts[0].text
    assert sorted({n for _, n in rest}) == [n for _, n in rest]  # something after each token that has some
    assert len(texts[0].tokens) == len(texts[1].tokens) == rest[-1][1] < 50


def test_control_codes_of_a_text_are_escaped_on_a_terminal_alone(trained, monkeypatch, capsys):
    prompt = ("--prompt", r"a\x1b[2J\u202eb\n\tc", "--max-tokens", 1)
    assert generated(capsys, trained, *prompt).startswith("a\x1b[2J\u202eb\n\tc")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert generated(capsys, trained, *prompt).startswith("a\\x1b[2J\\u202eb\n\tc")


FILES = {
    "empty.txt": b"",
    "latin.txt": b"ok\ncaf\xe9\n",
    "utf16.txt": "hi\n".encode("utf-16"),
    "binary.txt": b"a\0b",
    "list.json": b'["a"]',
    "text.jsonl": b'{"prompt": "a"}\n{"text": "b"}',
    "array.jsonl": b'["a"]',
    "cut.jsonl": b'{"prompt": "a"',
    "half.jsonl": rb'{"prompt": "\ud800"}',
    "blank.jsonl": b"\n \n",
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--prompts empty.txt", "empty.txt is empty; give a file with a prompt per line"),
        ("--prompts latin.txt", "latin.txt is not UTF-8 text: line 2 has the byte 0xe9; if it is Latin-1, convert it"),
        ("--prompts utf16.txt", "utf16.txt is UTF-16; convert it with: iconv -f utf-16 -t utf-8 utf16.txt > "),
        ("--prompts binary.txt", "binary.txt is binary, with NUL bytes"),
        ("--prompts list.json", 'list.json is JSON, .* give JSON lines such as {"prompt":'),
        ("--prompts text.jsonl", "text.jsonl, line 2: has no text \"prompt\"; it has 'text'"),
        ("--prompts array.jsonl", "array.jsonl, line 1: has no text"),
        ("--prompts cut.jsonl", "cut.jsonl, line 1: is no JSON"),
        ("--prompts half.jsonl", "half.jsonl, line 1: the prompt has half a surrogate pair"),
        ("--prompts blank.jsonl", "blank.jsonl is empty"),
        ("--temperature nan", "--temperature=NaN is not a finite number; give one, or leave it out"),
        ("--prompts nowhere", "the file of prompts nowhere cannot be read: No such file"),
        ("--prompts .", "--prompts . is a folder; give a file with a prompt per line, or a .jsonl"),
        ("--prompts", "--prompts '' is a folder; give a file"),  # and an empty word
        ("--prompts x --prompt a", "--prompt and --prompts are both given"),
        ("--interactive --prompts x", "--prompts and --interactive are both given"),
        ("--interactive --json", "--interactive shows text, and --json is for programs"),
        ("--stop", "--stop: an empty string is before any text"),
        ("--min-p 1.5", "--min-p=1.5 is too large; set it to at most 1"),
        ("--repetition-penalty 0", "--repetition-penalty=0.0 is too small"),
        ("--top-p 0", "--top-p=0.0 is too small"),
        ("--stop-strings x", "no option --stop-strings; did you mean --stop?"),
        ("--prompt-file x", "no option --prompt-file; did you mean --prompts?"),
    ],
)
def test_a_mistake_is_one_message(trained, tmp_path, monkeypatch, capsys, words, message):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    typed = [*words.split(), *([""] if words in ("--prompts", "--stop") else [])]
    capsys.readouterr()
    assert main(["generate", str(trained), "--max-tokens", "1", *typed]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert re.search(message, said.err)


def test_a_file_of_prompts_that_is_too_large_is_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("megagpt.cli.generate.prompts.MOST_BYTES", 2**20)
    (tmp_path / "x.txt").write_bytes(b"a" * (2**20 + 1))
    assert main(["generate", str(trained), "--prompts", str(tmp_path / "x.txt")]) == 2
    assert "x.txt is larger than 1 MiB; split it" in capsys.readouterr().err


def test_more_texts_than_memory_holds_name_the_option(trained, monkeypatch, capsys):
    monkeypatch.setattr("megagpt.cli.generate.command.free_memory", lambda device: 2**20)
    assert main(["generate", str(trained), "--batch", "100"]) == 2
    assert "error: --batch 100 needs 0.0 GiB of memory" in capsys.readouterr().err.replace("0.1", "0.0")
    monkeypatch.undo()
    monkeypatch.setattr("megagpt.model.gpt.GPT.new_caches", lambda *_: exec("raise MemoryError"))
    assert main(["generate", str(trained), "--batch", "2"]) == 2
    assert (
        "error: --batch 2 does not fit into memory; give a smaller one, or give fewer --max-tokens"
        in capsys.readouterr().err
    )


def test_prompts_from_a_pipe_are_answered_with_the_same_separator(trained, capsys, monkeypatch):
    prompts = ["abc", "", " def"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(prompts) + "\n"))
    asked = generated(capsys, trained, "--max-tokens", 6, "--interactive")
    assert asked == generated(capsys, trained, "--max-tokens", 6, *(word for p in prompts for word in ("--prompt", p)))
    assert asked.count("\n---\n") == 2


@pytest.mark.process
def test_an_interactive_session_on_a_terminal(trained):
    """Ctrl-C ends a text that would take hours, and not the program. Ctrl-D ends it."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "megagpt", "generate", str(trained), "--interactive", "--max-tokens", "1000000"]
    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    program = subprocess.Popen([*command, "--temperature", "0"], cwd=ROOT, env=environment(), **terminal)
    os.close(theirs)
    shown = ""

    def wait_for(text: str) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([ours], [], [], 120)[0], shown
            shown += os.read(ours, 4096).decode(errors="replace")
        shown = shown.partition(text)[2]

    try:
        wait_for("> ")
        os.write(ours, b"abc\n")
        wait_for("abc\r\nabc")  # as typed, and as the beginning of the text
        program.send_signal(signal.SIGINT)
        wait_for("\r\n> ")
        os.write(ours, b"de\n")
        wait_for("de\r\nde")
        program.send_signal(signal.SIGINT)
        wait_for("\r\n> ")
        os.write(ours, b"\x04")
        assert program.wait(120) == 0
    finally:
        program.kill()
        program.wait()
        os.close(ours)
    assert "Traceback" not in shown
