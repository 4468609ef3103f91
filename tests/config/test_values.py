"""Values at the edge of what a number can be, at every key and option: each is taken, or one message refuses it."""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from support import DEBUG_RUN, GOOD, debug_run, overrides

import data_tools.__main__
import megagpt.__main__
from data_tools.arguments import builder_parser
from data_tools.config import BuildConfig, load_config
from megagpt.cli.arguments import command_line
from megagpt.cli.pretrain import pretrain
from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.config.run_file import SECTION, RunConfig, parse_run
from megagpt.config.schema import MegaGPTConfig
from megagpt.config.schema_keys import kinds_of, models_in, typed_keys
from megagpt.errors import UserError
from megagpt.lint.linter import lint_file, lint_or_raise
from megagpt.planner import estimate
from megagpt.planner.report import as_json, plan_report
from megagpt.terminal import SCREEN_CHARACTERS, SCREEN_LINES
from megagpt.train.lr_schedule import lr_factor

EDGES = [  # as they are typed
    *(
        "0",
        "-0",
        "-1",
        "1",
        "0.5",
        "2",
        "true",
        "false",
        "null",
        "",
        "x",
        "[]",
        "{}",
        "[1]",
        '"3"',
        "0x10",
        "1_0",
        "\u00b2",
    ),
    *("nan", "NaN", "inf", "Infinity", "-Infinity", "1e-320", "1e-39", "1e-9", "1e20", "1e30", "1e308", "1e400"),
    *("10000000", "2147483648", "9223372036854775807", "9223372036854775808", "-9223372036854775809"),
    *("99999999999999999999999", "9" * 5000, "x" * 100_000, "a\\0b", '"\\ud800"'),
]


def numeric_keys(model: type[BaseModel], section: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """Every dotted key with a number in it, as it is typed, with its model and its name there."""
    for name, info in model.model_fields.items():
        kinds = kinds_of(model, name)
        dotted = f"{section}.{name}" if section else name
        if not kinds.isdisjoint({int, float}):
            yield dotted, model, name
        for inner in models_in(info.annotation):
            if name != "sources":
                yield from numeric_keys(inner, f"{dotted}.0" if tuple in map(_origin, kinds) else dotted)


def _origin(kind: Any) -> Any:
    return getattr(kind, "__origin__", None)


RUN_KEYS = [*numeric_keys(MegaGPTConfig, SECTION), *numeric_keys(DeepSpeedConfig)]
BUILD_KEYS = list(numeric_keys(BuildConfig))


def bounds(annotation: Any, metadata: list[Any]) -> set[str]:
    """Which of its two bounds each number of a field has, at any depth of the annotation."""
    found = {"low" for m in metadata if isinstance(m, Ge | Gt)} | {"high" for m in metadata if isinstance(m, Le | Lt)}
    if hasattr(annotation, "__metadata__"):
        for info in annotation.__metadata__:
            found |= bounds(None, getattr(info, "metadata", [info]))
    for part in get_args(annotation):
        found |= bounds(part, [])
    return found


@pytest.mark.parametrize("keys", [RUN_KEYS, BUILD_KEYS], ids=["run file", "builder"])
def test_every_number_has_a_lower_and_an_upper_bound(keys):
    assert len(keys) > 20
    fields = {dotted: model.model_fields[name] for dotted, model, name in keys}
    assert [key for key, info in fields.items() if bounds(info.annotation, info.metadata) < {"low", "high"}] == []


def one_message(text: str) -> bool:
    return text.count("\n") < SCREEN_LINES and len(text) < SCREEN_CHARACTERS + 100 and "Traceback" not in text


def uses(run: RunConfig) -> None:
    """What commands compute of a run before it starts."""
    lint_or_raise(run)
    on = estimate.machine("H100", 1, None)
    found = list(estimate.settings(run, on, 384))
    tokens = run.megagpt.schedule.max_steps * run.deepspeed.train_batch_size * run.megagpt.seq_len
    assert plan_report(run, on, (384, "of it"), found, tokens)
    json.dumps(as_json(on, (384, "of it"), found, tokens), allow_nan=False)
    assert 0.0 <= lr_factor(run.megagpt.schedule.max_steps - 1, run.megagpt.schedule) <= 1.0


@settings(max_examples=60)
@given(
    st.sampled_from([key for key, *_ in RUN_KEYS]),
    st.sampled_from(EDGES) | st.floats().map(repr) | st.integers().map(str),
)
def test_any_number_of_a_run_file_is_taken_or_one_message(key, text):
    refused = refusal(lambda: uses(parse_run(GOOD, [f"{key}={text}"])))
    assert refused is None or (one_message(refused) and (key in refused or "train_batch_size" in refused))


@pytest.mark.parametrize("key", [key for key, *_ in RUN_KEYS])
def test_every_edge_of_a_run_files_numbers_is_taken_or_one_message(key):
    for text in EDGES:
        raw: dict[str, Any] = {}
        refused = refusal(lambda: raw.update(parse_run(GOOD, [f"{key}={text}"]).as_json()))  # noqa: B023
        assert refused is None or (one_message(refused) and key in refused), text
        assert not isinstance(value_at(raw, key), bool), text
        json.dumps(raw, allow_nan=False)


def refusal(call: Callable[[], None]) -> str | None:
    """The message of a UserError; any other exception is a traceback that a user would see."""
    try:
        call()
    except UserError as error:
        return str(error)
    return None


def value_at(raw: Any, key: str) -> Any:
    for part in key.split("."):
        raw = raw[int(part)] if isinstance(raw, list) else raw.get(part) if isinstance(raw, dict) else None
    return raw


@pytest.mark.parametrize("key", [key for key, *_ in BUILD_KEYS])
def test_every_edge_of_the_builders_numbers_is_taken_or_one_message(key):
    base = ["dedup.method=near", "subword.variants=1"] if key.startswith(("dedup.", "subword.")) else []
    base += ["rules.language.model=lid.bin"] if key.startswith("rules.language.") else []
    for text in EDGES:
        raw: dict[str, Any] = {}
        given = [*base, f"{key}={text}"]
        refused = refusal(lambda: raw.update(load_config(BuildConfig, None, given).model_dump(mode="json")))  # noqa: B023
        assert refused is None or (one_message(refused) and key in refused), text
        assert not isinstance(value_at(raw, key), bool), text
        json.dumps(raw, allow_nan=False)


@pytest.mark.parametrize("key", sorted(typed_keys(BuildConfig) - {key for key, *_ in BUILD_KEYS}))
def test_no_option_of_the_builder_answers_in_the_words_of_pydantic(key):
    for text in [*EDGES, "[[2]]", '{"a": 1}', "near", "yes", "a/b.txt"]:
        refused = refusal(lambda: load_config(BuildConfig, None, [f"{key}={text}"]) and None)  # noqa: B023
        assert refused is None or one_message(refused), text[:50]
        assert not re.search(r"Input|Value|instance|should|tuple|dict|[Ss]tring", refused or ""), refused


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("dedup=near", "write dedup.method=near"),
        ("subword=3", "write subword.variants=3"),
        ("decontamination=test/set.jsonl", "write decontamination.files=test/set.jsonl"),
        ("rules.gopher_quality=20", "write rules.gopher_quality=true, or set a key of it: rules.gopher_quality.min_w"),
        ("rules.gopher_quality=yes", "write rules.gopher_quality=true, or set"),
        ("rules=c4", "write rules.c4=true"),
        ("tokenizer=bpe", "write tokenizer_type=bpe"),
        ("rules.language=en", "set a key of it: rules.language.model, rules.language.keep, rules.language.min_score"),
        ("rules.gopher_quality.min_alpha=0.5", "did you mean 'rules.gopher_quality.min_alphabetic_words'?"),
        ("rules.fineweb.min_words=3", "did you mean 'rules.gopher_quality.min_words'?"),
        ("dedup.threshold=0.8", "known are dedup.bands, dedup.duplicates, dedup.method"),
        ("vocab_size=8k", "is not a number; write vocab_size=8000"),
        ("vocab_size=8,000", "write vocab_size=8000"),
        ("sample_bytes=1.5MB", "write sample_bytes=1500000"),
        ("val_fraction=5%", "write val_fraction=0.05"),
        ("val_fraction=5", "is too large; set it to at most 1"),
        ("tokenizer_type=BPE", "is not 'unigram', 'bpe' or 'char'; did you mean 'bpe'?"),
        ('sources={"wiki": {"pth": "x"}}', "unknown key 'sources.wiki.pth'; did you mean 'sources.wiki.paths'?"),
    ],
)
def test_what_was_meant_is_written_out_and_works_as_typed(typed, meant):
    said = refusal(lambda: load_config(BuildConfig, None, [typed]) and None) or ""
    assert meant in said
    if found := re.search(r"write ([^ ,;]+=[^ ,;]+)", said):
        assert refusal(lambda: load_config(BuildConfig, None, [found[1]]) and None) is None


@pytest.mark.parametrize("file", [None, '{"rules": {"c4": true, "fineweb": true}}'])
@pytest.mark.parametrize("order", [1, -1])
def test_a_rule_that_is_on_takes_thresholds_in_any_order(file, order, tmp_path):
    path = tmp_path / "build.json" if file else None
    if path is not None:
        path.write_text(file)
    typed = ["rules.c4=true", "rules.c4.min_sentences=1"][::order]
    rules = load_config(BuildConfig, path, typed).rules
    assert rules.c4 is not None
    assert (rules.c4.min_sentences, rules.c4.min_words_per_line) == (1, 3)
    assert (rules.fineweb is not None) == (file is not None)


def options(
    parser: argparse.ArgumentParser, command: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.Action]]:
    """Every option of a command and its subcommands that takes a number."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options(below, (*command, name))
        elif action.type is float or getattr(action.type, "__module__", "") == "megagpt.options":
            yield command, action


PARSERS = {"megagpt": command_line(), "data_tools": builder_parser()}
OPTIONS = [(program, *found) for program, parser in PARSERS.items() for found in options(parser)]


@pytest.mark.parametrize(
    ("program", "command", "action"), OPTIONS, ids=[f"{c[0]} {a.option_strings[0]}" for _, c, a in OPTIONS]
)
def test_every_edge_of_an_options_number_is_taken_or_one_message(program, command, action, capsys):
    places = {"evaluate": ["x", "--data", "d"], "compare-tokenizers": []}.get(command[-1] if command else "", ["x"])
    for text in EDGES:
        with contextlib.suppress(SystemExit):
            PARSERS[program].parse_args([*command, *places, f"{action.option_strings[0]}={text}"])
        said = capsys.readouterr().err
        assert said == "" or action.option_strings[0] in said
        assert one_message(said.partition("error: ")[2]), text


USED = [  # options whose value is used at once, and the largest and smallest that their parsers take
    *(f"generate RUN --max-tokens 2 --temperature {value}" for value in ("1e-39", "1e-30", "1e6", "nan", "-1", "1e7")),
    *(f"generate RUN --max-tokens 2 --top-p {value}" for value in ("1e-320", "1e-6", "0", "inf")),
    *(f"generate RUN --max-tokens 2 --top-k {value}" for value in ("1000000000000", "9223372036854775807")),
    *(f"generate RUN --max-tokens 2 --seed {value}" for value in ("9223372036854775807", "-9223372036854775807")),
    *(f"generate RUN --max-tokens {value}" for value in ("0", "9223372036854775807")),
    *("generate RUN --max-tokens 2 --batch 1000000", "evaluate RUN --data DATA --tokens 1"),
    *("evaluate RUN --data DATA --tokens 9223372036854775807", "evaluate RUN --data DATA --micro-batch 1000000"),
    *("inspect RUN --step 1000000000000000", "inspect RUN --sample 1000000000000000"),
    *("inspect DATA --documents 9223372036854775807", "--sample-report 1000000000000000 --deepspeed_config FILE"),
    *("plan FILE --ranks 1000000", "plan FILE --tokens 9223372036854775807", "plan FILE --efficiency 0.001"),
    *("plan FILE --ranks 8 --network 1e-300", "plan FILE --ranks 16 --network 1e6", "plan FILE --memory 1e6"),
    *(
        "lint FILE --ranks 1000000",
        "slurm FILE --dry-run --nodes 1000000",
        "slurm FILE --dry-run --time 99999999999:00:00",
    ),
]


MAIN = {"inspect": data_tools.__main__.main, "--sample-report": pretrain}  # all others are commands of megagpt


@pytest.fixture(scope="module")
def trained(dataset, device, tmp_path_factory) -> Path:
    """A run of two steps, the second of which samples as coldly as can be."""
    run = tmp_path_factory.mktemp("values") / "run"
    keys = ["schedule.max_steps=2", "schedule.warmup_steps=0", "every.sample=2", "sample.temperature=1e-30"]
    keys += ["sample.top_p=1e-6", "seed=9223372036854775807", "data.seed=9223372036854775807"]
    given = overrides(dataset, run, *(f"megagpt.{key}" for key in keys))
    assert pretrain(["--deepspeed_config", str(DEBUG_RUN), *given]) == 0
    return run


@pytest.mark.parametrize("command", USED)
def test_a_number_that_is_taken_works_and_another_is_one_message(trained, dataset, capsys, command):
    names = {"RUN": [str(trained)], "DATA": [str(dataset)], "FILE": [str(DEBUG_RUN), *overrides(dataset, trained)]}
    words = [word for part in command.split() for word in names.get(part, [part])]
    main = MAIN.get(words[0], megagpt.__main__.main)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:  # as argparse ends, too
        sys.exit(main(words))
    said = capsys.readouterr()
    assert ended.value.code in (0, 2)
    assert said.err.count("error: ") + said.out.count(": error: ") == (ended.value.code == 2)
    assert one_message(said.err)


TAKE_PATHS = [
    *("generate PATH", "evaluate PATH --data DATA", "evaluate RUN --data PATH", "checkpoints PATH", "lint PATH"),
    *("plan FILE megagpt.data.train.0.path=PATH", "plan PATH", "slurm FILE --sweep PATH", "check-hosts PATH"),
    *(
        "inspect PATH",
        "inspect PATH --step 1",
        "verify PATH",
        "report PATH",
        "report RUN PATH",
        "report RUN --out PATH",
    ),
]


@pytest.mark.parametrize("path", ["x" * 300, "loop", "file/inside", "folder", "file", "nothing"])
@pytest.mark.parametrize("command", TAKE_PATHS)
def test_a_path_that_cannot_be_used_is_one_message(trained, dataset, capsys, tmp_path, command, path):
    """Too long, a link to itself, below a file; a file where a folder is wanted, and the reverse."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    given = [str(DEBUG_RUN), *overrides(dataset, trained)]
    names = {"RUN": [str(trained)], "DATA": [str(dataset)], "FILE": given, "PATH": [str(tmp_path / path)]}
    words = [word for part in command.split() for word in names.get(part, [part.replace("PATH", str(tmp_path / path))])]
    main = data_tools.__main__.main if words[0] in ("inspect", "verify") else megagpt.__main__.main
    capsys.readouterr()
    code = main(words)
    said = capsys.readouterr().err
    if not (words[0] == "plan" and code == 0):  # a plan needs no dataset
        assert code == 2
        assert said.count("error: ") == 1
    assert one_message(said)


@pytest.mark.parametrize(("tokens", "steps"), [(512, 1), (513, 2), (1e6, 1954), (1_000_000, 1954)])
def test_tokens_are_whole_steps_rounded_up_and_stay_when_the_batch_changes(dataset, tmp_path, tokens, steps):
    shape = ["train_batch_size=8", "megagpt.data.seq_len=64", f'megagpt.schedule={{"max_tokens": {tokens}}}']
    run = debug_run(dataset, tmp_path / "run", *shape)
    assert run.megagpt.schedule.max_steps == steps
    assert run.changed("train_batch_size=4").megagpt.schedule.max_steps == -(-int(tokens) // 256)
    assert parse_run(run.as_json()).megagpt.schedule.max_steps == steps


def test_tokens_against_steps_are_refused_by_training_and_by_lint_alike(dataset, tmp_path):
    both = ["train_batch_size=8", "megagpt.data.seq_len=64", "megagpt.schedule.max_tokens=1000"]
    message = r"max_tokens=1000 makes 2 steps of 8 x 64 tokens, and megagpt\.schedule\.max_steps=20; remove one"
    with pytest.raises(UserError, match=message):
        debug_run(dataset, tmp_path / "run", *both)
    found = lint_file(DEBUG_RUN, [*overrides(dataset, tmp_path / "run"), *both])
    assert [issue.level for issue in found] == ["error"]
    assert re.search(message, found[0].text)
    few = ["train_batch_size=8", "megagpt.data.seq_len=64", 'megagpt.schedule={"max_tokens": 511}']
    message = r"max_tokens=511 is less than the 512 tokens of one step, train_batch_size=8 x 64; set .* to 512 or more,"
    with pytest.raises(UserError, match=message):
        debug_run(dataset, tmp_path / "run", *few)
    [found] = lint_file(DEBUG_RUN, [*overrides(dataset, tmp_path / "run"), *few])
    assert found.level == "error"
    assert re.search(message, found.text)
    few[-1] = 'megagpt.schedule={"max_tokens": 511, "max_steps": 1}'  # as in the run.json of an older megagpt
    assert debug_run(dataset, tmp_path / "run", *few).megagpt.schedule.max_steps == 1
    for tokens in ("0", "-5", "1.5", '"many"'):
        with pytest.raises(UserError, match=r"megagpt\.schedule\.max_tokens"):
            debug_run(dataset, tmp_path / "run", f'megagpt.schedule={{"max_tokens": {tokens}}}')
