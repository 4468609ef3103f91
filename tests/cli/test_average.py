"""`megagpt average`: the weighted mean of several steps, which all that reads a step reads, and its losses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import debug_run

from megagpt.__main__ import main
from megagpt.checkpoint.commit import best, committed, read_commit
from megagpt.checkpoint.load import LoadedModel, load_model
from megagpt.data.dataset import open_dataset
from megagpt.engine.state_files import consolidated_weights
from megagpt.huggingface.card import model_card, write_curves
from megagpt.train.trainer import train

FEW = ["megagpt.schedule.max_steps=6", "megagpt.schedule.warmup_steps=0", "optimizer.params.lr=0.01"]
FEW += ['megagpt.every={"save": 2, "eval": 0}', "megagpt.keep.last=3"]


@pytest.fixture(scope="module")
def run(dataset, device, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder.parent / "data").symlink_to(dataset)
    train(debug_run(folder.parent / "data", folder, *FEW), device)
    assert len(committed(folder)) == 3
    return folder


@pytest.fixture(scope="module")
def averaged(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("averaged") / "out"
    assert main(["average", *map(str, committed(run)), str(folder), "--tokens", "64"]) == 0
    return folder


def loss_of(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> float:
    capsys.readouterr()
    assert main(["evaluate", str(checkpoint), "--tokens", "640", "--json"]) == 0
    return float(json.loads(capsys.readouterr().out)["loss"])


@pytest.mark.parametrize(("weights", "shares"), [((), (1 / 3, 1 / 3, 1 / 3)), (("5", "3", "2"), (0.5, 0.3, 0.2))])
def test_the_average_is_the_mean_of_the_master_weights_and_its_loss_is_printed(run, tmp_path, capsys, weights, shares):
    steps, out = committed(run), tmp_path / "out"
    command = ["average", *map(str, steps), str(out), "--tokens", "640", *(["--weights", *weights] if weights else [])]
    assert main(command) == 0
    printed = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:5]]
    of_steps, found = [consolidated_weights(step_dir) for step_dir in steps], consolidated_weights(out)
    for name, weight in found.items():
        mean = sum(share * one[name].double() for share, one in zip(shares, of_steps, strict=True))
        torch.testing.assert_close(weight.double(), mean, rtol=1e-6, atol=1e-7)
    losses = [loss_of(checkpoint, capsys) for checkpoint in (*steps, out)]
    assert printed == [[f"{loss:.4f}", f"{share:.3f}"] for loss, share in zip(losses, (*shares, 1.0), strict=True)]
    measured = json.loads((out / "weights_from.json").read_text())["evaluation"]
    assert (measured["split"], measured["tokens"], measured["is_val_loss"]) == ("val", 640, False)
    assert measured["loss"] == pytest.approx(losses[-1], abs=1e-6)
    assert read_commit(out).state.val_loss is None  # of 640 tokens alone
    assert read_commit(out).state.step == 6


def test_what_reads_a_step_reads_the_average(run, dataset, device, tmp_path, capsys):
    steps = committed(run)
    assert main(["average", str(steps[0]), str(run), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"{steps[2]} alone has a lower loss" in printed
    assert f"  {read_commit(tmp_path / 'out').state.val_loss:.4f}   1.000  the average" in printed
    card = card_of(load_model(tmp_path / "out", device))
    tokens = json.loads((tmp_path / "out" / "weights_from.json").read_text())["evaluation"]["tokens"]
    assert f"On {tokens:,} tokens of the validation data:\n\n" in card
    assert main(["generate", str(tmp_path / "out"), "--max-tokens", "3"]) == 0
    more = ["megagpt.schedule.max_steps=1", "megagpt.schedule.warmup_steps=0", "optimizer.params.lr=1e-12"]
    train(debug_run(dataset, tmp_path / "new", *more, f"megagpt.init_from={tmp_path / 'out'}"), device)
    new, given = load_model(tmp_path / "new", device).model, load_model(tmp_path / "out", device).model
    for one, two in zip(new.parameters(), given.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0.0, atol=1e-6)


def card_of(loaded: LoadedModel) -> str:
    return model_card(loaded, "mine", None, 10, 0, drawn=False)


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_card_of_an_average_tells_on_what_its_loss_was_measured(run, dataset, tmp_path, split):
    """Also in a run's folder, whose losses are others; and nothing of what an older megagpt measured on anything."""
    out = Path(shutil.copytree(run, tmp_path / "run")) / "averaged"
    options = ["--tokens", "512", "--split", split, "--data", str(dataset)]
    assert main(["average", *map(str, committed(run)), str(out), *options]) == 0
    origin = json.loads((out / "weights_from.json").read_text())
    loaded = load_model(out, torch.device("cpu"))
    card = card_of(loaded)
    assert "2 layers, 2 heads and a width of 64, whose weights are the average of several steps" in card
    on = f"On 512 tokens of the {split} split of data with the fingerprint `{open_dataset(dataset).fingerprint}`:\n\n"
    assert f"{on}| | |\n|---|---|\n| loss | {origin['evaluation']['loss']:.4f} |" in card
    assert not write_curves(out, tmp_path)
    del origin["evaluation"]
    (out / "weights_from.json").write_text(json.dumps(origin))
    assert "It was not evaluated in training." in card_of(loaded)


def test_without_the_data_the_average_is_made_and_a_line_tells_why_there_is_no_loss(run, tmp_path, capsys):
    steps, data = committed(run), run.parent / "data"
    data.rename(run.parent / "moved")
    try:
        assert main(["average", str(steps[0]), str(steps[1]), str(tmp_path / "out")]) == 0
    finally:
        (run.parent / "moved").rename(data)
    out = capsys.readouterr().out
    assert f"not evaluated: the run of {steps[1]} read {data}, which is not here; give its place by --data DIR" in out
    assert read_commit(tmp_path / "out").state.val_loss is None


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["{first}", "out"], "nothing to average: give two steps or more, and after them a new folder"),
        (["{run}", "{last}", "out"], "is named twice; name each step once, and give it more weight by --weights"),
        (["{first}", "{last}", "{run}"], "is one more step, and nothing is written over it; name a new folder"),
        (["{first}", "{last}", "{averaged}"], "{averaged} exists and holds an averaged model"),
        (["{first}", "{last}", "."], "is the current folder, which cannot be replaced"),
        (["{first}", "nowhere", "out"], "nowhere does not exist; give a run's folder"),
        (["{first}", "{last}", "out", "--weights", "1", "2", "3"], "--weights has 3 numbers for 2 steps"),
        (["{first}", "{last}", "out", "--data", "{run}"], "{run} is not a dataset"),
        (["{first}", "{last}", "out", "--data", "nowhere"], "there is no dataset folder nowhere; make it"),
    ],
)
def test_what_cannot_be_averaged_is_one_message(run, averaged, tmp_path, monkeypatch, capsys, given, complaint):
    monkeypatch.chdir(tmp_path)
    places = {"run": run, "first": committed(run)[0], "last": best(run), "averaged": averaged}
    assert main(["average", *(word.format(**places) for word in given)]) == 2
    assert complaint.format(**places) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "complaint"),
    [
        ("COMMIT", '"n_head": 2', '"n_head": 4', "has n_head=4, and {first} 2; give steps of models of one shape"),
        (
            "COMMIT",
            '"tokenizer": "',
            '"tokenizer": "0',
            "has another tokenizer than {first}; give steps of models with",
        ),
        ("run.json", '"concatenate"', '"best-fit"', "differ in whether attention stays within documents"),
    ],
)
def test_steps_of_unlike_models_are_not_averaged(run, tmp_path, capsys, file, before, after, complaint):
    first, step_dir = committed(run)[0], tmp_path / "step"
    shutil.copytree(committed(run)[1], step_dir)
    content = (step_dir / file).read_text()
    assert before in content
    (step_dir / file).write_text(content.replace(before, after))
    assert main(["average", str(first), str(step_dir), str(tmp_path / "out")]) == 2
    assert complaint.format(first=first) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        (["1", "2", "{run}", "{run}", "out"], "give --weights last, with a number for each STEP"),
        (["1,2"], "'1,2' is not a number from 1e-06 to 1e+06; give --weights last, with a number for each STEP and sp"),
        (["0", "1"], "'0' is not a number from 1e-06 to 1e+06; leave out a step that is not to count"),
        (["-1", "2"], "'-1' is not a number from 1e-06 to 1e+06; leave out"),
    ],
)
def test_weights_that_are_none_are_told_with_what_was_meant(run, capsys, weights, complaint):
    with pytest.raises(SystemExit):
        main(["average", str(run), str(run), "out", "--weights", *(word.format(run=run) for word in weights)])
    assert complaint in (told := capsys.readouterr().err)
    assert ("give --weights last" in told) == ("last" in complaint)


def test_steps_of_models_with_other_parts_are_not_averaged(run, device, tmp_path, capsys):
    """Their weights have the same shapes: a cap of logits has none, and the average would be of no model."""
    train(debug_run(run.parent / "data", tmp_path / "capped", *FEW, "megagpt.model.logit_softcap=5"), device)
    assert main(["average", str(tmp_path / "capped"), str(run), str(tmp_path / "out")]) == 2
    assert "has logit_softcap=None, and" in capsys.readouterr().err


def test_a_model_with_an_output_head_of_its_own_keeps_it(run, device, tmp_path):
    train(debug_run(run.parent / "data", tmp_path / "untied", *FEW, "megagpt.model.preset=llama"), device)
    steps = [str(step) for step in committed(tmp_path / "untied")]
    assert main(["average", *steps, str(tmp_path / "out")]) == 0
    heads = [load_model(Path(path), device).model.lm_head.weight for path in (*steps, tmp_path / "out")]
    assert torch.allclose(sum(heads[:-1]) / len(steps), heads[-1])
