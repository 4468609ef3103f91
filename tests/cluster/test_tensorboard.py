"""A run of two hosts in TensorBoard, as a user sees it: it was cut off twice and went on twice, and is one curve."""

import re
from pathlib import Path

import pytest
from board import Board
from hosts import Cluster
from support import DEBUG_RUN, ROOT, SCALARS, curves, debug_run, overrides

from megagpt.checkpoint.save import save
from megagpt.train.trainer import train

STEPS, CADENCE = 60, 20
CUTS = (23, 47)  # steps drawn, but not saved
PICTURES = ROOT / "build" / "tensorboard"


@pytest.fixture(scope="module", params=["one process", pytest.param("two hosts", marks=pytest.mark.long)])
def out_dir(request, dataset, tmp_path_factory) -> Path:
    """A run that was cut off twice, each time with more drawn than saved, and then came to its end."""
    folder = tmp_path_factory.mktemp("runs") / request.param.replace(" ", "_")
    every = [f"megagpt.every.{name}={CADENCE}" for name in ("eval", "save", "sample")]
    more = [*every, f"megagpt.schedule.max_steps={STEPS}", "megagpt.sample.max_tokens=20", "optimizer.params.lr=0.001"]
    if request.param == "one process":
        in_one_process(dataset, folder, more, request.getfixturevalue("device"))
    else:
        on_two_hosts(overrides(dataset, folder, *more), request.getfixturevalue("raise_cluster")(2))
    return folder


def in_one_process(dataset: Path, folder: Path, more: list[str], device) -> None:
    def full_at_the_cuts(engine, state, *rest):
        if state.step in CUTS:
            raise OSError("no space left on device")
        save(engine, state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megagpt.train.session.save_checkpoint", full_at_the_cuts)
        for cut in CUTS:
            with pytest.raises(OSError, match="no space"):
                train(debug_run(dataset, folder, *more), device, stop_at=cut)
    train(debug_run(dataset, folder, *more), device)


def on_two_hosts(options: list[str], cluster: Cluster) -> None:
    start = ["deepspeed", "--hostfile", cluster.hostfile(), ROOT / "launch" / "pretrain.py"]
    for cut in CUTS:
        program = cluster["h1"].start(*start, "--deepspeed_config", DEBUG_RUN, *options)
        program.until(f"/{STEPS} | train/loss")
        rank = cluster["h2"].rank()
        program.until(f"step {cut}/")
        rank.kill()
        assert program.end() != 0
        assert not cluster.rest()
    program = cluster["h1"].start(*start, "--deepspeed_config", DEBUG_RUN, *options)
    assert program.end() == 0, program.output


@pytest.fixture(scope="module")
def board(_a_browser_can_be_started, out_dir, tmp_path_factory):
    with Board(out_dir.parent, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_rank_0_alone_writes_one_file_in_each_attempt(out_dir):
    files = [path.name.split(".") for path in out_dir.glob("events.out.tfevents.*")]
    hosts = [name[5] for name in files if name[4] != "run"]
    assert len(hosts) == len(CUTS) + 1
    assert len(set(hosts)) == 1


def test_every_scalar_is_drawn_as_one_line_without_gaps(board, out_dir):
    """Of each attempt what it drew before it saved; what the page fetched, and the lines that it made of that."""
    expected = curves(out_dir)
    of_hosts = {name for name in expected if name.startswith("cluster/")}
    assert len(of_hosts) == {"one_process": 0, "two_hosts": 10}[out_dir.name]
    assert set(expected) - of_hosts == SCALARS
    assert list(expected["train/loss"]) == list(range(1, STEPS + 1))
    assert list(expected["val/loss"]) == list(range(CADENCE, STEPS + 1, CADENCE))
    drawn = board.open("scalars", "tf-scalar-card", ".line-plot.ghost path.line", len(expected) + 2)
    board.screenshot(PICTURES / f"{out_dir.name}_scalars.png")
    by_tokens = {f"by_tokens/{name}" for name in ("train/loss", "val/loss")}
    assert set(drawn) == set(expected) | by_tokens
    for name in by_tokens:
        del drawn[name]
    for name, lines in drawn.items():
        [line] = lines
        unbroken = line.get_attribute("d").removeprefix("M").split("L")  # points that lie on a straight line are joined
        x = [float(point.split(",")[0]) for point in unbroken]
        assert 2 <= len(x) <= len(expected[name]), name
        assert x == sorted(set(x)), name
    fetched = {
        re.search(r'name="tag"\r\n\r\n(.+)\r\n', question)[1]: answer  # a page may ask twice
        for question, answer in board.fetched("data/plugin/scalars/scalars_multirun")
    }
    assert set(fetched) == set(expected) | by_tokens
    for name in expected:
        [points] = fetched[name].values()
        assert [(step, value) for _, step, value in points] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in expected[name].items()
        ]


def test_every_sample_can_be_read_once(board, out_dir):
    steps = board.open("text", "tf-text-loader", ".step-value", 2)
    board.screenshot(PICTURES / f"{out_dir.name}_text.png")
    assert [int(s.text) for s in steps["samples/text_summary"]] == [60, 40, 20]
    assert [int(s.text) for s in steps["settings/run_file/text_summary"]] == [0]
