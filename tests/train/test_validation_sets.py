"""Runs with several validation sets: their numbers, which of them decides, and what a resume may change."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from event_files import board, drawn
from support import build_dataset, curves, debug_run, write_corpus

from data_tools.build import build
from data_tools.config import BuildConfig
from megagpt.__main__ import main
from megagpt.checkpoint.commit import best, committed, read_commit
from megagpt.checkpoint.load import load_model
from megagpt.data.dataset import open_dataset
from megagpt.data.loader import ValWindows
from megagpt.data.provenance import origins
from megagpt.errors import UserError
from megagpt.huggingface.card import model_card
from megagpt.train.evaluate import Evaluation, evaluate, mean_of
from megagpt.train.trainer import train

FEW = ["megagpt.schedule.max_steps=4", 'megagpt.every={"log": 4, "eval": 2, "save": 2}', "megagpt.data.val_tokens=512"]


@pytest.fixture(scope="module")
def other(dataset, tmp_path_factory) -> Path:
    """A dataset of other text with the tokenizer of `dataset`."""
    folder = tmp_path_factory.mktemp("other")
    corpus = write_corpus(folder / "corpus.jsonl", 60, seed=1)
    build([corpus], folder / "data", BuildConfig(tokenizer=dataset / "tokenizer.model", val_fraction=0.5, workers=1))
    return folder / "data"


def sets(dataset: Path, other: Path, **more: float) -> str:
    """All tokens of one set are used, and one window of the other."""
    named = {"web": {"path": str(dataset)} | more, "code": {"path": str(other), "tokens": 64} | more}
    return f"megagpt.data.val={json.dumps(named)}"


@pytest.fixture(scope="module")
def run(dataset, other, device, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "run"
    train(debug_run(dataset, folder, *FEW, sets(dataset, other)), device)
    return folder


def test_each_set_is_measured_as_alone_and_val_loss_is_their_mean_over_tokens(run, dataset, other):
    model, tokenizer, _, _ = load_model(run / "checkpoints" / "latest", torch.device("cpu"))
    token_bytes = torch.from_numpy(tokenizer.token_bytes())
    found, alone = curves(run), {}
    for name, path, tokens in (("web", dataset, 512), ("code", other, 64)):
        windows = ValWindows(open_dataset(path).stream("val"), 64, tokens)
        alone[name] = evaluate(model, windows, token_bytes, micro_batch=4)
        assert found[f"val/loss/{name}"][4] == pytest.approx(alone[name].loss, rel=1e-6)
        assert found[f"val/perplexity/{name}"][4] == pytest.approx(alone[name].perplexity, rel=1e-5)
        assert found[f"val/bits_per_byte/{name}"][4] == pytest.approx(alone[name].bits_per_byte, rel=1e-6)
    nats = sum(one.loss * one.tokens for one in alone.values())
    assert found["val/loss"][4] == pytest.approx(nats / (512 + 64), rel=1e-6)
    n_bytes = sum(one.bytes for one in alone.values())
    assert found["val/bits_per_byte"][4] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert read_commit(committed(run)[-1]).state.val_loss == found["val/loss"][4]


def evaluated(capsys, *args: object) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_evaluate_measures_the_sets_of_the_run_also_by_name(run, dataset, other, capsys):
    found = evaluated(capsys, run, "--tokens", 64)
    assert list(found["sets"]) == ["web", "code"]
    assert found["sets"]["code"]["loss"] == pytest.approx(curves(run)["val/loss/code"][4], rel=1e-6)
    assert found["mean"]["loss"] == pytest.approx(sum(one["loss"] for one in found["sets"].values()) / 2)
    named = {"checkpoint": found["checkpoint"]} | found["sets"]["code"]
    assert named.pop("data") == str(other)
    assert evaluated(capsys, run, "--tokens", 64, "--data", "code") == named
    assert evaluated(capsys, run, "--tokens", 64, "--data", other) == named
    table = "  code ({})  {:.4f}  {:>10.2f}".format(other, *(named[key] for key in ("loss", "perplexity")))
    assert main(["evaluate", str(run), "--tokens", "64"]) == 0
    assert table in capsys.readouterr().out
    # without options all tokens are read, and the run's mean is told with what it was of
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    was = f"in the run, val/loss of this step was {curves(run)['val/loss'][4]:.4f}, on the first 512 tokens of web and "
    assert f"{was}the first 64 tokens of code\n" in shown
    assert shown.splitlines()[1].endswith("  tokens  loss by frequency")
    assert all(re.search(r",?\d+ +\d\.\d{4}$", line) for line in shown.splitlines()[2:4])
    for data, told in (
        (["cod"], "--data cod is no dataset, nor a validation set of the run, which has web, code"),
        (["web", dataset], f"--data web and --data {dataset} are one dataset; remove one"),
    ):
        given = [part for one in data for part in ("--data", str(one))]
        assert main(["evaluate", str(run), *given]) == 2
        assert told in capsys.readouterr().err


def test_an_average_is_measured_on_what_decides_or_on_a_set_by_its_name(run, capsys, tmp_path):
    found = evaluated(capsys, run, "--tokens", 64)
    losses = {"mean": found["mean"]["loss"], "code": found["sets"]["code"]["loss"]}
    for name, data in (("mean", []), ("code", ["--data", "code"])):
        assert main(["average", *map(str, committed(run)), str(tmp_path / name), "--tokens", "64", *data]) == 0
        assert f"  {losses[name]:.4f}   0.500  {committed(run)[-1]}" in capsys.readouterr().out
    assert main(["average", *map(str, committed(run)), str(tmp_path / "none"), "--data", "cod"]) == 2
    assert "--data cod is no dataset, nor a validation set of the run, which has web, code" in capsys.readouterr().err


def test_the_card_tells_the_fingerprint_of_each_set_and_which_of_them_the_loss_is_of(run):
    card = model_card(load_model(run, torch.device("cpu")), "mine", None, 10, 0, drawn=False)
    assert "at this step (the mean of web, code, by their tokens, where no set is named):\n" in card
    prints = read_commit(best(run)).identity.data["val"]
    assert f"Fingerprints of the validation data:\n\n- web: `{prints['web']}`\n- code: `{prints['code']}`\n" in card
    assert f"| loss | {curves(run)['val/loss'][4]:.4f} |\n" in card


def test_a_name_that_is_another_dataset_here_is_refused(run, other, capsys, tmp_path, monkeypatch):
    shutil.copytree(other, tmp_path / "web")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run), "--data", "web"]) == 2
    told = "--data web is a dataset here and another one of the run"
    assert f"give {tmp_path / 'web'} or " in (err := capsys.readouterr().err)
    assert told in err


def test_a_name_is_the_runs_set_whatever_else_is_called_so_here(run, other, capsys, tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", str(run), "--data", "code", "--tokens", "64"]) == 0
    assert f"on 64 tokens of {other} (val)" in capsys.readouterr().out


def test_each_source_of_a_dataset_has_the_loss_of_its_tokens(run, dataset, capsys, tmp_path):
    corpora = [write_corpus(tmp_path / f"{name}.jsonl", n, seed=n) for name, n in (("one", 30), ("two", 20))]
    build(corpora, tmp_path / "both", BuildConfig(tokenizer=dataset / "tokenizer.model", val_fraction=0.5, workers=1))
    found = evaluated(capsys, run, "--data", tmp_path / "both")
    model = load_model(run, torch.device("cpu")).model
    stream = open_dataset(tmp_path / "both").stream("val")
    tokens = np.empty(stream.n_tokens, np.int64)
    stream.copy(0, tokens)
    n_windows = (len(tokens) - 1) // 64
    nats: dict[str, list[float]] = {"one.jsonl": [], "two.jsonl": []}
    for begin in range(0, n_windows * 64, 64):
        window = torch.from_numpy(tokens[begin : begin + 65]).unsqueeze(0)
        losses = torch.nn.functional.cross_entropy(model(window[:, :-1])[0], window[0, 1:], reduction="none")
        rows = [stream.rows_of(begin + 1 + t, 1)[0] for t in range(64)]
        for origin, loss in zip(origins(stream.dataset, "val", rows), losses.tolist(), strict=True):
            nats[origin.source].append(loss)
    for name, one in found["sources"].items():
        assert one["tokens"] == len(nats[name])
        assert one["loss"] == pytest.approx(sum(nats[name]) / len(nats[name]), rel=1e-5)
    assert sum(one["bytes"] for one in found["sources"].values()) == found["bytes"]
    assert sum(one["loss"] * one["tokens"] for one in found["sources"].values()) == pytest.approx(
        found["loss"] * found["tokens"]
    )


def test_a_set_that_decides_makes_the_run_that_has_it_alone(run, dataset, other, device, tmp_path):
    """And its checkpoints resume with other sets beside it, but with no other one that decides."""
    folder = tmp_path / "run"
    train(debug_run(dataset, folder, *FEW), device, stop_at=2)
    decides = "megagpt.early_stopping.monitor=val/loss/web"
    train(debug_run(dataset, folder, *FEW, sets(dataset, other), decides), device)
    found, mean, prints = curves(folder), curves(run), read_commit(committed(run)[-1]).identity.data["val"]
    card = model_card(load_model(folder, torch.device("cpu")), "mine", None, 10, 0, drawn=False)
    assert "(web, where no other set is named):\n" in card
    assert f"\n- web: `{prints['web']}`\n- code: `{prints['code']}`\n" in card
    assert found["val/loss"] == {2: mean["val/loss/web"][2], 4: mean["val/loss/web"][4]}
    assert found["val/loss/code"] == {4: mean["val/loss/code"][4]}
    for change, way_out in (
        ([sets(dataset, other)], r"set megagpt\.early_stopping\.monitor=val/loss/web, or give"),
        ([sets(dataset, other), decides[:-3] + "code"], r"set megagpt\.early_stopping\.monitor=val/loss/web, or give"),
        (
            [f"megagpt.data.val={other}"],
            r"set megagpt\.data\.val and megagpt\.early_stopping\.monitor as in .*run\.json",
        ),
    ):
        with pytest.raises(UserError, match=rf"val/loss was measured on the data \w{{12}}, and now .*; {way_out}"):
            train(debug_run(dataset, folder, *FEW, "megagpt.schedule.max_steps=6", *change), device)
    train(debug_run(dataset, folder, *FEW, "megagpt.schedule.max_steps=6"), device)
    assert set(curves(folder)["val/loss/code"]) == {4}


def test_a_mean_is_compared_with_none_of_other_sets_or_weights(run, dataset, other, device, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    longer = [*FEW, "megagpt.schedule.max_steps=6"]
    with pytest.raises(
        UserError, match=r"measured on the mean of web \(\w{12}\), code \(\w{12}\), and now it would be"
    ):
        train(debug_run(dataset, folder, *longer), device)
    with pytest.raises(UserError, match=r"on the mean of web \(\w{12}, weight 2\), code \(\w{12}, weight 2\), so that"):
        train(debug_run(dataset, folder, *longer, sets(dataset, other, weight=2.0)), device)
    capsys.readouterr()
    backwards = json.dumps({"code": {"path": str(other), "tokens": 64}, "web": {"path": str(dataset)}})
    train(debug_run(dataset, folder, *longer, f"megagpt.data.val={backwards}"), device)  # their order is nothing
    assert set(curves(folder)["val/loss"]) == {2, 4, 6}
    assert "note: val/loss is measured" not in capsys.readouterr().out
    fewer = [sets(dataset, other), "megagpt.data.val_tokens=256", "megagpt.schedule.max_steps=8"]
    train(debug_run(dataset, folder, *longer, *fewer), device)
    told = r"note: val/loss is measured on 64 \+ 256 tokens from now on, and the best, \S+ at step 6, was on 64 \+ 512:"
    assert re.search(told, capsys.readouterr().out)


def test_a_run_stops_early_on_the_set_that_decides(run, dataset, other, device, tmp_path, capsys):
    options = [*FEW, sets(dataset, other), 'megagpt.every={"log": 4, "eval": 1, "save": 0}']
    stopping = '{"monitor": "val/loss/code", "patience": 1, "min_delta": 100}'
    state = train(debug_run(dataset, tmp_path / "run", *options, f"megagpt.early_stopping={stopping}"), device)
    out = capsys.readouterr().out
    assert "stopped early at step 2: for 1 evaluation val/loss/code was not lower by megagpt.early_stopping.min_" in out
    assert "best val/loss/code " in out
    assert "    step val/loss/code" in out
    found = curves(tmp_path / "run")
    assert state.stopper.best == found["val/loss/code"][1] == found["val/loss"][1] == found["val/best_loss"][2]
    assert best(tmp_path / "run").name == "step_00000001"


def test_sets_are_refused_before_anything_is_built(dataset, other, device, tmp_path):
    def refused(value: dict, *more: str) -> str:
        with pytest.raises(UserError) as error:
            train(debug_run(dataset, tmp_path / "run", f"megagpt.data.val={json.dumps(value)}", *more), device)
        return str(error.value)

    missing, strange = tmp_path / "nowhere", build_dataset(tmp_path / "strange", n_documents=40, seed=7)
    web, code = {"path": str(dataset)}, {"path": str(other)}
    twice = "megagpt.data.val has one dataset twice, as web and as again: "
    assert refused({"web": web, "again": web}).startswith(twice)
    assert refused({"web": web, "code": {"path": str(missing)}}) == refused({"code": {"path": str(missing)}})
    assert "tokenized with another model" in refused({"web": web, "code": {"path": str(strange)}})
    small = refused({"web": web, "code": code | {"tokens": 10**6}})
    windows = (open_dataset(other).stream("val").n_tokens - 1) // 64
    assert f"too little validation data in {other} for megagpt.data.val.code.tokens=1000000" in small
    assert f"give megagpt.data.val.code.tokens={windows * 64}, or" in small
    empty = build([write_corpus(tmp_path / "all.jsonl", 5)], tmp_path / "all", whole(dataset)) and tmp_path / "all"
    assert f"dataset {empty} has no documents in its 'val' split" in refused(
        {"web": web, "empty": {"path": str(empty)}}
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def whole(dataset: Path) -> BuildConfig:
    return BuildConfig(tokenizer=dataset / "tokenizer.model", val_fraction=0.0, workers=1)


@pytest.mark.parametrize(
    ("weights", "loss", "bits"),
    [
        ([], (2.0 * 30 + 5.0 * 10) / 40, (2.0 * 30 + 5.0 * 10) / math.log(2) / (90 + 20)),
        ([1.0, 1.0], 3.5, 3.5 / math.log(2) / ((3 + 2) / 2)),  # each token of the first has 3 bytes, of the second 2
        ([30.0, 10.0], 2.75, 110 / math.log(2) / 110),
    ],
)
def test_the_mean_of_sets_by_hand(weights, loss, bits):
    mean = mean_of([Evaluation(2.0, 30, 90), Evaluation(5.0, 10, 20)], weights)
    assert (mean.loss, mean.tokens) == (loss, 40)
    assert mean.bits_per_byte == pytest.approx(bits)
    assert math.isnan(mean_of([Evaluation(math.nan, 30, 90), Evaluation(5.0, 10, 20)]).loss)


def test_the_report_draws_the_sets_of_a_run_together_and_knows_their_data(run, dataset, other, tmp_path):
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert all(f">val/{kind}/{name}<" in page for kind in ("loss", "bits_per_byte") for name in ("web", "code"))
    assert "val/bits_per_byte by step" in page
    assert "val/bits_per_byte/web by step" not in page
    assert f"{other}: tokenizer" in page
    assert "read another dataset" not in page


@pytest.mark.parametrize("decides", ["val/loss/web", "val/loss"])
def test_one_set_that_is_not_finite_is_named_and_stops_no_save(
    dataset, other, device, tmp_path, monkeypatch, capsys, decides
):
    """As where the activations of one kind of text overflow 16 bits."""

    def overflowing(model, windows, *args, **more):
        found = evaluate(model, windows, *args, **more)
        return replace(found, loss=math.nan) if windows.stream.dataset.path == other else found

    monkeypatch.setattr("megagpt.train.validation.evaluate", overflowing)
    monitor = f"megagpt.early_stopping.monitor={decides}"
    state = train(debug_run(dataset, tmp_path / "run", *FEW, sets(dataset, other), monitor), device)
    assert "not finite at step 2, though the weights are: val/loss/code\n" in capsys.readouterr().out
    found = curves(tmp_path / "run")
    assert found["val/loss/code"] == {2: None, 4: None}
    assert found["val/loss"] == (found["val/loss/web"] if decides == "val/loss/web" else found["val/loss/code"])
    assert state.stopper.best == (found["val/loss/web"][4] if decides == "val/loss/web" else math.inf)
    assert [step.name for step in committed(tmp_path / "run")] == ["step_00000002", "step_00000004"]


def test_each_set_has_curves_of_its_own_in_tensorboard_also_by_tokens(run):
    shown, found = board(run), curves(run)
    for name in ("web", "code"):
        losses = {step: pytest.approx(loss, rel=1e-6) for step, loss in found[f"val/loss/{name}"].items()}
        assert drawn(shown, f"val/loss/{name}") == losses
        assert drawn(shown, f"by_tokens/val/loss/{name}") == {8 * 64 * step: loss for step, loss in losses.items()}
        about = shown.SummaryMetadata(f"val/bits_per_byte/{name}").summary_description
        assert about == f"loss in bits per byte of text, of the validation set {name}"


def test_averages_have_curves_of_each_set_and_the_closing_lines_are_of_what_decides(
    dataset, other, device, tmp_path, capsys
):
    averages = ["megagpt.ema.decay=0.5", "megagpt.early_stopping.monitor=val/ema_loss", "tensorboard.enabled=true"]
    state = train(debug_run(dataset, tmp_path / "run", *FEW, *averages, sets(dataset, other)), device)
    found = curves(tmp_path / "run")
    names = ["val/ema_loss", "val/ema_loss/web", "val/ema_loss/code"]
    shown = board(tmp_path / "run")
    for name in names:
        assert list(found[name]) == [2, 4]
        assert list(drawn(shown, name)) == [2, 4]
        assert len(drawn(shown, f"by_tokens/{name}")) == 2
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(next(line for line in lines if line.startswith("    step val/ema_loss")))
    assert [float(line.split()[1]) for line in lines[at + 1 : at + 3]] == pytest.approx(
        list(found["val/ema_loss"].values()), abs=1e-4
    )
    assert f"best val/ema_loss {state.stopper.best:.4f} at step {state.stopper.best_step}" in lines  # and nothing after
