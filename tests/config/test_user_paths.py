"""`~` and `$SCRATCH` in paths: expanded wherever a user writes one, or refused before anything is made."""

import pytest
from support import DEBUG_RUN, GOOD, overrides, read_json

from data_tools.__main__ import main as data_tools
from data_tools.config import BuildConfig, load_config
from megagpt.__main__ import main
from megagpt.cli.arguments import command_line
from megagpt.cli.pretrain import pretrain
from megagpt.config.deepspeed_keys import DEEPSPEED_PATHS
from megagpt.config.run_file import parse_run
from megagpt.errors import UserError
from megagpt.user_paths import expanded


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """HOME, SCRATCH and ODD are set, and NOWHERE is not; the current folder is empty."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("ODD", "a $SCRATCH b")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~", "/home/me"),
        ("~/runs/x", "/home/me/runs/x"),
        ("$SCRATCH/x", "/scratch/me/x"),
        ("${SCRATCH}x/*.txt", "/scratch/mex/*.txt"),
        ("a/$SCRATCH", "a//scratch/me"),
        ("$ODD", "a $SCRATCH b"),  # once
        ("a~b/c~", "a~b/c~"),
        ("price in $.txt", "price in $.txt"),
        ("$5", "$5"),
        ("${A-B}", "${A-B}"),
        ("s3://bucket/$NOWHERE/~", "s3://bucket/$NOWHERE/~"),
        ("", ""),
        ("a\0b", "a\0b"),
    ],
)
def test_a_path_is_expanded_as_a_shell_would(text, path):
    assert expanded(text) == path


def test_a_path_that_exists_as_it_is_written_is_that_path(tmp_path):
    for name in ("~", "$NOWHERE"):
        (tmp_path / name).mkdir()
        assert expanded(name) == name
    assert expanded("~/x") == "/home/me/x"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("$NOWHERE/x", r"path '\$NOWHERE/x': the variable NOWHERE is not set; export NOWHERE, or write"),
        ("a/${NOWHERE}", "the variable NOWHERE is not set"),
        ("~nobody-of-this-name/x", "the home folder of ~nobody-of-this-name is not known"),
    ],
)
def test_what_is_not_set_is_one_message(text, complaint):
    with pytest.raises(UserError, match=complaint):
        expanded(text)


def test_all_paths_of_a_run_file_are_expanded():
    run = parse_run(GOOD, ["megagpt.out_dir=$SCRATCH/run", "megagpt.data.train.0.path=~/d", "megagpt.data.val=~/d"])
    cfg = run.megagpt
    assert [str(path) for path in (cfg.out_dir, cfg.data.train[0].path, cfg.data.val[""].path)] == [
        "/scratch/me/run",
        "/home/me/d",
        "/home/me/d",
    ]
    assert run.as_json()["megagpt"]["out_dir"] == "/scratch/me/run"
    for key in DEEPSPEED_PATHS:
        more = [f"{key}=$SCRATCH/x", *(["zero_optimization.stage=3"] if "offload_param" in key else [])]
        written = parse_run(GOOD, more).deepspeed_raw
        for part in key.split("."):
            written = written[part]
        assert written == "/scratch/me/x"
        with pytest.raises(UserError, match=f"{key}: path .* NOWHERE is not set"):
            parse_run(GOOD, [f"{key}=$NOWHERE"])
        with pytest.raises(UserError, match=f"{key}: path 's3://b/logs' is a URL"):
            parse_run(GOOD, [f"{key}=s3://b/logs"])


def test_all_paths_of_a_build_are_expanded(tmp_path):
    (tmp_path / "build.json").write_text('{"sources": {"a": ["~/a", "$SCRATCH/b"]}}')
    more = ["tokenizer=~/t.model", "decontamination.files=$SCRATCH/tests.txt", "rules.language.model=~/lid.bin"]
    config = load_config(BuildConfig, tmp_path / "build.json", more)
    assert config.sources[0].paths == ("/home/me/a", "/scratch/me/b")
    assert str(config.tokenizer) == "/home/me/t.model"
    assert config.decontamination.files == ("/scratch/me/tests.txt",)
    assert config.rules.language is not None
    assert str(config.rules.language.model) == "/home/me/lid.bin"
    with pytest.raises(UserError, match=r"decontamination\.files: path '\$NOWHERE': the variable NOWHERE is not set"):
        load_config(BuildConfig, None, ["decontamination.files=$NOWHERE"])


def test_paths_on_the_command_line_are_expanded():
    args = command_line().parse_args(["evaluate", "~/run", "--data", "$SCRATCH/d"])
    assert (str(args.checkpoint), str(*args.data)) == ("/home/me/run", "/scratch/me/d")


@pytest.mark.parametrize(
    "command",
    [
        lambda: pretrain(["--deepspeed_config", str(DEBUG_RUN), *overrides("$NOWHERE", "run")]),
        lambda: pretrain(["--deepspeed_config", str(DEBUG_RUN), "megagpt.out_dir=~nobody-of-this-name/run"]),
        lambda: pretrain(["--deepspeed_config", "$NOWHERE/run.json"]),
        lambda: main(["lint", str(DEBUG_RUN), "megagpt.out_dir=$NOWHERE/run"]),
        lambda: main(["checkpoints", "$NOWHERE/run"]),
        lambda: data_tools(["build", "--input", "$NOWHERE", "--out", "data"]),
        lambda: data_tools(["build", "--input", "x", "--out", "$NOWHERE/data"]),
        lambda: data_tools(["build", "--input", "x", "--out", "data", "tokenizer=$NOWHERE/t.model"]),
        lambda: data_tools(["inspect", "$NOWHERE"]),
    ],
)
def test_a_variable_that_is_not_set_ends_each_command_with_code_2_and_nothing_made(command, tmp_path, capsys):
    try:
        code = command()
    except SystemExit as ended:  # argparse's
        code = ended.code
    said = "".join(capsys.readouterr())
    assert code == 2
    assert "NOWHERE is not set" in said or "~nobody-of-this-name is not known" in said
    assert list(tmp_path.iterdir()) == []


def test_a_run_trains_where_its_variable_says(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path / "disk"))
    short = ['megagpt.schedule={"max_steps": 1}', 'megagpt.every={"save": 0, "eval": 0}', "megagpt.data.val_tokens=256"]
    assert pretrain(["--deepspeed_config", str(DEBUG_RUN), *overrides(dataset, "$SCRATCH/run", *short)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]
    assert read_json(tmp_path / "disk/run/run.json")["megagpt"]["out_dir"] == str(tmp_path / "disk/run")


@pytest.mark.parametrize("url", ["s3://bucket/x", "file:///scratch/x"])
def test_a_url_where_only_a_path_can_be_is_refused_and_makes_no_folder(url, tmp_path, capsys):
    """Path("s3://bucket/x") is a folder named `s3:` here."""
    (tmp_path / "a.txt").write_text("some text")
    for command in (["build", "--input", "a.txt", "--out", url], ["verify", url], ["build", f"tokenizer={url}"]):
        more = [] if "--out" in command or command[0] == "verify" else ["--input", "a.txt", "--out", "out"]
        try:
            code = data_tools([*command, *more])
        except SystemExit as end:  # of argparse
            code = end.code
        assert code == 2
        assert f"path {url!r} is a URL, and only the inputs of data_tools may be one" in capsys.readouterr().err
    for key in ("out_dir", "data.val", "data.train.0.path"):
        assert main(["lint", str(DEBUG_RUN), f"megagpt.{key}={url}"]) == 2
        assert f"path {url!r} is a URL" in "".join(capsys.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
