"""Nothing that is not finite is committed, and a start passes over what an older megagpt committed: on one rank.

guards/test_guards.py has the same on two ranks, with numbers that one of them alone has.
"""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import debug_run, metric

import megagpt
from megagpt.__main__ import main
from megagpt.atomic_files import write_atomically
from megagpt.checkpoint import finite, save
from megagpt.checkpoint.commit import by_loss, committed, read_commit, write_commit
from megagpt.checkpoint.finite import find_not_finite, not_finite
from megagpt.checkpoint.verification import newest_verified
from megagpt.engine.safe_pickle import pickles_of
from megagpt.errors import UserError
from megagpt.train import trainer
from megagpt.train.monitor import validation_curve
from megagpt.train.trainer import train

CONSTANT = ["megagpt.schedule.shape=constant", "megagpt.schedule.warmup_steps=0", "megagpt.data.val_tokens=256"]


@pytest.fixture
def start(dataset, device, tmp_path):
    """Train a run to `steps`; returns the message that it ends with, "" if it finishes."""

    def started(
        steps: int, *more: str, name: str = "run", save: int = 1, log: int = 1, stop_at: int | None = None
    ) -> str:
        every = f'megagpt.every={{"log": {log}, "eval": 0, "save": {save}}}'
        run = debug_run(dataset, tmp_path / name, *CONSTANT, every, f"megagpt.schedule.max_steps={steps}", *more)
        try:
            train(run, device, stop_at=stop_at)
        except UserError as error:
            return str(error)
        return ""

    return started


@pytest.fixture(scope="module")
def sound(dataset, device, tmp_path_factory):
    """Copy the folder of a run without a fault, of 4 or 8 steps at a ZeRO stage, which is trained once."""

    @cache
    def trained(stage: int, steps: int) -> Path:
        out_dir = tmp_path_factory.mktemp("sound") / "run"
        options = [f"zero_optimization.stage={stage}", 'megagpt.every={"log": 1, "eval": 0, "save": 1}']
        train(debug_run(dataset, out_dir, *CONSTANT, *options, f"megagpt.schedule.max_steps={steps}"), device)
        return out_dir

    return lambda to, *, stage, steps: shutil.copytree(trained(stage, steps), to)


@pytest.fixture
def strike(monkeypatch):
    """Make the training loss of some steps of the next start NaN, and with it their gradients."""

    def struck(*steps: int, first: int = 1) -> None:
        step, train_step, next_token_score = first - 1, train_step_, next_token_score_

        def counted(*args):
            nonlocal step
            step += 1
            return train_step(*args)

        def score(*args, **options):
            inner, factor = next_token_score(*args, **options), float("nan") if step in steps else 1.0
            return lambda *given: inner(*given) * factor

        monkeypatch.setattr(trainer, "train_step", counted)
        monkeypatch.setattr(trainer, "next_token_score", score)

    train_step_, next_token_score_ = trainer.train_step, trainer.next_token_score
    return struck


def steps_of(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in committed(run_dir)]


# --- the check ----------------------------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(st.integers(0, 5), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.sampled_from(DTYPES))
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(at, value, dtype):
    state = {"a": [torch.ones(2, 3, dtype=dtype), 1], "b": {"step": torch.tensor(3), "deep": (torch.zeros(0), "x")}}
    assert not_finite(state) is None
    state["a"][0].view(-1)[at] = value
    assert not_finite(state) == "a.0"
    assert not_finite({"b": state["b"], "c": [torch.ones(2), torch.nn.Parameter(state["a"][0])]}) == "c.1"


def test_weights_whose_squares_overflow_are_not_finite_and_the_largest_of_fp16_are():
    assert not_finite({"x": torch.full((4,), 1e25)}) == "x"
    assert not_finite({"x": torch.full((4,), 1e17)}) is None
    assert not_finite({"x": torch.full((1000,), 65504.0, dtype=torch.float16)}) is None
    assert not_finite({"x": torch.tensor([2**62])}) is None


# --- a learning rate that breaks the weights ----------------------------------------------------------------------


# a stage at a time: once stage 3 was used in a process, DeepSpeed's own F.linear rounds otherwise there
@pytest.mark.parametrize(
    ("stage", "lr", "save"),
    [
        *((0, 1e30, 1), (0, 1e6, 3)),
        *((1, 1e30, 1), (1, 1e30, 2), (1, 1e6, 1), (1, 1e6, 3)),
        *((3, 1e30, 2), (3, 1e6, 1)),
    ],
    scope="module",
)
def test_a_run_with_a_wrong_rate_resumes_by_its_own_message_as_if_it_had_never_been(
    start, sound, tmp_path, stage, lr, save
):
    """Step 5 breaks the weights: 1e30 is seen in them, 1e6 only in the steps that follow."""
    at_stage = f"zero_optimization.stage={stage}"
    sound(tmp_path / "run", stage=stage, steps=4)
    message = start(12, at_stage, f"optimizer.params.lr={lr}", save=save)
    assert f"give the same command: it resumes from {tmp_path / 'run/checkpoints/step_00000004'}" in message
    assert steps_of(tmp_path / "run")[-1] == 4
    assert start(8, at_stage) == ""
    sound(tmp_path / "straight", stage=stage, steps=8)
    assert metric(tmp_path / "run", "train/loss") == metric(tmp_path / "straight", "train/loss")


@pytest.mark.parametrize("lr", [1e30, 1e6])
def test_the_asynchronous_writer_commits_nothing_that_is_not_finite(start, sound, tmp_path, lr):
    sound(tmp_path / "run", stage=1, steps=4)
    message = start(12, f"optimizer.params.lr={lr}", "megagpt.save_async=true")
    assert "it resumes from" in message
    assert steps_of(tmp_path / "run")[-1] == 4
    assert start(8) == ""


def test_a_last_step_whose_evaluation_is_not_finite_is_not_saved(start, tmp_path):
    """Its own update breaks the weights, so its training loss is finite; a step is at hand to resume from."""
    message = start(1, "optimizer.params.lr=1e6", save=10)
    assert message.startswith("step 1, the last, was not finite, so it was not saved. Lower optimizer.params.lr")
    assert message.endswith("and give the same command: it starts at step 0, because nothing is saved yet")
    assert start(3, save=10) == ""
    message = start(4, "optimizer.params.lr=1e6", save=10)
    assert message.endswith(f"it resumes from {tmp_path / 'run/checkpoints/step_00000003'}")
    assert start(4, save=10) == ""
    assert steps_of(tmp_path / "run") == [3, 4]


def test_a_step_that_an_earlier_start_saved_stays_and_the_message_tells_how_to_pass_over_it(start, sound, tmp_path):
    """At a rate of 100 the loss stays finite and the gradient's norm does not: step 5 is saved as the last one."""
    steps = tmp_path / "run/checkpoints"
    sound(tmp_path / "run", stage=1, steps=4)
    assert start(5, "optimizer.params.lr=100") == ""
    message = start(12)
    assert f"it resumes from {steps / 'step_00000005'}. No step after that checkpoint was finite" in message
    assert f"if the next start fails alike, delete that folder to resume from {steps / 'step_00000004'}" in message
    assert steps_of(tmp_path / "run")[-2:] == [4, 5]
    shutil.rmtree(steps / "step_00000005")
    assert start(12) == ""


def test_when_the_only_step_is_retracted_the_message_asks_for_a_fresh_start(start, tmp_path):
    message = start(12, "optimizer.params.lr=1e6")  # step 1 is saved, and no later one is finite
    assert "give the same command with --fresh: no finite step is saved" in message
    assert steps_of(tmp_path / "run") == []
    with pytest.raises(UserError, match=r"was committed and is missing.*give --fresh"):
        newest_verified(tmp_path / "run")


def test_a_bad_step_that_is_due_to_be_saved_is_followed_by_a_save(start, strike, tmp_path):
    """Step 4 alone is not finite: its update was skipped, the weights are whole, and step 5 shows that."""
    strike(4)
    assert start(7, save=4, log=4) == ""
    assert steps_of(tmp_path / "run") == [5, 7]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_bad_step_at_a_stop_or_at_the_end_is_saved_if_its_weights_evaluate(start, strike, tmp_path, stage, capsys):
    """Its update was left out, so the weights are those of the step before; the next start has all of the run."""
    options = {"save": 100, "log": 4}
    strike(6, 9)
    assert start(9, f"zero_optimization.stage={stage}", **options, stop_at=6) == ""
    assert "and saved; the same command resumes" in capsys.readouterr().out
    assert steps_of(tmp_path / "run") == [6]
    strike(9, first=7)
    assert start(9, f"zero_optimization.stage={stage}", **options) == ""
    assert steps_of(tmp_path / "run") == [6, 9]
    strike(6, 9)
    assert start(9, f"zero_optimization.stage={stage}", **options, name="straight") == ""
    assert metric(tmp_path / "run", "val/loss") == metric(tmp_path / "straight", "val/loss")


def test_a_stop_whose_weights_are_of_no_use_is_an_error_and_not_saved(start, tmp_path):
    message = start(9, "optimizer.params.lr=1e6", save=10, log=4, stop_at=2)
    assert message.startswith("step 2, the last, was not finite, so it was not saved. Lower optimizer.params.lr")
    assert steps_of(tmp_path / "run") == []


def test_the_best_step_is_restored_even_if_its_training_loss_was_not_finite(start, strike, tmp_path, capsys):
    """No evaluation but the first counts as better (min_delta); step 2 is due to be saved for that alone."""
    stopping = 'megagpt.early_stopping={"patience": 2, "min_delta": 100, "restore_best": true}'
    strike(2)
    assert start(9, 'megagpt.every={"log": 1, "eval": 2, "save": 3}', stopping) == ""
    assert "stopped early at step 6: " in capsys.readouterr().out
    assert steps_of(tmp_path / "run") == [2, 3, 6]


# --- what an older megagpt left -----------------------------------------------------------------------------------


@pytest.fixture
def poisoned(start, tmp_path, monkeypatch) -> Path:
    """A run of which an older megagpt committed step 4 with a moment that is not finite."""

    def poison(step_dir, files):
        if step_dir.name == "step_00000004":
            state = next(state for path, state in files.items() if "optim" in path.name)
            state["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg_sq"][7] = float("inf")

    monkeypatch.setattr(save, "refuse_not_finite", poison)
    monkeypatch.setattr(save, "write_commit", lambda *args, **_: write_commit(*args))  # it did not tell either
    assert start(4) == ""
    monkeypatch.undo()
    return tmp_path / "run"


def test_a_start_passes_over_a_saved_step_that_is_not_finite(start, poisoned, tmp_path, capsys):
    assert find_not_finite(committed(poisoned)[-1]).endswith("base_optimizer_state.state.0.exp_avg_sq")
    assert start(6) == ""
    assert f"checkpoint skipped: {poisoned / 'checkpoints/step_00000004'}" in capsys.readouterr().out
    assert (poisoned / "checkpoints/damaged1_step_00000004").is_dir()
    assert start(6, name="straight") == ""
    assert metric(poisoned, "train/loss") == metric(tmp_path / "straight", "train/loss")


def test_a_start_reads_what_was_checked_when_it_was_saved_once_to_hash_it(start, tmp_path, monkeypatch):
    """That takes twice as long for the step of an older megagpt, whose commit tells of no check."""
    assert start(2) == ""
    step_dir = committed(tmp_path / "run")[-1]
    read = []
    monkeypatch.setattr(finite, "load_checked", lambda path, **_: read.append(path) or {})
    assert find_not_finite(step_dir) is None
    assert read == []
    record = json.loads((step_dir / "COMMIT").read_bytes())
    saved = read_commit(step_dir)
    write_commit(step_dir, saved.state, saved.mixture, saved.identity, record["manifests"])
    assert find_not_finite(step_dir) is None
    assert read == pickles_of(step_dir)
    del record["finite"], record["sha256"]
    write_atomically(step_dir / "COMMIT", json.dumps(record).encode())
    assert not read_commit(step_dir).finite


def test_verifying_names_a_step_that_is_not_finite(poisoned, capsys):
    assert main(["checkpoints", str(poisoned), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "optim_states.pt is not finite: " in printed
    assert "2 committed steps, 1 verified" in printed


def test_a_step_saved_among_steps_that_were_not_finite_is_used_only_if_there_is_no_other(
    start, sound, tmp_path, capsys
):
    """As an older megagpt did: the weights may be what broke those steps, or not."""
    sound(tmp_path / "run", stage=1, steps=4)
    step_dir = committed(tmp_path / "run")[-1]
    mark_as_bad(step_dir)
    assert start(5) == ""
    printed = capsys.readouterr().out
    assert f"checkpoint skipped: the last training step of {step_dir} was not finite" in printed
    for path in committed(tmp_path / "run"):
        mark_as_bad(path)
    assert start(6) == ""
    assert f"no other step is undamaged: using {committed(tmp_path / 'run')[-2]}" in capsys.readouterr().out


def mark_as_bad(step_dir: Path) -> None:
    saved, record = read_commit(step_dir), json.loads((step_dir / "COMMIT").read_bytes())
    state = replace(saved.state, health=replace(saved.state.health, bad_in_a_row=2))
    write_commit(step_dir, state, saved.mixture, saved.identity, record["manifests"])


def test_a_model_that_is_not_finite_generates_and_evaluates_nothing(start, tmp_path, dataset, monkeypatch, capsys):
    """What is wrong with its weights stands in the step: it is stage 0, whose model is whole in one file."""
    poison = lambda step_dir, files: weights_in(files).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(save, "refuse_not_finite", poison)
    assert start(1, "zero_optimization.stage=0") == ""
    for command in (["generate", "--prompt", "a"], ["evaluate", "--data", str(dataset)]):
        assert main([command[0], str(tmp_path / "run"), *command[1:]]) == 2
        assert "is not finite (wte.weight), so its model is of no use; name another step" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"is not finite \(wte\.weight\), so its model is of no use"):
        megagpt.load(tmp_path / "run")


def weights_in(files):
    return next(state for path, state in files.items() if "model_states" in path.name)["module"]["wte.weight"]


# --- what is printed and logged -----------------------------------------------------------------------------------


def test_a_run_that_breaks_writes_json_draws_its_curve_and_samples_nothing(start, tmp_path, capsys):
    often = 'megagpt.every={"log": 1, "eval": 1, "save": 0, "sample": 1}'
    message = start(8, "optimizer.params.lr=1e30", often, "megagpt.sample.max_tokens=2")
    assert "3 steps in a row were not finite" in message
    assert "no samples at step 1: the model's output is not finite" in capsys.readouterr().out
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row, parse_constant=pytest.fail).get("val/loss", 0) for row in rows]
    assert None in losses
    assert validation_curve(tmp_path / "run/metrics.jsonl").splitlines()[1].endswith("1 not finite")


def test_the_curve_leaves_out_what_an_older_megagpt_logged_as_nan(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {n}, "val/loss": {x}}}\n' for n, x in enumerate(["4.0", "NaN", "2.0", "3.0"])))
    assert [line.split()[1:] for line in validation_curve(file, width=3).splitlines()[1:]] == [
        ["4.0000", "███"],
        ["not", "finite"],
        ["2.0000", "█"],
        ["3.0000", "██"],
    ]


def test_a_loss_that_is_not_finite_is_never_the_lowest(start, tmp_path):
    assert start(3, "megagpt.keep.last=3") == ""
    losses = dict(zip(committed(tmp_path / "run"), [float("nan"), 3.0, 2.0], strict=True))
    for path, loss in losses.items():
        saved, record = read_commit(path), json.loads((path / "COMMIT").read_bytes())
        state = replace(saved.state, val_loss=loss)
        write_commit(path, state, saved.mixture, saved.identity, record["manifests"])
    assert by_loss(list(losses)) == list(losses)[:0:-1]
