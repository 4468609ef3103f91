"""Restarts that get nowhere end; those that come further, ever so slowly, go on."""

import json

import pytest
from support import DEBUG_RUN, debug_run, overrides, read_json

from megagpt.cli.pretrain import pretrain
from megagpt.errors import UserError
from megagpt.guards.restarts import last_logged, recorded_start
from megagpt.train import trainer


@pytest.fixture
def start(dataset, tmp_path):
    """Count a start from a saved step of a run whose attempt before this one logged a step."""

    def start(saved_step: int, logged: int, *overrides: str):
        run = debug_run(dataset, tmp_path / "run", *overrides)
        if logged:
            run.megagpt.out_dir.mkdir(exist_ok=True)
            (run.megagpt.out_dir / "metrics.jsonl").write_text(json.dumps({"step": logged}) + '\n{"step": 9')
        with recorded_start(run, saved_step):
            pass

    return start


def test_the_third_restart_without_a_step_forward_is_refused(start):
    for _ in range(3):
        start(40, 0)
    for _ in range(2):  # and every later one
        with pytest.raises(UserError, match=r"the last \d starts .* did not get past step 40; .*remove .*starts\.json"):
            start(40, 0)


@pytest.mark.parametrize(
    "starts",
    [
        [(0, 0), (0, 5), (0, 3), (0, 4), (0, 6), (0, 2), (0, 1), (0, 7)],  # never a save, but now and then further
        [(0, 0), (10, 12), (10, 11), (10, 11), (20, 21), (20, 21), (20, 21), (30, 30)],
    ],
)
def test_a_run_that_comes_further_now_and_then_goes_on(start, starts):
    for saved_step, logged in starts:
        start(saved_step, logged)


def test_a_changed_run_file_is_counted_from_zero(start):
    for micro_batch in (4, 4, 4, 2, 2, 2, 1):  # as someone does whose memory is full
        start(0, 0, f"train_micro_batch_size_per_gpu={micro_batch}")


def test_a_damaged_record_counts_as_none(start, tmp_path):
    for _ in range(3):
        start(0, 0)
    (tmp_path / "run" / "starts.json").write_text('{"run": ')
    start(0, 0)


def test_the_last_row_written_whole_counts(tmp_path):
    assert last_logged(tmp_path / "metrics.jsonl") == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 7}\n{"step": 1')
    assert last_logged(tmp_path / "metrics.jsonl") == 7


def test_a_crash_loop_ends_with_2(dataset, device, tmp_path, monkeypatch, capsys):
    """Each start dies at the fourth step; logged every second, saved never."""

    def crashing(session, batches, *, taken=[]):  # noqa: B006
        taken.append(None)
        if len(taken) % 4 == 0:
            raise RuntimeError("a bad batch")
        return step(session, batches)

    step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", crashing)
    run = debug_run(dataset, tmp_path / "run").megagpt
    command = [
        "--deepspeed_config=ds_configs/debug_cpu.json",
        f"megagpt.out_dir={run.out_dir}",
        f"megagpt.data.train.0.path={dataset}",
        f"megagpt.data.val={dataset}",
        "megagpt.every.log=2",
    ]
    for _ in range(4):  # the first came further than nothing, so three in a row are the second to the fourth
        with pytest.raises(RuntimeError):
            pretrain(command)
    assert pretrain(command) == 2
    assert "the last 3 starts" in capsys.readouterr().err


@pytest.fixture
def pretrain_fresh(dataset, device, tmp_path, capsys):
    def pretrain_fresh(steps: int) -> str:
        options = ["--fresh", f"megagpt.schedule.max_steps={steps}", "megagpt.schedule.warmup_steps=0"]
        assert pretrain(["--deepspeed_config", str(DEBUG_RUN), *options, *overrides(dataset, tmp_path / "run")]) == 0
        return capsys.readouterr().out

    return pretrain_fresh


def test_a_requeued_job_that_was_told_to_start_fresh_does_so_once(pretrain_fresh, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    pretrain_fresh(2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert "starting at step 0" in pretrain_fresh(3)  # the job's first start had not come that far
    assert "resuming from" in pretrain_fresh(4)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert "starting at step 0" in pretrain_fresh(3)
    monkeypatch.delenv("SLURM_RESTART_COUNT")  # by hand, in a job that somebody holds
    assert "starting at step 0" in pretrain_fresh(4)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # left over
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "starting at step 0" in pretrain_fresh(3)
    assert "starting at step 0" in pretrain_fresh(4)  # no job began it, which is not the same as this one


def test_a_launch_of_torchrun_that_was_told_to_start_fresh_does_so_once(pretrain_fresh, tmp_path, monkeypatch):
    def attempt(launch: str, n: int) -> None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")  # also of a host that follows another one's restart
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", f"/tmp/torchelastic_x/none_{launch}/attempt_{n}/0/error.json")

    attempt("a", 0)
    assert "starting at step 0" in pretrain_fresh(2)
    attempt("a", 1)
    assert "resuming from" in pretrain_fresh(3)
    attempt("b", 0)
    assert "starting at step 0" in pretrain_fresh(2)
    record = read_json(tmp_path / "run" / "starts.json")
    del record["agents"]  # an older version
    (tmp_path / "run" / "starts.json").write_text(json.dumps(record))
    assert "starting at step 0" in pretrain_fresh(3)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # by hand
    assert "starting at step 0" in pretrain_fresh(2)
    assert "starting at step 0" in pretrain_fresh(3)
