"""A run goes on with other ranks, another ZeRO stage, dtype, micro-batch or offload (program: elastic_ranks.py)."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from threading import Event, Thread

import numpy as np
import processes
import pytest
import torch
from elastic_ranks import CHAIN, RAMP, STEPS_EACH, opened, options, part_of_the_chain, whole_state
from hypothesis import given
from hypothesis import strategies as st
from support import PROGRAMS, ROOT, debug_run, environment, metric, torchrun

from megagpt.checkpoint import load
from megagpt.checkpoint.commit import committed
from megagpt.checkpoint.rng import rng_state, seed_all, seed_from
from megagpt.checkpoint.run_samples import open_run
from megagpt.engine.reshard import FlatTensor, ParamSlice, _copies
from megagpt.engine.state_files import consolidated_weights
from megagpt.errors import UserError
from megagpt.guards.memory_growth import memory_mib
from megagpt.train import session
from megagpt.train.preflight import prepare
from megagpt.train.session import Session
from megagpt.train.trainer import train

PROGRAM = PROGRAMS / "elastic_ranks.py"
WITHIN = 1e-4  # nats, as between ranks and stages in test_distributed: sums in another order, nothing else differs


def launch(n_ranks: int, *args: str | Path) -> str:
    done = torchrun(n_ranks, PROGRAM, *args)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
@processes.start_here
def chain(dataset, device, tmp_path_factory) -> Path:
    """The folder of a run of 16 steps, of which every four had other ranks, another stage and micro-batch."""
    folder = tmp_path_factory.mktemp("chain")
    for part, (n_ranks, _, _) in enumerate(CHAIN):
        if n_ranks == 1:
            part_of_the_chain(dataset, folder, part)
        else:
            output = launch(n_ranks, dataset, folder, str(part), "fp32" if n_ranks == 2 else "")
            (folder / f"output.{part}").write_text(output)
            shutil.copytree(folder / "run", folder / f"by {n_ranks} ranks")
    return folder


def test_over_other_ranks_and_stages_every_sample_is_taken_once(chain):
    """Told by its tokens: the rows that all ranks took are those of samples 0 to 99, in each step its own."""
    data = open_run(chain / "run")
    expected = [[t for span in data.spans(i) for t in span.tokens.tolist()] for i in range(4 * 7 + 8 * 9)]
    assert len(set(map(tuple, expected))) == len(expected)
    for part, (n_ranks, _, _) in enumerate(CHAIN):
        taken = [row for r in range(n_ranks) for row in np.load(chain / f"rows.{part}.{r}.npy").tolist()]
        first, after = (data.mixture.samples_of(STEPS_EACH * p + 1).start for p in (part, part + 1))
        assert after == [16, 28 + 8, 28 + 40, 28 + 72][part]
        assert sorted(taken) == sorted(expected[first:after])


def test_over_other_ranks_and_stages_losses_and_rates_are_a_straight_runs(chain, dataset, device, tmp_path):
    train(debug_run(dataset, tmp_path / "straight", *options(1, *RAMP)), device)
    straight, found = tmp_path / "straight", chain / "run"
    assert metric(found, "optim/lr") == metric(straight, "optim/lr")
    for name in ("train/loss", "optim/grad_norm"):
        assert metric(found, name).keys() == set(range(1, 17))
        assert metric(found, name) == pytest.approx(metric(straight, name), abs=WITHIN), name


def test_what_changed_is_said_in_one_line(chain):
    for part, change in {1: "ranks 1 -> 2, ZeRO stage 1 -> 3", 2: "ranks 2 -> 4, ZeRO stage 3 -> 0"}.items():
        assert f"({change})" in (chain / f"output.{part}").read_text()


def test_every_ordered_pair_of_stages_takes_over_every_bit(chain):
    """Weights and both moments of each parameter on two ranks, against what DeepSpeed loads of its own files."""
    assert json.loads((chain / "pairs.fp32.json").read_text()) == [[], []]


@pytest.mark.process
@pytest.mark.long
def test_every_ordered_pair_of_stages_in_bf16_takes_over_every_bit(dataset, tmp_path):
    """The fp32 weights and moments, and what the model computes with is those weights rounded."""
    launch(2, dataset, tmp_path, "", "bf16")
    assert json.loads((tmp_path / "pairs.bf16.json").read_text()) == [[], []]


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 0)])
def test_sharing_out_holds_no_second_copy_of_the_state(dataset, device, tmp_path, monkeypatch, before, after):
    """Old files are mapped, and what is read of them goes where it stays: 16 MiB of 150 are allowed beside."""
    size = ['megagpt.model={"n_layer": 4, "n_head": 4, "n_embd": 512, "seq_len": 32}', "megagpt.data.val_tokens=32"]
    train(debug_run(dataset, tmp_path / "run", *options(before, *size)), device, stop_at=1)
    plan = prepare(debug_run(dataset, tmp_path / "run", *options(after, *size)), device, fresh=False)
    held, done, original = [], Event(), load.load_reshaped

    def sample() -> None:
        while not done.is_set():
            held.append(memory_mib(device)[0].item())

    def watched(*args, **kw) -> None:
        sampler = Thread(target=sample)
        held.append(memory_mib(device)[0].item())
        sampler.start()
        original(*args, **kw)
        done.set()
        sampler.join()
        held.append(memory_mib(device)[0].item())

    monkeypatch.setattr(load, "load_reshaped", watched)
    Session(plan, device)
    assert len(held) > 10
    assert max(held) < max(held[0], held[-1]) + 16


@pytest.fixture
def saved(dataset, device, tmp_path) -> Path:
    train(debug_run(dataset, tmp_path / "run", *options(1)), device, stop_at=2)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "other",
    [
        ["zero_optimization.stage=2", "zero_optimization.offload_optimizer.device=cpu"],
        ["zero_optimization.stage=3", "zero_optimization.offload_param.device=cpu"],
        ["zero_optimization.stage=3", "zero_optimization.sub_group_size=3000"],
        ["zero_optimization.stage=2", "zero_optimization.round_robin_gradients=true"],
        ["zero_optimization.stage=0", "bf16.enabled=true"],
        pytest.param(["bf16.enabled=true", "data_types.grad_accum_dtype=fp32"], marks=pytest.mark.long),
    ],
    ids=lambda options: " ".join(option.split(".")[-1] for option in options),
)
def test_another_dtype_offload_or_layout_and_back_loses_no_bit(saved, dataset, device, other):
    """There and back without a step between: in bf16 the fp32 weights are kept beside."""
    expected = whole_state(opened(dataset, saved, *options(1)))
    there = opened(dataset, saved, *options(1, *other))
    for name, state in whole_state(there).items():
        assert all(torch.equal(a, b) for a, b in zip(state, expected[name], strict=True)), name
    train(debug_run(dataset, saved, *options(1, *other)), device, stop_at=3)
    after = whole_state(opened(dataset, saved, *options(1, *other)))
    back = whole_state(opened(dataset, saved, *options(1)))
    for name, state in after.items():
        assert all(torch.equal(a, b) for a, b in zip(state, back[name], strict=True)), name


@pytest.mark.process
def test_killed_in_the_middle_nothing_is_half_done_and_the_next_start_does_it(saved, dataset, device, tmp_path):
    shutil.copytree(saved, tmp_path / "undisturbed")
    other = options(3)
    train(debug_run(dataset, tmp_path / "undisturbed", *other), device, stop_at=4)
    before = {path: path.read_bytes() for path in (saved / "checkpoints").rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, PROGRAMS / "killed_resharding.py", dataset, saved, *other],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert {path: path.read_bytes() for path in (saved / "checkpoints").rglob("*") if path.is_file()} == before
    train(debug_run(dataset, saved, *other), device, stop_at=4)
    assert metric(saved, "train/loss") == metric(tmp_path / "undisturbed", "train/loss")


@pytest.fixture
@processes.start_here
def by_two(chain, tmp_path) -> Path:
    """The chained run when two ranks had just saved step 8."""
    return Path(shutil.copytree(chain / "by 2 ranks", tmp_path / "by_two"))


def test_damage_in_a_file_of_a_rank_that_is_no_more_is_found(by_two, dataset, capsys):
    (victim,) = committed(by_two)[-1].glob("zero_pp_rank_1_*optim_states.pt")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    opened(dataset, by_two)
    assert f"checkpoint skipped: {victim} is damaged" in (out := capsys.readouterr().out)
    assert f"resuming from {committed(by_two)[-1]}" in out


def test_generators_go_on_with_as_many_ranks_and_are_seeded_anew_with_others(saved, by_two, dataset, capsys):
    opened(dataset, saved, *options(3))
    assert json.loads(json.dumps(rng_state())) == json.loads((committed(saved)[-1] / "rng.0.json").read_text())
    assert "reseeded" not in capsys.readouterr().out
    opened(dataset, by_two)
    out = capsys.readouterr().out
    assert "(ranks 2 -> 1, ZeRO stage 3 -> 1)" in out
    assert "RNG state not restored (other number of ranks): reseeded from (megagpt.seed, step, rank)" in out
    found = torch.get_rng_state()
    seed_all(seed_from(debug_run(dataset, by_two).megagpt.seed, 8, 0))
    assert torch.equal(found, torch.get_rng_state())


def test_the_best_weights_are_put_back_from_a_step_of_another_stage(dataset, device, tmp_path, monkeypatch):
    engines, build = [], session.build_engine
    monkeypatch.setattr(session, "build_engine", lambda *args, **kw: engines.append(build(*args, **kw)) or engines[-1])
    stops = [
        'megagpt.every={"log": 1, "eval": 2, "save": 0}',
        'megagpt.early_stopping={"patience": 2, "min_delta": 100}',
    ]
    train(debug_run(dataset, tmp_path / "run", *options(3, *stops)), device, stop_at=3)
    state = train(debug_run(dataset, tmp_path / "run", *options(2, *stops)), device)
    assert (state.step, state.stopper.best_step, state.stopper.stopped) == (6, 2, True)
    expected = consolidated_weights(tmp_path / "run" / "checkpoints" / "step_00000002")
    for name, p in engines[-1].module.named_parameters():
        assert torch.equal(p, expected[name]), name


def test_what_lies_on_nvme_is_refused(saved, dataset):
    nvme = ["zero_optimization.offload_optimizer.device=nvme", "zero_optimization.offload_optimizer.nvme_path=/tmp"]
    with pytest.raises(UserError, match=r"ZeRO stage 1 -> 3, .*offload_optimizer\.device is nvme"):
        opened(dataset, saved, *options(3, *nvme))


def test_a_step_that_lacks_a_part_of_a_parameter_is_refused(saved, dataset):
    """As another DeepSpeed might lay it out: a file that is whole, but does not say where one parameter lies."""
    from megagpt.engine import reshard as elastic

    original = elastic._mapped

    def lacking(step_dir, pattern):
        found = original(step_dir, pattern)
        if "optimizer_state_dict" in found:
            del found["optimizer_state_dict"]["param_slice_mappings"][0]["wte.weight"]
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic, "_mapped", lacking)
        with pytest.raises(UserError, match=r"lacks 24576 values of wte\.weight; start the run as it was saved"):
            opened(dataset, saved, *options(3))


def part_of(cuts: list[tuple[str, int, int]], values: dict[str, torch.Tensor] | None) -> FlatTensor:
    """A part that holds these cuts (name, start, numel) one after another, of the values or of none yet."""
    stretches, offset = [], 0
    for name, start, numel in cuts:
        stretches.append(ParamSlice(name, start, numel, offset))
        offset += numel + 1  # padding
    flat = torch.full((offset,), -1.0)
    for s in stretches if values else []:
        flat[s.offset : s.offset + s.numel] = values[s.name][s.start : s.start + s.numel]
    added = (0, 1000, 2000) if values else (0, 0, 0)
    kept = zip(("weights", "exp_avg", "exp_avg_sq"), added, strict=True)
    return FlatTensor({name: flat + more for name, more in kept}, stretches)


SIZE = 12
CUT = st.integers(0, SIZE).flatmap(lambda i: st.tuples(st.sampled_from("ab"), st.just(i), st.integers(0, SIZE - i)))


@given(st.lists(st.lists(CUT, max_size=5), max_size=4), st.lists(CUT, max_size=5))
def test_what_a_rank_keeps_is_taken_once_wherever_it_lies_or_the_step_is_refused(old_cuts, own_cuts):
    """However the old files overlap, and in whichever order they come; what is missing is what none of them has."""
    values = {name: torch.arange(SIZE) + 100.0 * n for n, name in enumerate("ab")}
    there = {(name, i) for cuts in old_cuts for name, start, numel in cuts for i in range(start, start + numel)}
    holes = [[(n, i) for i in range(s, s + k) if (n, i) not in there] for n, s, k in own_cuts]
    old, own = [part_of(cuts, values) for cuts in old_cuts], part_of(own_cuts, None)
    if first := next(filter(None, holes), None):
        with pytest.raises(UserError, match=f"lacks {len(first)} values of {first[0][0]};"):
            _copies([own], old, Path("step"))
        return
    copies = _copies([own], old, Path("step"))
    assert sum(len(to) for to, _ in copies) == 3 * sum(numel for _, _, numel in own_cuts)
    for to, value in copies:
        to.copy_(value)
    expected = part_of(own_cuts, values)
    for s in own.slices:
        for mine, theirs in zip(own.values.values(), expected.values.values(), strict=True):
            assert torch.equal(mine[s.offset : s.offset + s.numel], theirs[s.offset : s.offset + s.numel])
