"""What two real ranks did (tests/programs/two_ranks.py), and what one rank does with the same run files."""

import json
import socket
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from models_of_others import write_gpt2
from resume_matrix import COVERING, LAST
from support import EMA, LR_SCALE, MUON, OTHER_BLOCKS, PROGRAMS, debug_run, metric, scenarios, torchrun, write_corpus

from data_tools.build import build
from data_tools.config import BuildConfig
from megagpt.__main__ import main
from megagpt.checkpoint.load import load_model
from megagpt.data.loader import open_data
from megagpt.distributed.process_group import own_device
from megagpt.errors import OwnRankError
from megagpt.evaluation.tasks import open_tasks, run_tasks
from megagpt.model.gpt import GPT
from megagpt.train.evaluate import evaluate
from megagpt.train.trainer import train

WITHIN = 1e-4  # nats: reductions add in another order, nothing else differs


def equal_losses(found: dict, expected: dict) -> None:
    assert {int(step) for step in found} == set(expected) == set(range(1, 21))
    for step, loss in expected.items():
        assert found[str(step)] == pytest.approx(loss, abs=WITHIN), f"step {step}"


def import_a_model(folder: Path) -> None:
    """Import what transformers has made, and build data with its tokenizer."""
    config = write_gpt2(folder / "theirs", std=0.05).config
    assert main(["import", str(folder / "theirs"), str(folder / "model")]) == 0
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "seq_len": config.n_positions}
    (folder / "shape.json").write_text(json.dumps(shape))
    corpus = write_corpus(folder / "corpus.jsonl", 100)
    build([corpus], folder / "data", BuildConfig(tokenizer=folder / "model", val_fraction=0.3, workers=1))


@pytest.fixture(scope="module")
@processes.start_here
def two_ranks(dataset, tmp_path_factory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("two_ranks")
    import_a_model(dataset.parent / "imported")
    return scenarios("two_ranks.py", dataset, folder) | {"folder": [folder]}


@pytest.fixture(scope="module")
def run_on_one_rank(dataset, device, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("one_rank") / "run"
    train(debug_run(dataset, out_dir, "megagpt.noise_scale=true"), device)
    return out_dir


@pytest.fixture(scope="module")
def one_rank(run_on_one_rank) -> dict[int, float]:
    return metric(run_on_one_rank, "train/loss")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_on_two_ranks_equals_stage_1_on_one(two_ranks, one_rank, stage):
    equal_losses(two_ranks["losses_of_every_stage"][0][f"stage{stage}"], one_rank)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_noise_scale_of_two_ranks_is_that_of_two_micro_batches_on_one(two_ranks, run_on_one_rank, stage):
    """At the first steps: where the mean gradient is about the noise, rounding decides on the ratio."""
    run = two_ranks["folder"][0] / "losses_of_every_stage" / f"stage{stage}"
    found, expected = (metric(out_dir, "optim/noise_scale") for out_dir in (run, run_on_one_rank))
    assert set(range(1, 6)) <= set(found)
    for step in range(1, 6):
        assert found[step] == pytest.approx(expected[step], rel=0.01)


@pytest.fixture(scope="module")
def other_blocks(dataset, device, tmp_path_factory) -> dict[int, float]:
    out_dir = tmp_path_factory.mktemp("other_blocks") / "run"
    train(debug_run(dataset, out_dir, *OTHER_BLOCKS, LR_SCALE), device)
    return metric(out_dir, "train/loss")


@pytest.fixture(scope="module")
def muon_run_on_one_rank(dataset, device, tmp_path_factory) -> Path:
    out_dir = tmp_path_factory.mktemp("muon") / "run"
    train(debug_run(dataset, out_dir, *MUON, EMA), device)
    return out_dir


@pytest.fixture(scope="module")
def muon_on_one_rank(muon_run_on_one_rank) -> dict[int, float]:
    return metric(muon_run_on_one_rank, "train/loss")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_other_blocks_and_rates_apart_train_at_every_stage_on_two_ranks_what_one_rank_trains(
    two_ranks, other_blocks, stage
):
    equal_losses(two_ranks["losses_of_every_stage"][0][f"other blocks{stage}"], other_blocks)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_on_two_ranks_at_every_zero_stage_equals_stage_1_on_one(two_ranks, muon_on_one_rank, stage):
    equal_losses(two_ranks["muon_at_every_stage"][0][f"stage{stage}"], muon_on_one_rank)


@pytest.mark.parametrize("began", ["cut", "in turn"])
def test_muon_and_averages_continue_on_one_rank_at_stage_0_what_two_began(
    two_ranks, muon_run_on_one_rank, dataset, device, began
):
    """At stage 3, or at stage 2 with parameters distributed in turn, whose order DeepSpeed records wrongly."""
    out_dir = two_ranks["folder"][0] / "muon_at_every_stage" / began
    assert list(metric(out_dir, "train/loss")) == list(range(1, 11))
    train(debug_run(dataset, out_dir, *MUON, EMA, "zero_optimization.stage=0"), device)
    losses = metric(muon_run_on_one_rank, "train/loss")
    equal_losses({str(k): v for k, v in metric(out_dir, "train/loss").items()}, losses)
    equal_averages(out_dir, muon_run_on_one_rank)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_averages_on_two_ranks_at_every_zero_stage_are_those_of_one(two_ranks, muon_run_on_one_rank, stage):
    equal_averages(two_ranks["folder"][0] / "muon_at_every_stage" / f"stage{stage}", muon_run_on_one_rank)


def equal_averages(run: Path, other: Path) -> None:
    (found, last), (expected, _) = (
        [load_model(out_dir, torch.device("cpu"), ema=ema).model.state_dict() for ema in (True, False)]
        for out_dir in (run, other)
    )
    for name, average in found.items():
        assert torch.allclose(average, expected[name], rtol=0, atol=1e-4), name
    assert any(not torch.allclose(average, last[name], rtol=0, atol=1e-3) for name, average in found.items())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_on_two_ranks_begins_with_another_runs_weights(two_ranks, stage):
    assert two_ranks["weights_of_another_run"][0][f"stage{stage}"] < 1e-6


def test_a_model_of_transformers_trains_further_on_two_ranks_alike_at_stages_0_and_3(two_ranks):
    stage0, stage3 = (two_ranks["weights_made_by_transformers"][0][f"stage{stage}"] for stage in (0, 3))
    equal_losses(stage3, {int(step): loss for step, loss in stage0.items()})
    assert stage0["20"] < stage0["1"] - 0.1


def test_and_after_steps_at_stage_3_transformers_loads_its_export(two_ranks, tmp_path, capsys):
    """The command itself compares 10,000 lines, and logits to within 1e-4, before the folder appears."""
    run = two_ranks["folder"][0] / "weights_made_by_transformers" / "stage3"
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert "10,000 of 10,000 lines have the same token ids" in capsys.readouterr().out
    with (tmp_path / "out" / "model.safetensors").open("rb") as file:
        assert b'"transformer.h.1.mlp.c_proj.weight":{"dtype":"F32","shape":[128,32]' in file.read(10_000)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bucket_smaller_than_a_parameter_changes_no_loss(two_ranks, one_rank, stage):
    """Nor does sending it while backward fills the next one."""
    equal_losses(two_ranks["losses_of_every_stage"][0][f"bucket{stage}"], one_rank)


def test_optimizer_offload_changes_no_loss(two_ranks, one_rank):
    equal_losses(two_ranks["losses_of_every_stage"][0]["offload"], one_rank)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_zero_stage_equals_stage_1_on_one_rank(dataset, device, one_rank, tmp_path, stage):
    train(debug_run(dataset, tmp_path / "run", f"zero_optimization.stage={stage}"), device)
    equal_losses({str(k): v for k, v in metric(tmp_path / "run", "train/loss").items()}, one_rank)


@pytest.mark.parametrize("stage", [0, 3])
def test_every_zero_stage_in_bf16_learns_as_stage_1_does(dataset, device, tmp_path, stage):
    """The first losses agree to 1/256 of a nat, as activations have 8 bits; one step too many in Adam's count shows."""
    few = ["bf16.enabled=true", "megagpt.schedule.max_steps=5"]
    for n in (1, stage):
        train(debug_run(dataset, tmp_path / f"stage{n}", f"zero_optimization.stage={n}", *few), device)
    losses = [metric(tmp_path / f"stage{n}", "train/loss") for n in (1, stage)]
    assert losses[0] == pytest.approx(losses[1], abs=2**-8)


@pytest.mark.parametrize("stage", ["stage1", "stage3"])
def test_a_signal_to_one_rank_stops_both_at_one_step_and_resuming_is_bit_exact(two_ranks, stage):
    """With dropout (each rank's own random stream), recompute and accumulation, in the middle of warmup."""
    ranks = [found[stage] for found in two_ranks["stopped_by_a_signal_to_one_rank"]]
    assert [found["cut_at"] for found in ranks] == [8, 8]  # the vote cast after step 7 is read after step 8
    for found in ranks:
        straight, resumed = found["states"]
        assert straight == resumed
    straight, cut = ranks[0]["losses"]
    assert straight == cut
    assert set(map(int, cut)) == set(range(1, 21))
    assert ranks[0]["weights"][0] == ranks[0]["weights"][1]


@pytest.mark.parametrize("case", map(str, COVERING))
def test_a_run_that_was_cut_equals_a_straight_one_to_the_last_bit_on_both_ranks(two_ranks, case):
    """Eight of 128 combinations of stage, dtype, dropout, accumulation, optimizer and cut: every two settings meet."""
    for found in (ranks[case] for ranks in two_ranks["straight_and_cut"]):
        assert found["differs"] == []
        assert found["straight"] == found["cut"]
        assert len(found["cut"]) == LAST


def test_without_its_generators_a_resume_is_another_run_on_both_ranks(two_ranks):
    """The control of the test above, on each rank by itself, from the step after the cut."""
    for found in (ranks["control"] for ranks in two_ranks["straight_and_cut"]):
        assert found["differs"]
        assert [a == b for a, b in zip(found["straight"], found["cut"], strict=True)] == [True] * 2 + [False] * 5


@pytest.mark.process
@pytest.mark.long
def test_all_64_combinations_resume_exactly_and_none_with_dropout_without_its_generators(dataset, tmp_path):
    done = torchrun(2, PROGRAMS / "resume_matrix.py", dataset, tmp_path, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "128 of 128 as they should be"


def test_overfitting_stops_by_itself_on_both_ranks_with_the_best_weights(two_ranks):
    first, second = two_ranks["overfitting"]
    assert first["state"] == second["state"]
    stopper, step = first["state"]["stopper"], first["state"]["step"]
    assert stopper["stopped"]
    assert step < 1000
    assert step - stopper["best_step"] >= 12 * 20  # patience x every.eval; small gains count as none
    val, losses = first["val"], first["train"]
    assert val[str(step)] > stopper["best"] + 0.02  # it turned up
    assert losses[str(step)] < stopper["best"] - 0.05  # while training went on falling: memorized
    assert stopper["gap"]["last"] == pytest.approx(val[str(step)] - losses[str(step)], rel=1e-9)
    assert first["best_step"] == f"step_{stopper['best_step']:08d}"
    for found in (first, second):
        in_memory, on_disk = found["weights"]
        assert in_memory == on_disk


def test_a_resume_in_the_middle_of_patience_stops_at_the_same_step(two_ranks):
    for found in two_ranks["overfitting"]:
        assert 0 < found["cut"]["stopper"]["bad_evals"] < 12
        assert found["cut"]["stopper"]["gap"]["share_sum"] == 11  # steps since the last evaluation
        assert found["resumed"] == found["state"]


def test_a_finished_run_started_again_changes_nothing(two_ranks):
    for found in two_ranks["overfitting"]:
        assert found["again"] == found["state"]


@pytest.mark.parametrize("beside_training", ["false", "true"])
def test_a_full_disk_on_one_rank_is_one_message_on_both_and_the_step_before_stands(two_ranks, beside_training):
    for found in (ranks[beside_training] for ranks in two_ranks["a_full_disk_on_one_rank"]):
        assert "step_00000010 could not be saved: [Errno 27] File too large" in found["message"]
        assert found["message"].endswith("the one before it is intact (on rank 1)")
        assert found["left"] == ["step_00000005"]
        assert found["then"] == 20


def test_a_signal_during_a_save_beside_training_lets_it_end_and_commits_one_step_more(two_ranks):
    for found in two_ranks["a_signal_during_a_save"]:
        assert found["while in flight"] == []
        assert found["stopped at"] == 8  # the vote cast after step 7 is read after step 8
        assert found["committed"] == ["step_00000005", "step_00000008"]
        assert found["then"] == 20


def test_tasks_on_two_ranks_while_training_give_what_one_rank_gives_of_the_checkpoint(two_ranks):
    pytest.importorskip("lm_eval", reason="lm-eval, of the extra `tasks`, is not installed")
    one, other = two_ranks["tasks_while_training"]
    assert one == other
    assert {name.split("/")[1] for name in one} == {"tiny_choice", "tiny_texts", "tiny_generated"}
    folder = two_ranks["folder"][0]
    tasks, run = open_tasks([str(folder / "tasks")]), folder / "tasks_while_training" / "run"
    for step in (2, 4):
        model, tokenizer, *_ = load_model(run / f"checkpoints/step_{step:08}", own_device())
        found = run_tasks(tasks, model, tokenizer, micro_batch=5).as_metrics()
        # other batches: an exponential of some nats for each letter of a word
        assert {name: curve[str(step)] for name, curve in one.items()} == pytest.approx(found, rel=1e-4)


def test_ranks_divide_batches_and_both_have_all_results_in_order(two_ranks):
    assert two_ranks["batches_over_ranks"] == [[[0, 0], [1, 1], [2, 0], [3, 1], [4, 0]]] * 2


def test_a_mistake_that_one_rank_sees_is_raised_on_all(two_ranks):
    assert two_ranks["a_mistake_that_one_rank_alone_sees"] == ["no such file (on rank 1)"] * 2


def test_a_rank_that_the_other_waits_for_is_named(two_ranks):
    """Late with its data; tests/cluster/test_slow_host.py throttles a host."""
    said, of_rank_1 = two_ranks["a_rank_late_with_its_data"]
    assert said.count("straggler: rank 1 on") == 1
    assert f"| waits for {socket.gethostname()} |" in said
    assert of_rank_1 == ""


def test_the_cpu_is_taken_where_deepspeed_is_told_to(monkeypatch):
    """On a machine with one GPU, where a second rank would find none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    second = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (second | {"DS_ACCELERATOR": "cpu"}).items():
        monkeypatch.setenv(name, value)
    assert own_device() == torch.device("cpu")
    monkeypatch.delenv("DS_ACCELERATOR")
    with pytest.raises(OwnRankError, match=r"2 ranks need 2 GPUs, but .* shows 1"):
        own_device()


def test_a_vote_to_stop_reaches_every_rank_at_the_same_boundary(two_ranks):
    assert two_ranks["votes"] == [[False, False, False, True, True, True]] * 2


@pytest.mark.parametrize(("which", "tokens"), [(0, 320), (1, 64)])  # one window: the second rank has none
def test_validation_loss_is_weighted_by_token_whatever_the_ranks(two_ranks, dataset, tmp_path, which, tokens):
    run = debug_run(dataset, tmp_path, f"megagpt.data.val_tokens={tokens}")
    sets, datasets = open_data(run.megagpt.data, run.megagpt.model.seq_len)
    torch.manual_seed(0)
    model = GPT(run.megagpt.model, 384)
    token_bytes = torch.from_numpy(datasets[0].tokenizer().token_bytes())
    expected = evaluate(model, sets[""].windows, token_bytes, micro_batch=5)
    for found in (ranks[which] for ranks in two_ranks["validation_loss"]):
        assert (found["tokens"], found["bytes"]) == (tokens, expected.bytes)
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
