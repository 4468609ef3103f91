"""`megagpt plan`: its estimates against the memory and traffic of real ranks, and what it prints."""

import json
import re
from itertools import pairwise, product
from pathlib import Path

import processes
import pytest
from plan_ranks import MEMORY, TRAFFIC, VOCAB, run_and_batch
from support import PROGRAMS, ROOT, read_json, torchrun

from megagpt.__main__ import main
from megagpt.config.batch import batch_plan
from megagpt.config.run_file import RunConfig, load_run_config, parse_run
from megagpt.model.flops import flops_per_token, n_params
from megagpt.planner.communication import Traffic, traffic
from megagpt.planner.compute import muon_flops
from megagpt.planner.estimate import OVERLAP, changes, fastest, machine, setting, settings
from megagpt.planner.memory import memory
from megagpt.planner.report import assumptions
from megagpt.planner.step_time import CONTENTION


def on_ranks(n_ranks, measured, folder):
    out = folder / "found.json"
    done = torchrun(n_ranks, PROGRAMS / "plan_ranks.py", out, measured)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return read_json(out)


@pytest.fixture(scope="module")
@processes.start_here
def found(tmp_path_factory):
    return on_ranks(2, "memory", tmp_path_factory.mktemp("plan"))


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_within_a_tenth_of_what_lives(found, tmp_path, name):
    """The plan counts what grows with model and batch, but not what is small in each: masks, norms, copies."""
    run, batch = run_and_batch(tmp_path, MEMORY[name], 2)
    assert memory(run, batch, VOCAB, on_cpu=True).total == pytest.approx(found[name], rel=0.1)


def as_counted(sent: Traffic) -> dict[str, int]:
    """The traffic as DeepSpeed's comms logger counts it: the tensor that a rank hands in, for a gather its part."""
    counted = {
        "all_reduce": sent.all_reduce,
        "reduce_scatter_tensor": sent.reduce_scatter,
        "all_gather_into_tensor": sent.all_gather // sent.world_size + sent.regathered // sent.secondary,
        "all_to_all_single": sent.all_to_all,
    }
    return {name: size for name, size in counted.items() if size}


def assert_counted(n_ranks, folder):
    found = on_ranks(n_ranks, "traffic", folder)
    for name, options in TRAFFIC.items():
        run, batch = run_and_batch(folder, options, n_ranks)
        counted = {op: size for op, size in found[name].items() if size}
        assert counted == as_counted(traffic(run, batch, VOCAB)), name


@pytest.mark.process
def test_every_byte_that_deepspeed_sends_between_two_ranks_is_predicted(tmp_path):
    """Exactly, but for its flags and norms of at most 8 bytes each."""
    assert_counted(2, tmp_path)


@pytest.mark.process
@pytest.mark.long
def test_every_byte_that_deepspeed_sends_between_four_ranks_is_predicted(tmp_path):
    assert_counted(4, tmp_path)


def test_bytes_on_the_wire_of_a_ring():
    """Four ranks reduce 80 bytes: each sends three quarters of them twice; the other collectives once."""
    assert Traffic(4, all_reduce=80, reduce_scatter=0, all_gather=0, all_to_all=0).wire == 120
    assert Traffic(4, all_reduce=0, reduce_scatter=80, all_gather=40, all_to_all=0).wire == 90
    assert Traffic(4, all_reduce=0, reduce_scatter=0, all_gather=0, all_to_all=80, shared_by=2).wire == 40


def test_python_of_stage_3_bounds_a_step_on_thousands_of_ranks_and_hpz_shortens_it(gpt2):
    """Its loops grow with tensors times ranks, so that more ranks make a step of one micro-batch longer."""
    found = {}
    for ranks in (64, 1024, 4096):
        sizes = [f"train_batch_size={8 * ranks}", "train_micro_batch_size_per_gpu=8"]
        run = parse_run(gpt2.as_json(), [*sizes, "zero_optimization.stage=3"])
        found[ranks] = setting(run, machine("H100", ranks, None), 50304)
    large, tensors = 4 * 48 + 2, 12 * 48 + 4  # matrices of blocks and two tables; with biases and norms
    assert found[64].time.total > found[64].time.loops
    assert found[4096].time.total == found[4096].time.loops == pytest.approx(4 * found[1024].time.loops, rel=0.01)
    assert found[4096].time.loops == pytest.approx(4096 * (2.3e-6 * 2 * large + 2.2e-6 * tensors), rel=0.25)
    hpz = setting(run.changed("zero_optimization.zero_hpz_partition_size=8"), machine("H100", 4096, None), 50304)
    assert hpz.time.loops < found[4096].time.loops
    assert hpz.time.wire < found[4096].time.wire
    assert hpz.memory.weights > found[4096].memory.weights


@pytest.fixture
def gpt2(tmp_path):
    """The run file of 1.5 billion parameters, without a dataset: GPT-2's vocabulary is used."""
    return load_run_config(ROOT / "ds_configs" / "gpt2_1558m.json", [f"megagpt.data.train.0.path={tmp_path}"])


def variant(run: RunConfig, stage: int, offload: str, policy: str, micro_batch: int) -> RunConfig:
    return run.changed(*changes(run, stage, offload, policy, micro_batch))


def test_states_of_mixed_precision_on_one_gpu_are_20_bytes_for_each_parameter(gpt2):
    """2 weights, 12 Adam, 2 gradients, and 4 as Adam reads them, with so few tokens that nothing else is as large."""
    run = variant(gpt2, stage=0, offload="none", policy="full", micro_batch=1)
    used = memory(run, batch_plan(run.deepspeed, 1), 50304)
    assert (used.when, used.total) == ("update", 20 * n_params(run.megagpt.model, 50304))


def test_muon_is_counted_in_compute_traffic_and_memory(gpt2):
    """For blocks of width C 300 C^3 FLOPs each, on every rank at stage 0; at stage 3 a rank's part, out and back."""
    C, L, ranks = 1600, 48, 8
    assert muon_flops(gpt2.megagpt.model) == L * 300 * C**3
    found = {}
    for kind, stage in product(("AdamW", "Muon"), (0, 1, 3)):
        run = parse_run(gpt2.as_json(), [f"optimizer.type={kind}", f"zero_optimization.stage={stage}"])
        found[kind, stage] = setting(run, machine("H100", ranks, "50", 0.4), 50304)
    more = {stage: found["Muon", stage].time.compute - found["AdamW", stage].time.compute for stage in (0, 1, 3)}
    assert more[1] == pytest.approx(L * 300 * C**3 / (ranks * 989e12 * 0.4))
    assert more[0] == pytest.approx(ranks * more[1])
    assert more[3] == pytest.approx(more[1])
    sent = {stage: found["Muon", stage].traffic.orthogonalized for stage in (0, 1, 3)}
    assert sent == {0: 0, 1: 2 * 2 * 4 * C**2, 3: 2 * 2 * L * 12 * C**2 / ranks}
    less = found["AdamW", 3].memory.optimizer - found["Muon", 3].memory.optimizer
    assert less == 4 * L * 12 * C**2 / ranks


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "ds_configs").glob("gpt2_*.json")))
def test_every_setting_is_what_its_keys_say(name, tmp_path):
    """Also where the run file offloads, recomputes or fixes what the setting does not."""
    run = load_run_config(ROOT / "ds_configs" / name, [f"megagpt.data.train.0.path={tmp_path}"])
    on = machine("NVIDIA A100-SXM4-80GB", 32, "infiniband-hdr")
    _, *found = settings(run, on, 50304)
    assert len({s.keys for s in found}) == len(found)
    for s in found:
        assert setting(parse_run(run.as_json(), s.keys), on, 50304) == s
    best = fastest(found)
    assert best is None or best.fits


def test_more_ranks_hold_less_each_and_take_less_time(gpt2):
    run = parse_run(gpt2.as_json(), ["train_batch_size=4096", "train_micro_batch_size_per_gpu=1"])
    run = variant(run, stage=3, offload="none", policy="none", micro_batch=1)
    found = [
        setting(run, machine("H100", ranks, "50" if ranks > 1 else None), 50304) for ranks in (1, 8, 64, 512, 4096)
    ]
    for fewer, more in pairwise(found):
        assert more.total < fewer.total
        assert more.time.compute < fewer.time.compute


def test_overlap_hides_gradients_behind_backward_but_not_the_weights_gathered_after_it(gpt2):
    """With a slow network backward is the limit, two thirds of the compute; with a fast one what is sent is."""
    run = parse_run(gpt2.as_json(), ["zero_optimization.overlap_comm=true", "train_micro_batch_size_per_gpu=1"])
    for stage, passes in ((1, 8), (2, 1)):
        staged = variant(run, stage, "none", "none", 8)
        slow, fast = (setting(staged, machine("H100", 8, gb), 50304) for gb in ("0.01", "450"))
        assert slow.accumulation == 8
        assert slow.time.hidden == pytest.approx((1 - CONTENTION) * slow.time.compute * 2 / 3 / passes)
        sent, calls = slow.traffic.all_reduce * 2 * 7 / 8, fast.traffic.calls.all_reduce
        hops = calls * machine("H100", 8, "450").network.tree_latency
        buckets = calls * passes / 8
        assert buckets > 8
        assert fast.time.hidden == pytest.approx((1 - CONTENTION) * (1 - 1 / buckets) * (sent / 450e9 + hops))
    assert setting(variant(run, 0, "none", "none", 8), machine("H100", 8, "0.01"), 50304).time.hidden == 0.0


def test_plan_names_overlap_comm_where_it_pays_and_the_run_file_leaves_it_open(gpt2):
    """On 12.5 GB/s between hosts it pays, at stage 1 in one host it does not, and false stays false."""
    run = parse_run(gpt2.as_json(), ["train_micro_batch_size_per_gpu=1"])
    of = {}
    for network, more in (("ethernet-100", []), (None, []), ("ethernet-100", ["zero_optimization.overlap_comm=false"])):
        on = machine("H100", 8 if network is None else 16, network)
        _, *found = settings(run.changed(*more), on, 50304)
        of[network, *more] = {(s.stage, s.micro_batch) for s in found if s.policy == "none" and OVERLAP in s.keys}
    assert {(1, 4), (2, 1)} <= of["ethernet-100",]
    assert all(stage in (1, 2) for stage, _ in of["ethernet-100",])
    assert (1, 4) not in of[None,]
    assert of["ethernet-100", "zero_optimization.overlap_comm=false"] == set()


def test_python_of_stages_1_and_2_grows_with_the_ranks_in_each_pass_that_reduces(gpt2):
    tensors = 12 * 48 + 4
    for stage, passes in ((1, 1), (2, 8)):
        run = parse_run(gpt2.as_json(), ["train_batch_size=8192", "train_micro_batch_size_per_gpu=1"])
        found = setting(variant(run, stage, "none", "none", 1), machine("H100", 1024, None), 50304)
        assert found.accumulation == 8
        assert found.time.loops == pytest.approx(passes * (30e-6 * tensors + 4.6e-6 * 1024))


def test_the_command_marks_the_run_files_setting_and_names_the_fastest(capsys):
    run_file = str(ROOT / "ds_configs" / "gpt2_124m.json")
    assert main(["plan", run_file, "--ranks", "8", "--gpu", "H200"]) == 0
    text = capsys.readouterr().out
    assert len([line for line in text.splitlines() if line.startswith("* 1 ")]) == 1
    assert "Fastest that fits: stage 0" in text
    assert main(["plan", run_file, "--ranks", "8", "--gpu", "H200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"][0]["current"]
    rate = 512 * 1024 / found["settings"][0]["seconds"] / 8
    mfu = rate * flops_per_token(load_run_config(Path(run_file)).megagpt.model, 50304) / 989e12
    assert f"{rate:,.0f} tokens a second for each GPU, mfu {mfu:.1%}" in text
    assert found["fastest"]["keys"][0] == "zero_optimization.stage=0"


def test_a_key_without_effect_is_a_warning_before_the_plan(capsys):
    assert main(["plan", str(ROOT / "ds_configs" / "gpt2_124m.json"), "aio.queue_depth=8"]) == 0
    assert capsys.readouterr().err.startswith("warning: aio.queue_depth=8 has no effect")


HPZ_OF_8 = ["zero_optimization.stage=3", "zero_optimization.zero_hpz_partition_size=8"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--gpu", "H300"], "--gpu 'H300' is not known; give --gpu-memory GIB and --tflops T of its data sheet"),
        (["--gpu", "RTX 3080 Laptop GPU"], "is not known; give --gpu-memory GIB and --tflops T"),
        (["--gpu", "cpu"], "`megagpt plan` counts GPUs alone; for a CPU, give --probe, which takes real steps, or let"),
        (["--gpu-memory", "24"], "--gpu-memory alone describes no GPU; give --tflops too, or --gpu NAME"),
        (
            ["--network", "carrier-pigeon"],
            "--network 'carrier-pigeon' is neither GB/s of each GPU, nor cards of each host",
        ),
        (["--network", "nan"], "--network 'nan' is neither GB/s"),
        (["--network", "0x25"], "--network '0x25' is neither GB/s of each GPU, nor cards of each host"),
        (
            ["--ranks", "12", *HPZ_OF_8, "train_batch_size=576"],
            "zero_hpz_partition_size=8 does not divide the number of ranks, 12; set zero_optimization.zero_",
        ),
        (["--memory", "40"], "--memory limits the steps that --probe takes; add --probe"),
        (["zero_optimization.stag=3"], "did you mean 'zero_optimization.stage'?"),
        (
            ["zero_optimization.offload_optimizer.devise=cpu"],
            "'zero_optimization.offload_optimizer.device'?",
        ),
        (["--ranks", "7"], "train_batch_size=512 is not a multiple of"),
        (
            ["zero_optimization.stage3_prefetch_bucket_size=large"],
            "prefetch_bucket_size='large' is not a number",
        ),
        (["zero_optimization.reduce_bucket_size=auto"], 'reduce_bucket_size is "auto"; write the number'),
    ],
)
def test_what_cannot_be_planned_is_one_message(options, complaint, capsys):
    assert main(["plan", str(ROOT / "ds_configs" / "gpt2_124m.json"), *options]) == 2
    assert complaint in capsys.readouterr().err


RUN_FILES = ["gpt2_124m.json", "gpt2_1558m_zero3.json", "gpt2_774m_offload.json", "demo.json"]


@pytest.mark.parametrize("options", ["--ranks 8 --gpu H100", "--gpu T4", "--gpu-memory 6 --tflops 12.5", "--ranks 32"])
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_plan_fits_a_terminal_and_begins_with_the_models_size(name, options, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no `make demo` has built a dataset, whose vocabulary would count
    batch = ["train_batch_size=512"] if name == "demo.json" else []  # its own are too few sequences for 64 ranks
    assert main(["plan", str(ROOT / "ds_configs" / name), *options.split(), *batch]) == 0
    lines = capsys.readouterr().out.splitlines()
    run = load_run_config(ROOT / "ds_configs" / name)
    assert lines[0].startswith(f"{n_params(run.megagpt.model, 50304):,} parameters: ")
    assert [line for line in lines if len(line) > 100] == []
    assert not any("0.00 days" in line for line in lines)


def test_rows_that_are_nearly_equal_are_left_out(capsys, tmp_path, monkeypatch):
    """A small model needs the same on every stage; a large one does not."""
    monkeypatch.chdir(tmp_path)
    rows = {}
    for name, ranks in (("demo_gpt2.json", "1"), ("gpt2_1558m_zero3.json", "64")):
        assert main(["plan", str(ROOT / "ds_configs" / name), "--ranks", ranks]) == 0
        lines = capsys.readouterr().out.splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("stage"))
        rows[name] = [line.split()[:2] for line in lines[first + 1 : lines.index("", first)]]
    assert rows["demo_gpt2.json"] == [["*", "1"]]
    assert [row[0] for row in rows["gpt2_1558m_zero3.json"]] == ["0", "1", "*"]


def as_written(run_file: str, options: str, capsys) -> str:
    assert main(["plan", str(ROOT / "ds_configs" / run_file), *options.split()]) == 0
    text = " ".join(capsys.readouterr().out.split())
    return text[text.index("As written: ") : text.index(" Stages with")]


def test_the_speed_says_what_it_leaves_out_of_a_small_model_and_what_does_not_fit(capsys):
    """Not of GPT-2 with 124 million parameters, whose published runs were compared, nor with a measured efficiency."""
    launches = "; launching kernels, not counted, can take most of so small a model's step"
    assert as_written("demo.json", "--gpu H100", capsys).endswith(launches)
    assert re.search(r"As written: \d+ us a step, ", as_written("debug_cpu.json", "--gpu H100", capsys))
    assert as_written("demo.json", "--gpu H100 --efficiency 0.01", capsys)[-1] == "%"
    assert as_written("gpt2_124m.json", "--gpu H100", capsys)[-1] == "%"
    small = as_written("gpt2_1558m.json", "--gpu T4", capsys)
    assert re.search(r"; does not fit: [\d.]+ of 15 GiB", small)


def test_the_plan_says_that_the_time_of_a_recompute_budget_is_not_counted(gpt2):
    told = [
        [line for line in assumptions(run, machine("H100", 8, None)) if line.startswith("recompute budget: ")]
        for run in (gpt2, gpt2.changed('megagpt.recompute={"policy": "budget", "budget": 0.5}'))
    ]
    assert (len(told[0]), len(told[1])) == (0, 1)
