"""`megagpt lint` and `megagpt slurm` look at the machine too: is the data here, and do its GPUs divide the batch?"""

import json

import numpy as np
import pytest
from data_support import document, small_tokenizer, write_dataset
from lint.test_linter import SOUND
from support import DEBUG_RUN, ROOT, overrides

from megagpt.__main__ import main
from megagpt.cli import lint
from megagpt.cli.pretrain import pretrain


@pytest.fixture
def sound(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(SOUND))
    return str(path)


def issues(capsys, *words) -> list[str]:
    """The lines of lint, without the path; notes are of other tests."""
    code = main(["lint", *words])
    lines = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    assert code == (2 if any(line.startswith("error") for line in lines) else 0)
    return [line for line in lines if not line.startswith(("note", "no findings"))]


def test_data_that_training_would_refuse_is_a_warning_with_trainings_words(sound, dataset, tmp_path, capsys, device):
    tokenizer = small_tokenizer()
    write_dataset(
        tmp_path / "no_val", [np.append(tokenizer.encode(document(0)), tokenizer.eod_id)], tokenizer=tokenizer
    )
    wrong = {
        dataset.parent / "corpsu": f"there is no dataset folder {dataset.parent}/corpsu; did you mean {dataset}?",
        dataset.parent: "is not a dataset",
        tmp_path / "no_val": "has no documents in its 'val' split",
    }
    for path, text in wrong.items():
        keys = overrides(path, tmp_path / "run")
        [found] = issues(capsys, sound, *keys, "megagpt.sample.max_tokens=128")
        assert found.startswith("warning: training here would be refused: ")
        assert text in found
        pretrain(["--deepspeed_config", sound, *keys])
        assert found.removeprefix("warning: training here would be refused: ") in capsys.readouterr().err
    assert issues(capsys, sound, *overrides(dataset, tmp_path / "run"), "megagpt.sample.max_tokens=128") == []


def test_data_of_two_tokenizers_is_an_error(sound, dataset, tmp_path, capsys):
    """On any machine: no data has to be fetched to make it right."""
    tokenizer = small_tokenizer()
    write_dataset(tmp_path / "other", [np.append(tokenizer.encode(document(0)), tokenizer.eod_id)], tokenizer=tokenizer)
    keys = [*overrides(dataset, tmp_path / "run"), "megagpt.sample.max_tokens=128"]
    [found] = issues(capsys, sound, *keys, f"megagpt.data.val={tmp_path / 'other'}", "--effective")
    assert found.startswith("error: training here would be refused: ")
    assert "was tokenized with another model than" in found


def test_weights_that_a_start_would_refuse_are_a_warning(sound, dataset, device, tmp_path, capsys):
    """As the data; not where a run resumes, which needs them no more."""
    keys = [*overrides(dataset, tmp_path / "run"), "megagpt.sample.max_tokens=128"]
    short = ["megagpt.schedule.max_steps=1", "megagpt.schedule.warmup_steps=0", "megagpt.every.eval=0"]
    assert pretrain(["--deepspeed_config", sound, *keys, *short]) == 0, capsys.readouterr().err
    keys[2] = f"megagpt.out_dir={tmp_path / 'new'}"
    capsys.readouterr()
    narrow = f"megagpt.init_from={tmp_path / 'run'}"
    wrong = {("megagpt.init_from=/nope",): "/nope does not exist", (narrow, "megagpt.model.n_embd=64"): "has n_embd=32"}
    for more, text in wrong.items():
        [found] = issues(capsys, sound, *keys, *more)
        assert found.startswith("warning: training here would be refused: ")
        assert text in found
    assert issues(capsys, sound, *keys, narrow) == []
    assert issues(capsys, sound, *keys, "megagpt.init_from=/nope", f"megagpt.out_dir={tmp_path / 'run'}") == []


def test_a_batch_that_this_machines_gpus_do_not_divide_is_a_warning(sound, dataset, tmp_path, capsys, monkeypatch):
    keys = [*overrides(dataset, tmp_path), "megagpt.sample.max_tokens=128"]
    monkeypatch.setattr(lint.torch.cuda, "device_count", lambda: 3)
    [found] = issues(capsys, sound, *keys)
    assert found.startswith("warning: this machine has 3 GPUs: train_batch_size=8 is not a multiple of")
    assert found.endswith("; set train_batch_size to 12, or train with --nproc 2")
    assert issues(capsys, sound, *keys, "--ranks", "2") == []


def test_accumulation_for_several_ranks_is_no_error_of_the_file(sound, dataset, tmp_path, capsys):
    keys = [*overrides(dataset, tmp_path), "megagpt.sample.max_tokens=128", "gradient_accumulation_steps=1"]
    [found] = issues(capsys, sound, *keys)
    assert found.startswith("warning: this machine has no GPU, so one rank: train_batch_size=8 is not ")
    assert issues(capsys, sound, *keys, "--ranks", "2") == []


def test_a_job_whose_data_is_not_here_is_warned_of_before_it_waits_in_the_queue(sound, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["slurm", sound, "--dry-run", "--gpus-per-node", "2", "aio.queue_depth=8"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("#!")
    assert said.err.splitlines()[0].startswith("warning: aio.queue_depth=8 has no effect")
    assert said.err.splitlines()[1].startswith("warning: training here would be refused: there is no dataset folder d;")


def test_the_schedule_is_drawn_before_anything_trains_also_where_blocks_cannot_be_printed(capfd, monkeypatch):
    options = ["optimizer.type=Muon", "optimizer.params.muon_lr=0.02"]
    options += ['megagpt.schedule={"max_tokens": 1e6, "shape": "linear", "min_lr_ratio": 0, "warmup_steps": 10}']
    assert main(["lint", str(DEBUG_RUN), "--schedule", *options]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, [line for line in lines if "lr" in line])) <= 80
    assert any(line.startswith("  muon_lr ") and line.endswith("▁") for line in lines)
    assert lines[-1].split()[-1] == "0"  # the last step's rate
    monkeypatch.setattr("megagpt.cli.draw_schedule.if_encodable", lambda letter, otherwise: otherwise)
    assert main(["lint", str(DEBUG_RUN), "--schedule"]) == 0
    assert capfd.readouterr().out.isascii()
