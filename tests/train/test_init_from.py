"""`megagpt.init_from`: a new run begins with another's weights, and with nothing else of it."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from support import curves, debug_run, write_corpus

from data_tools.build import build
from data_tools.config import BuildConfig
from megagpt.checkpoint.commit import best, committed
from megagpt.engine.state_files import consolidated_weights
from megagpt.errors import UserError
from megagpt.metrics.metrics_file import METRICS, read_rows
from megagpt.train.trainer import train

FEW = ["megagpt.schedule.max_steps=4", "megagpt.schedule.warmup_steps=0", "megagpt.every.eval=4"]
# So small a rate that a step changes no weight by more than rounding does.
ONE = ["megagpt.schedule.max_steps=1", "megagpt.schedule.warmup_steps=0", "optimizer.params.lr=1e-12"]


@pytest.fixture(scope="module")
def pretrained(dataset, device, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "pretrained"
    train(debug_run(dataset, folder, *FEW), device)
    return folder


@pytest.mark.parametrize("stage", range(4))
def test_a_new_run_has_the_weights_and_begins_at_step_0(pretrained, dataset, device, tmp_path, capfd, stage):
    more = [*ONE, f"zero_optimization.stage={stage}", f"megagpt.init_from={pretrained}", "megagpt.seed=7"]
    state = train(debug_run(dataset, tmp_path / "run", *more), device)
    assert (state.step, state.tokens_seen) == (1, 8 * 64)
    given, [step_dir] = best(pretrained), committed(tmp_path / "run")
    told = capfd.readouterr().out
    assert f"starting at step 0 with the weights of {given}" in told
    # measured once before the first step, with the loss that the other run ended with; not as this run's best
    losses, began = curves(tmp_path / "run"), curves(pretrained)
    assert losses["val/loss"][0] == pytest.approx(began["val/loss"][4], rel=1e-5)
    assert losses["val/best_loss"].keys() == {1}
    assert (state.stopper.best_step, state.stopper.best) == (1, losses["val/loss"][1])
    assert re.search(r"\nbest val/loss \S+ at step 1\n", told)
    before, after = consolidated_weights(given), consolidated_weights(step_dir)
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0.0, atol=1e-6, msg=name)


def test_positions_may_be_more_or_fewer(pretrained, dataset, device, tmp_path, capsys):
    """Those without weights of the first run begin at random, which a note tells."""
    before = consolidated_weights(best(pretrained))["wpe.weight"]
    for n in (48, 96):
        more = [*ONE, f"megagpt.init_from={pretrained}", f"megagpt.model.seq_len={n}"]
        train(debug_run(dataset, tmp_path / str(n), *more), device)
        [step_dir] = committed(tmp_path / str(n))
        after = consolidated_weights(step_dir)["wpe.weight"]
        assert len(after) == n
        torch.testing.assert_close(after[:64], before[:n], rtol=0.0, atol=1e-6)
        note = f"note: the model of {best(pretrained)} has 64 positions, and this run's {n}: "
        assert (note in capsys.readouterr().out) == (n == 96)


def test_a_run_that_resumes_does_not_look_there(pretrained, dataset, device, tmp_path):
    """The same command goes on with its own weights, also when the other run is gone.

    Where nothing was saved, it begins again, and the loss at step 0 is there once.
    """
    other = tmp_path / "other"
    other.symlink_to(pretrained)
    run = [*FEW, f"megagpt.init_from={other}"]
    train(debug_run(dataset, tmp_path / "cut", *run), device, stop_at=2)
    train(debug_run(dataset, tmp_path / "straight", *run), device)
    other.unlink()
    train(debug_run(dataset, tmp_path / "cut", *run), device)
    cut, straight = (consolidated_weights(best(tmp_path / name)) for name in ("cut", "straight"))
    assert all(torch.equal(cut[name], weight) for name, weight in straight.items())
    assert curves(tmp_path / "cut")["val/loss"] == curves(tmp_path / "straight")["val/loss"]
    assert curves(tmp_path / "cut")["val/loss"].keys() == {0, 4}
    other.symlink_to(pretrained)
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "cut" / METRICS, tmp_path / "again")  # as if killed before the first save
    train(debug_run(dataset, tmp_path / "again", *run), device, stop_at=1)
    assert [row["step"] for row in read_rows(tmp_path / "again" / METRICS) if "val/loss" in row] == [0]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["megagpt.model.n_layer=1"], "its model has n_layer=2, and this run's n_layer=1; set megagpt.model.n_layer=2"),
        (["megagpt.init_from=nowhere"], "nowhere does not exist; give a run's folder"),
        (["megagpt.init_from=gpt2-xl"], "`hf download gpt2-xl --local-dir gpt2-xl`, then: megagpt import gpt2-xl NEW"),
        (["megagpt.init_from=DATA"], "is a dataset; give a run's folder"),
    ],
)
def test_what_does_not_fit_is_one_message(pretrained, dataset, device, tmp_path, more, complaint):
    more = [key.replace("DATA", str(dataset)) for key in more]
    with pytest.raises(UserError, match=complaint):
        train(debug_run(dataset, tmp_path / "run", *FEW, f"megagpt.init_from={pretrained}", *more), device)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_is_named(pretrained, device, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 100)
    build([corpus], tmp_path / "data", BuildConfig(tokenizer_type="bpe", vocab_size=300, val_fraction=0.3, workers=1))
    with pytest.raises(UserError, match="its tokenizer is another one than the data's; build the data with"):
        train(debug_run(tmp_path / "data", tmp_path / "run", *FEW, f"megagpt.init_from={pretrained}"), device)


def test_fresh_does_not_rename_the_run_that_it_begins_with(pretrained, dataset, device, tmp_path):
    train(debug_run(dataset, tmp_path / "run", *FEW), device)
    with pytest.raises(UserError, match="is in it and in use"):
        train(debug_run(dataset, tmp_path / "run", *FEW, f"megagpt.init_from={tmp_path / 'run'}"), device, fresh=True)
    assert best(tmp_path / "run") is not None
