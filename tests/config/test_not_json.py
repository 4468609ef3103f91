"""Files that are given as a run file and are none: each command ends with one message that tells how to write it."""

import json

import pytest
from support import DEBUG_RUN, GOOD, ROOT

from megagpt.__main__ import main
from megagpt.cli.pretrain import pretrain
from megagpt.config.run_file import load_run_config
from megagpt.errors import UserError

TEXT = json.dumps(GOOD)
TRAINER = {"output_dir": "out", "per_device_train_batch_size": 8, "learning_rate": 5e-5, "deepspeed": "ds.json"}
OF_DEEPSPEED = {"train_batch_size": 16, "optimizer": {"type": "Adam", "params": {"lr": "auto"}}, "fp16": {}}
FILES = {  # name -> (contents, how the message ends)
    "a.yaml": ("train_batch_size: 8\n", "it is YAML, and must be JSON, which may have comments (//)"),
    "b.json": ("train_batch_size: 8\n", "JSON begins with {, and names stand in quotation marks"),
    "c.py": ("batch_size = 12\n", "it is Python, and must be JSON, which may have comments (//)"),
    "d.json": (str({**GOOD, "bf16": {"enabled": True}}), "write true instead of True, as in JSON"),
    "e.json": (f"# mine\n{TEXT}", "write comments with // instead of #"),
    "f.json": (TEXT.replace('"max_steps": 5', '"max_steps": 1_000'), "write numbers without _"),
    "g.json": (TEXT[:-2], "}} may be missing at the end"),
    "n.json": (TEXT.replace("8, ", "8 // sequences, \n", 1), "a comma may be missing at the end of line 1"),
    "o.json": (
        json.dumps({"build_id": "a", "splits": {}, "tokenizer": {}, "pipeline": {}}),
        "it is a dataset's manifest; `megagpt init DATA` writes a run file for it",
    ),
    "h.json": (TEXT.replace('"train_batch_size"', "\u201ctrain_batch_size\u201d"), 'write straight quotation marks, "'),
    "i.json": ("", "not JSON: the file is empty"),
    "j.json": (TEXT.encode("utf-16"), "it is not UTF-8 text; save it as that"),
    "k.json": (f"[{TEXT}]", "holds a JSON list; it must be an object {...}"),
    "l.json": ('{"train_batch_size": 8, "train_batch_size": 16}', "gives 'train_batch_size' twice; keep one"),
    "m.json": (
        json.dumps(OF_DEEPSPEED),
        "`megagpt init DATA` writes a run file, and ds_configs/README.md lists its keys",
    ),
}
COMMANDS = {
    "lint": lambda file: main(["lint", file]),
    "plan": lambda file: main(["plan", file]),
    "slurm": lambda file: main(["slurm", file, "--dry-run"]),
    "verify-resume": lambda file: main(["verify-resume", file]),
    "doctor": lambda file: main(["doctor", file]),
    "train": lambda file: pretrain(["--deepspeed_config", file]),
}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the batch script is
    for name, (contents, _) in FILES.items():
        (tmp_path / name).write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return tmp_path


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_run_file_is_told_with_how_to_write_it(files, name):
    with pytest.raises(UserError) as caught:
        load_run_config(files / name)
    assert str(caught.value).endswith(FILES[name][1])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "doctor"])
def test_every_command_says_so_in_one_message(files, capsys, device, command):
    for name in FILES:
        assert COMMANDS[command](str(files / name)) == 2
        said = "".join(capsys.readouterr())
        assert FILES[name][1] in said
        assert "Traceback" not in said


def test_what_json5_and_windows_add_is_read(tmp_path):
    expected = load_run_config(DEBUG_RUN)
    text = DEBUG_RUN.read_text()
    python = str(json.loads(text)).replace("True", "true").replace("False", "false")
    for changed in (f"// mine\n{text.rstrip()[:-1]},\n}}", f"\ufeff{text}", text.replace("\n", "\r\n"), python):
        (tmp_path / "run.json").write_text(changed)
        assert load_run_config(tmp_path / "run.json") == expected


def test_a_folder_is_answered_by_the_file_in_it(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(TEXT)
    with pytest.raises(UserError, match=f"cannot be read: it is a run's folder; give {run}/run.json"):
        load_run_config(run)
    (tmp_path / "mine.jsonc").write_text(TEXT)
    with pytest.raises(UserError, match=f"it is a folder; give a file in it, such as {tmp_path}/mine.jsonc"):
        load_run_config(tmp_path)
    with pytest.raises(UserError, match=rf"run file {tmp_path}/mien.json does not exist; did you mean {tmp_path}/mine"):
        load_run_config(tmp_path / "mien.json")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=f"it is a dataset; `megagpt init {tmp_path}` writes a run file for it"):
        load_run_config(tmp_path)
    with pytest.raises(UserError, match="does not exist; examples are in ds_configs/"):
        load_run_config(tmp_path / "other.json")


def test_a_run_file_of_hugging_faces_trainer_is_answered_key_by_key(tmp_path, capsys):
    (tmp_path / "args.json").write_text(json.dumps(TRAINER))
    assert main(["lint", str(tmp_path / "args.json")]) == 2
    said = capsys.readouterr().out.splitlines()
    for key in ("megagpt.out_dir", "train_micro_batch_size_per_gpu", "optimizer.params.lr"):
        assert [line for line in said if key in line and "is missing" not in line] != []
        assert f"error: {key} is missing" not in "".join(said)
    assert any("'deepspeed': DeepSpeed's keys stand in the run file itself" in line for line in said)
