"""Each guard fires on its fault, identically on both ranks (tests/programs/guarded_ranks.py), and on nothing else."""

import json
import math
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import PROGRAMS, debug_run, read_json, torchrun

from megagpt.checkpoint.commit import damage_of, step_folder
from megagpt.checkpoint.run_samples import open_run
from megagpt.config.guards import GuardsConfig, SpikesConfig
from megagpt.data.mixture import Batches, Mixture
from megagpt.data.provenance import origins
from megagpt.errors import UserError
from megagpt.guards.memory_growth import WINDOW, MemoryWatch
from megagpt.guards.spikes import after_steps, check_skipping, extended, is_spike
from megagpt.guards.step_window import StepMetrics
from megagpt.report.run_record import RollBack, read_log
from megagpt.train_state import Health, TrainState


@pytest.fixture(scope="module")
@processes.start_here
def folder(dataset, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    done = torchrun(2, PROGRAMS / "guarded_ranks.py", dataset, folder, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder


@pytest.fixture(scope="module")
@processes.start_here
def found(folder):
    """Scenario -> what it returned: the same on both ranks, but for the parts of weights that they hold."""

    def without_weights(node):
        held = ("weights", "loaded")
        return {k: without_weights(v) for k, v in node.items() if k not in held} if isinstance(node, dict) else node

    results = read_json(folder / "results.json")
    for one, other in results.values():
        assert without_weights(one) == without_weights(other)
    return {name: both[1] for name, both in results.items()}


def test_a_step_that_is_not_finite_on_one_rank_changes_no_weight_and_no_moment_on_any(found):
    """At every stage in fp32 and bf16, with accumulation, with offload, without clipping."""
    for kind, run in found["one_step_that_is_not_finite"].items():
        assert run["message"] == "", kind
        assert "the loss is nan at step 5 on rank 1; its update was skipped" in run["said"], kind
        assert (run["state"]["health"]["skipped_steps"], run["state"]["step"]) == (1, 7), kind
        w = run["weights"]
        assert w[4] == w[3], kind
        assert len(set(w)) == 6, kind
        assert all(math.isfinite(loss) for loss in run["loss"].values()), kind


def test_three_in_a_row_stop_the_run_and_name_the_documents(folder, found):
    run = found["three_steps_in_a_row_that_are_not_finite"]
    assert "the loss is inf at step 8 on rank 1: 3 steps in a row were not finite" in run["message"]
    assert run["committed"] == ["step_00000004"]  # the step after it was finite
    assert f"it resumes from {folder / 'three_steps_in_a_row_that_are_not_finite/run/checkpoints'}" in run["message"]
    w = run["weights"]
    assert w[0] == w[1]
    assert w[4] == w[5] == w[6] == w[7]
    assert document_of_rank_1(folder / "three_steps_in_a_row_that_are_not_finite" / "run", step=8) in run["message"]


def test_what_one_rank_alone_holds_that_is_not_finite_is_committed_by_none(folder, found):
    """At stages 1 to 3 the shard is in the files; at stage 0 rank 0 saves, and rank 1's steps tell."""
    for kind, run in found["a_shard_that_is_not_finite"].items():
        step_2 = folder / "a_shard_that_is_not_finite" / kind / "checkpoints" / "step_00000002"
        assert f"it resumes from {step_2}" in run["message"], kind
        assert ("step_00000004 was not saved: " in run["message"]) == (kind != "stage 0 fp32"), kind
        assert run["committed"] == ["step_00000002"], kind
        assert run["again"]["message"] == "", kind
        assert run["again"]["committed"][-1] == "step_00000011", kind
        assert all(math.isfinite(loss) for loss in run["again"]["loss"].values()), kind


def test_ranks_of_another_stage_pass_over_the_same_step(folder, found):
    run = found["an_older_step_that_is_not_finite"]
    assert run["message"] == ""
    assert (folder / "an_older_step_that_is_not_finite/run/checkpoints/damaged1_step_00000004").is_dir()
    assert run["committed"] == ["step_00000004", "step_00000006"]


def document_of_rank_1(run_dir, step) -> str:
    """Where its first sample of a step came from."""
    data = open_run(run_dir)
    span = data.spans(data.mixture.samples_of(step)[4])[0]  # its half begins there
    rows = span.dataset.stream("train", span.variant).rows_of(span.start, len(span.tokens))
    return str(next(origins(span.dataset, "train", rows)))


def test_a_spike_is_counted_and_said(found):
    quiet, told = found["a_spike"]["none"], found["a_spike"]["log"]
    assert quiet["state"]["health"]["spikes"] == told["state"]["health"]["spikes"] == 1
    assert quiet["weights"] == told["weights"]
    assert not any("spike" in line for line in quiet["said"])
    [line] = [line for line in told["said"] if "spike" in line]
    assert line.startswith("spike at step 14: loss ")


def test_a_spike_stops_the_run_and_names_the_documents_of_the_rank_that_saw_it(folder, found):
    run = found["a_spike"]["stop"]
    assert run["message"].startswith("spike at step 14: loss ")
    assert run["committed"] == ["step_00000006", "step_00000012"]
    assert document_of_rank_1(folder / "a_spike" / "stop", step=14) in run["message"]


def test_a_spike_is_left_out(found):
    """At step 9, the first that is judged; step 5 was not finite."""
    for kind, run in found["spikes_left_out"].items():
        w = run["weights"]
        assert w[8] == w[7], kind
        assert w[4] == w[3], kind
        assert len(set(w)) == 9, kind
        assert (run["state"]["health"]["skipped_steps"], run["state"]["health"]["spikes"]) == (2, 1), kind
        [line] = [line for line in run["said"] if "spike" in line]
        assert line.startswith("spike at step 9: "), kind
        assert line.endswith("; its update was skipped"), kind


def test_a_cut_before_a_spike_changes_nothing(found):
    straight, cut = found["spikes_left_out"]["stage 1 fp32"], found["spikes_left_out"]["cut"]
    assert cut["weights"] == straight["weights"]
    assert cut["state"] == straight["state"]


def test_a_spike_rolls_the_run_back_past_its_data(folder, found, tmp_path):
    """Seen when step 16 is logged; step 12 is saved. Steps 13 to 20 take the samples after those of step 16."""
    run = found["rolled_back"]["straight"]
    [line] = [line for line in run["said"] if line.startswith("rolled back")]
    assert line.startswith("rolled back from step 16 to ")
    assert line.endswith("step_00000012; samples 96 to 127 are skipped")
    (tmp_path / "train.log").write_text(line + "\n")
    assert read_log(tmp_path / "train.log")[1] == [RollBack(16, 12)]  # as megagpt report marks it
    assert len(run["weights"]) == 16 + 8
    assert run["loaded"] == [run["weights"][11]]
    assert run["weights"][16] != run["weights"][12]
    assert (run["state"]["step"], run["state"]["samples_seen"], run["state"]["tokens_seen"]) == (20, 192, 20 * 8 * 64)
    mixture = open_run(folder / "rolled_back" / "straight").mixture
    assert [mixture.samples_of(step) for step in (12, 13, 20)] == [range(88, 96), range(128, 136), range(184, 192)]


def test_a_cut_after_rolling_back_changes_nothing(found):
    straight, cut = found["rolled_back"]["straight"], found["rolled_back"]["cut"]
    assert cut["weights"] == straight["weights"]
    assert cut["state"] == straight["state"]
    assert cut["loss"] == straight["loss"]


def test_rolling_back_to_a_step_of_another_shape_loads_it_as_resuming_did(found):
    run = found["rolled_back"]["reshaped"]
    assert (run["message"], len(run["loaded"]), len(set(run["loaded"]))) == ("", 2, 1)


def test_rolling_back_waits_for_the_save_beside_training(found):
    """Or it would go back to step 6: step 12 is not committed before somebody waits for it."""
    run = found["rolled_back"]["beside a save"]
    [line] = [line for line in run["said"] if line.startswith("rolled back")]
    assert line.startswith("rolled back from step 13 to ")
    assert line.endswith("step_00000012; samples 96 to 103 are skipped")
    assert run["loaded"] == [run["weights"][11]]


def test_what_stops_a_run_leaves_the_save_in_flight_whole(folder, found):
    """Step 12's files are not written before somebody waits for them."""
    run = found["stopped_beside_a_save"]
    assert run["message"].startswith("spike at step 13: loss ")
    assert run["committed"] == ["step_00000006", "step_00000012"]
    out_dir = folder / "stopped_beside_a_save" / "run"
    assert damage_of(step_folder(out_dir, 12), 0, every=1) is None


def test_rolling_back_again_and_again_ends(found):
    run = found["rolled_back"]["again and again"]
    assert "3 times already" in run["message"]
    assert len([line for line in run["said"] if line.startswith("rolled back")]) == 3


@pytest.mark.parametrize("run", ["stage 0", "stage 1", "stage 2", "stage 3", "later"])
def test_a_flipped_bit_is_found_and_named(found, run):
    """At stage 3 because the parameter is small, and so kept whole."""
    message = found["a_bit_that_flipped"][run]
    assert f"weights differ between ranks after step {5 if run == 'later' else 3}: " in message
    assert "h.1.ln_1.bias (on one of the two ranks, unknown which)" in message


def test_a_rank_whose_output_alone_is_not_finite_leaves_no_other_waiting(found):
    said = found["an_output_that_is_not_finite"]["said"]
    assert [line for line in said if "samples" in line] == [
        "no samples at step 1: the model's output is not finite, so nothing can be generated; use an earlier checkpoint"
    ]


def test_memory_that_grows_on_one_rank_is_said_once(found):
    [line] = found["memory_that_grows"]
    assert line.startswith("memory of rank 1 keeps growing: from ")


def numbers(losses, norms, last):
    losses, norms = (torch.tensor(values, dtype=torch.float64) for values in (losses, norms))
    skipped = torch.zeros(len(losses), dtype=torch.bool)
    shares, none = torch.ones_like(losses), torch.zeros_like(losses)
    return StepMetrics(last, losses.unsqueeze(0), shares, norms, skipped, none, scaled=False)


CFG = GuardsConfig(spikes=SpikesConfig(window=8, sigma=2.0), max_bad_steps=2)
VALUES = st.one_of(st.floats(0.0, 10.0), st.just(math.nan), st.just(math.inf))


@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=40), st.integers(0, 40))
def test_judging_steps_at_once_or_in_two_parts_is_the_same(values, cut):
    losses, norms = (list(column) for column in zip(*values, strict=True))
    whole, spikes, _ = after_steps(Health(), numbers(losses, norms, len(values)), CFG)
    health, found = Health(), {}
    for begin, end in ((0, cut), (cut, len(values))):
        if losses[begin:end]:
            health, new, _ = after_steps(health, numbers(losses[begin:end], norms[begin:end], end), CFG)
            found |= {begin + i: what for i, what in new.items()}
    assert (health, found) == (whole, spikes)
    plain = json.loads(json.dumps(TrainState(health=whole).as_json()))
    assert TrainState.from_json(plain).health == whole


def judged(values, now):
    """By values of the loss and twice those of the norm."""
    history = torch.tensor([values, [2 * value for value in values]], dtype=torch.float64)
    return bool(is_spike(history, torch.tensor(now, dtype=torch.float64), CFG.spikes).any())


def test_a_spike_is_sigma_deviations_of_the_logarithm_above_the_middle_of_half_a_window_or_more():
    """Logarithms base 2 of 0, 1, 2, 3 and 99: the middle 2, deviations 2, 1, 0, 1 and 97, whose middle is 1. Two sigma:
    a factor of 2 ** (2 * 1.4826) = 7.810 over 4; however large the one great spike was.
    """
    values = [1.0, 4.0, 2.0, 8.0, 2.0**99]
    for now, spike in {(31.2, 8.0): False, (31.3, 8.0): True, (4.0, 62.5): True, (4.0, 62.4): False}.items():
        assert judged(values, now) == spike
    assert not judged(values, (0.0, 0.0))
    assert not judged(values[:3], (99.0, 99.0))


def test_a_constant_loss_may_vary_by_sigma_percent_and_a_constant_norm_by_sigma_times_20_percent():
    """Two sigma: 3 e^0.02 = 3.0606 for the loss, 6 e^0.4 = 8.951 for the norm."""
    assert not judged([3.0] * 8, (3.06, 8.95))
    assert judged([3.0] * 8, (3.07, 6.0))
    assert judged([3.0] * 8, (3.0, 8.96))


def test_no_norm_is_no_spike():
    """Zeros, where DeepSpeed has none."""
    zeros = torch.zeros(2, 8, dtype=torch.float64)
    assert not is_spike(zeros, zeros[:, 0], CFG.spikes).any()


def test_a_step_that_is_not_finite_counts_as_the_one_before():
    history = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    assert extended(history, torch.tensor([math.nan, 5.0]), 8).tolist() == [[1.0, 2.0, 2.0], [3.0, 4.0, 4.0]]
    assert extended(history, torch.tensor([6.0, 5.0]), 2).tolist() == [[2.0, 6.0], [4.0, 5.0]]


def test_a_norm_that_is_not_finite_under_a_loss_scale_is_no_bad_step():
    steps = numbers([1.0, 1.0], [math.inf, math.inf], 2)
    assert after_steps(Health(), steps, CFG)[2] == 1
    assert after_steps(Health(), replace(steps, scaled=True), CFG)[2] is None


def test_a_norm_that_is_not_finite_under_a_loss_scale_is_no_spike():
    steps = replace(numbers([1.0] * 9, [1.0] * 8 + [math.inf], 9), scaled=True)
    health, spikes, _ = after_steps(Health(), steps, CFG)
    assert (health.spikes, spikes) == (0, {})


def test_a_limit_that_was_lowered_in_the_middle_of_bad_steps_holds():
    steps = numbers([math.nan], [math.nan], 7)
    assert after_steps(Health(bad_in_a_row=2), steps, CFG)[2] == 0


def test_a_commit_from_before_the_guards_loads():
    plain = TrainState(step=3).as_json()
    del plain["health"]
    assert TrainState.from_json(plain) == TrainState(step=3)


def said_of(mib_at, last, every=100):
    watch = MemoryWatch(growth_mib=10.0)
    return [
        line
        for step in range(every, last, every)
        for line in watch(step, torch.tensor([[500.0, 0.0], [500.0, mib_at(step)]]))
    ]


def test_memory_that_grows_in_every_window_is_said_once():
    """Of four whole windows: their least is at their first steps, 100, 1100, 2100 and 3100."""
    [line] = said_of(lambda step: step / 50, 20 * WINDOW)
    assert line == "GPU memory of rank 1 keeps growing: from 2 to 62 MiB in 3000 steps"


@pytest.mark.parametrize(
    "mib_at",
    [
        lambda step: min(step, 900),  # warm-up
        lambda step: 200 * (step > 3000) + 300 * (step > 5000),  # the first evaluation, the first save
        lambda step: step % 1700,  # caches that are emptied
        lambda step: step / 120,  # less than the limit
    ],
)
def test_memory_that_grows_otherwise_is_not_said(mib_at):
    assert said_of(mib_at, 20 * WINDOW) == []


def test_steps_after_a_jump_take_later_samples():
    mixture = Mixture(0, batches=(Batches(0, 0, 8), Batches(10, 80, 16)))
    jumped = mixture.jumped(step=20, sample=500)
    assert [jumped.samples_of(step).start for step in (1, 11, 20, 21, 22)] == [0, 80, 224, 500, 516]
    assert jumped.jumped(step=20, sample=900).batches == (*mixture.batches, Batches(20, 900, 16))


def test_skipping_spikes_is_refused_where_the_kernel_cannot(dataset, device, tmp_path):
    run = debug_run(dataset, tmp_path, "fp16.enabled=true", 'megagpt.guards.spikes={"action": "skip"}')
    with pytest.raises(UserError, match=r"spikes\.action='skip' does not work with fp16"):
        check_skipping(run, device)


@pytest.mark.process
@pytest.mark.long
def test_no_guard_fires_in_20_clean_runs_on_two_ranks(dataset, tmp_path):
    """600 steps each: spikes are judged from the 65th on, weights compared every 10, and memory in windows of 100.

    At a learning rate of 0.001, a third of the debug run's, at which losses and norms do leap, which is then said:
    RESULTS.md of faults/ has the rates of both.
    """
    done = torchrun(2, PROGRAMS / "fault_free_ranks.py", dataset, tmp_path, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    for runs in read_json(tmp_path / "results.json")["clean_runs"]:
        assert list(runs.values()) == [[600, 0, 0, 0]] * 20  # steps, spikes, skipped, bad in a row
    said = ("spike at", "has grown", "not finite")
    assert not [line for line in done.stdout.splitlines() if any(text in line for text in said)]
