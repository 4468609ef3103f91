"""`megagpt verify-resume` on two real ranks: a correct resume is exact, and one that loses RNG state is found out."""

import pytest
import torch
from support import DEBUG_RUN, overrides

from megagpt.__main__ import main
from megagpt.cli.verify_resume import same

ROUGH = [
    "zero_optimization.stage=3",
    "megagpt.regularization.dropout=0.1",
    "megagpt.regularization.stochastic_depth=0.5",
    "train_micro_batch_size_per_gpu=2",
    "megagpt.data.val_tokens=256",
]


@pytest.mark.process
def test_a_run_on_two_ranks_resumes_bit_for_bit(dataset, tmp_path, capsys):
    trackers = [f"tensorboard.output_path={tmp_path / 'unused'}", "csv_monitor.enabled=true", "wandb.enabled=true"]
    trackers += [f"csv_monitor.output_path={tmp_path / 'unused'}", "megagpt.mlflow.enabled=true"]
    options = overrides(dataset, tmp_path / "unused", *ROUGH, *trackers)
    assert main(["verify-resume", str(DEBUG_RUN), "--ranks", "2", *options]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == ("4 steps straight and cut after 2, on 2 rank(s): the same to the last bit\n")
    assert not (tmp_path / "unused").exists()


@pytest.mark.process
@pytest.mark.long
def test_other_ranks_and_another_stage_see_the_same_samples_and_rates(dataset, tmp_path, capsys):
    options = overrides(dataset, tmp_path / "unused", *ROUGH)
    then = ["--then-ranks", "1", "--then", "zero_optimization.stage=1"]
    command = ["verify-resume", str(DEBUG_RUN), "--ranks", "2", *then]
    assert main([*command, *options]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out == (
        "4 steps straight and cut after 2, on 2 rank(s), then 1 rank(s), then zero_optimization.stage=1: "
        "the same samples, rates and steps, and losses within 0.0001 nats\n"
    )


@pytest.mark.process
@pytest.mark.long
def test_another_learning_rate_after_the_cut_is_reported(dataset, tmp_path, capsys):
    options = overrides(dataset, tmp_path / "unused", *ROUGH)
    assert main(["verify-resume", str(DEBUG_RUN), "--then", "optimizer.params.lr=0.004", *options]) == 1
    out = capsys.readouterr().out
    assert "lr at step 3: " in out
    assert "train/loss at step 4: " in out
    assert out.endswith("NOT the same samples, rates and steps, and losses within 0.0001 nats\n")


@pytest.mark.process
@pytest.mark.long
def test_a_resume_that_loses_the_rng_state_is_reported(dataset, tmp_path, capsys, monkeypatch):
    """The control: every rank imports a sitecustomize that disables restoring the RNG state."""
    (tmp_path / "sitecustomize.py").write_text(
        "import megagpt.checkpoint.rng\nmegagpt.checkpoint.rng.set_rng_state = lambda saved: None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    options = overrides(dataset, tmp_path / "unused", *ROUGH)
    assert main(["verify-resume", str(DEBUG_RUN), *options]) == 1
    out = capsys.readouterr().out
    assert "train/loss at step 3: " in out
    assert "rng.0.json differs" in out
    assert out.endswith("NOT the same to the last bit\n")


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ({"x": [torch.tensor([0.0])]}, {"x": [torch.tensor([0.0])]}, True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor(1.5), torch.tensor(1.5), True),
        ({"x": 1}, {"x": 1, "y": 2}, False),
        ([float("nan")], [float("nan")], True),
    ],
)
def test_sameness_is_of_bits(a, b, equal):
    assert same(a, b) is equal


@pytest.mark.parametrize(
    ("then", "key"),
    [
        ("wandb.enabled=true", "wandb.enabled"),
        ("megagpt.mlflow.enabled=true", "megagpt.mlflow.enabled"),
        ('wandb={"enabled": true}', "wandb.enabled"),
        ("megagpt.out_dir=runs/mine", "megagpt.out_dir"),
        ("megagpt.every.eval=2", "megagpt.every"),
    ],
)
def test_a_resumed_half_has_the_folder_intervals_and_trackers_of_the_test(then, key, capsys):
    assert main(["verify-resume", str(DEBUG_RUN), "--then", then]) == 2
    assert f"--then {then}: verify-resume sets {key} itself, in both halves; remove it" in capsys.readouterr().err


def test_a_run_of_one_step_cannot_be_cut_in_two(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["verify-resume", str(DEBUG_RUN), "--steps", "1"])
    assert "'1' is not a whole number from 2 to" in capsys.readouterr().err
