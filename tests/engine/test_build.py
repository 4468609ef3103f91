"""The DeepSpeed engine on one rank; several ranks are in test_two_ranks.py."""

import gc
import json
import math
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from support import ROOT, debug_run, environment, metric
from torch.utils._python_dispatch import TorchDispatchMode

from megagpt.checkpoint.commit import committed
from megagpt.config.batch import batch_plan
from megagpt.engine.activation_checkpointing import recompute_hook
from megagpt.engine.build import build_engine
from megagpt.engine.deepspeed_config import effective_config
from megagpt.errors import UserError
from megagpt.guards.step_window import StepWindow
from megagpt.model.loss import next_token_loss, next_token_score
from megagpt.model.recompute import on_the_host
from megagpt.train.preflight import prepare
from megagpt.train.session import Session
from megagpt.train.trainer import train, train_step
from megagpt.train_state import TrainState

VOCAB = 384
POLICIES = {
    "none": [],
    "full": ['megagpt.recompute={"policy": "full"}'],
    "selective": ['megagpt.recompute={"policy": "selective"}'],
    "every 2": ['megagpt.recompute={"policy": "every_k", "k": 2}'],
    "deepspeed full": ['megagpt.recompute={"policy": "full", "kind": "deepspeed"}'],
    "deepspeed every 2": ['megagpt.recompute={"policy": "every_k", "k": 2, "kind": "deepspeed"}'],
}
SHORTCUTS = ["megagpt.model.value_residual=true", "megagpt.model.embedding_shortcut=true"]
REGULARIZED = ['megagpt.regularization={"dropout": 0.2, "attention_dropout": 0.1, "stochastic_depth": 0.5}']


@pytest.fixture
def engine_of(dataset, device, tmp_path):
    def build(*overrides):
        run = debug_run(dataset, tmp_path / "run", "megagpt.model.n_layer=4", *overrides)
        return build_engine(run, batch_plan(run.deepspeed, 1), VOCAB, device)

    return build


def tokens(*shape):
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(0))


def loss_and_gradients(engine):
    """With dropout on: the same seed must give the same masks when a block is computed again."""
    engine.train()
    for name, p in engine.module.named_parameters():
        if name.endswith(".scalars"):
            p.data.copy_(torch.tensor([0.75, 0.5]))  # else nothing would flow through the shortcuts
    torch.manual_seed(5)
    batch = tokens(4, 65)
    loss = next_token_loss(engine.module(batch[:, :-1]), batch[:, 1:])
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in engine.module.named_parameters()}


@pytest.mark.parametrize("policy", list(POLICIES)[1:])
def test_recomputing_activations_changes_no_gradient(engine_of, policy):
    common = ["zero_optimization.stage=0", *REGULARIZED, *SHORTCUTS]
    loss, gradients = loss_and_gradients(engine_of(*common))
    again, recomputed = loss_and_gradients(engine_of(*common, *POLICIES[policy]))
    assert again == loss
    for name, gradient in gradients.items():
        assert torch.equal(recomputed[name], gradient), name


@pytest.mark.parametrize("policy", ["none", "every 2", "full"])
def test_activations_that_wait_on_the_host_change_no_gradient(engine_of, policy):
    common = ["zero_optimization.stage=0", *REGULARIZED, *SHORTCUTS]
    loss, gradients = loss_and_gradients(engine_of(*common))
    engine = engine_of(*common, *POLICIES[policy])
    engine.module.recompute = on_the_host(engine.module.recompute)
    again, offloaded = loss_and_gradients(engine)
    assert again == loss
    for name, gradient in gradients.items():
        assert torch.equal(offloaded[name], gradient), name


def kept_bytes(engine) -> int:
    """What is alive between the blocks' forward and backward pass and was not before."""
    engine.train()
    x = engine.module.wte(tokens(4, 64))
    with LiveBytes() as live:
        y = x
        for i, block in enumerate(engine.module.blocks()):
            y = engine.module.recompute(i, block, y)
        kept = live.now
    y.sum().backward()
    return kept


def test_recompute_frees_activations_in_the_ladders_order(engine_of):
    """In fp32, with U bytes for one (B, T, C). Full recompute keeps each block's output: 4 U.

    A block that is kept whole has ln_1, c_attn (3), attention, x after attention, ln_2, c_fc (4), GELU (4) and its
    output: 16 U; selective keeps c_attn (3), attention, c_fc (4) and the output: 9 U. Both have attention's
    log-sum-exp (a number for each of 2 heads, where C = 64), and LayerNorms kept have a mean and a deviation each.
    """
    kept = {policy: kept_bytes(engine_of("zero_optimization.stage=0", *POLICIES[policy])) for policy in POLICIES}
    one = 4 * 64 * 64 * 4  # B x T x C in fp32
    assert kept["none"] == pytest.approx(4 * (16 + 6 / 64) * one, rel=0.001)
    assert kept["selective"] == pytest.approx(4 * (9 + 2 / 64) * one, rel=0.001)
    assert kept["every 2"] == pytest.approx((kept["none"] + kept["full"]) / 2, rel=0.001)
    assert kept["full"] == pytest.approx(4 * one, rel=0.001)
    assert kept["full"] < kept["every 2"] < kept["selective"] < kept["none"]
    assert kept["deepspeed full"] == pytest.approx(kept["full"], rel=0.05)
    assert kept["deepspeed every 2"] == pytest.approx(kept["every 2"], rel=0.05)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["activation_checkpointing.partition_activations=true"], "partition_activations=True has no effect without"),
        (
            [*POLICIES["deepspeed full"], "activation_checkpointing.partition_activations=true"],
            "split activations over model-parallel ranks",
        ),
        (
            [*POLICIES["deepspeed full"], "activation_checkpointing.contiguous_memory_optimization=true"],
            "split activations over model-parallel ranks",
        ),
        (
            [*POLICIES["deepspeed full"], "activation_checkpointing.number_checkpoints=4"],
            "number_checkpoints=4 sizes the buffers",
        ),
        (
            [*POLICIES["deepspeed full"], "activation_checkpointing.cpu_checkpointing=true"],
            "moves activations to the CPU, where they already are",
        ),
        (['megagpt.recompute={"policy": "budget", "budget": 0.5}'], "blocks are not compiled here"),
        (['megagpt.recompute={"offload": true}'], "offload moves activations to the CPU, where they already are"),
    ],
)
def test_what_cannot_act_is_refused(dataset, device, tmp_path, overrides, complaint):
    run = debug_run(dataset, tmp_path, *overrides)
    with pytest.raises(UserError, match=complaint):
        recompute_hook(run.megagpt, run.deepspeed, device, compiled=False)


def test_a_budget_with_dropout_is_refused(dataset, device, tmp_path):
    """The compiler computes masks again from other random numbers (seen as a gradient that no difference confirms)."""
    budget = 'megagpt.recompute={"policy": "budget", "budget": 0.5}'
    run = debug_run(dataset, tmp_path, budget, "megagpt.regularization.dropout=0.1")
    with pytest.raises(UserError, match=r"dropout=0\.1: the compiler may draw other masks"):
        recompute_hook(run.megagpt, run.deepspeed, device, compiled=True)


def test_deepspeeds_checkpointing_is_configured_from_its_section(engine_of):
    from deepspeed.runtime.activation_checkpointing import checkpointing

    engine_of(*POLICIES["deepspeed full"], "activation_checkpointing.profile=true")
    assert checkpointing.is_configured()
    assert checkpointing.PROFILE_TIME
    engine_of(*POLICIES["deepspeed full"])
    assert not checkpointing.PROFILE_TIME


@pytest.mark.parametrize("stage", [1, 3])
def test_initial_weights_survive_zero(engine_of, stage):
    """Under zero.Init a layer is sharded as soon as it is built: a later write to it would be lost."""
    import deepspeed

    module = engine_of(f"zero_optimization.stage={stage}", "megagpt.model.n_embd=256").module
    for name, p in module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            if name.endswith("c_proj.weight"):
                assert p.std().item() == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.03), name
            elif p.ndim == 2 and name != "wpe.weight":
                assert p.std().item() == pytest.approx(0.02, rel=0.03), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_loss_in_chunks_trains_alike_at_every_stage(engine_of, monkeypatch, stage):
    """The head's weight is the embedding too, and at stage 3 sharded: gathered once for all chunks, not in backward."""

    def losses(chunk_bytes):
        monkeypatch.setattr("megagpt.model.loss.CHUNK_BYTES", chunk_bytes)
        engine, batch, found = engine_of(f"zero_optimization.stage={stage}"), tokens(4, 65), []
        for _ in range(6):
            engine.backward(loss := engine(batch[:, :-1], score=next_token_score(batch[:, 1:])))
            engine.step()
            found.append(loss.item())
        return found

    whole = losses(2**28)
    assert whole[-1] < whole[0] - 0.1
    assert losses(4 * VOCAB * 50) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_weight_decay_acts_on_matrices_alone_at_every_stage(engine_of, stage):
    groups = engine_of(f"zero_optimization.stage={stage}").optimizer.param_groups
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.1]


def test_bf16_trains_with_fp32_masters(engine_of):
    engine = engine_of("bf16.enabled=true")
    batch = tokens(4, 65)
    losses = []
    for _ in range(8):
        loss = next_token_loss(engine(batch[:, :-1]), batch[:, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    assert {p.dtype for group in engine.optimizer.optimizer.param_groups for p in group["params"]} == {torch.float32}
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(("stage", "clip"), [(0, 0.5), (1, 0.5), (3, 0.5), (0, 0.0)])
def test_gradients_are_clipped_and_the_norm_before_clipping_is_reported(engine_of, stage, clip):
    """Adam hides the scale of gradients, so its first moment is what shows the clipping: (1 - beta1) x gradient."""
    engine = engine_of(f"zero_optimization.stage={stage}", f"gradient_clipping={clip}")
    batch = tokens(4, 65)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(next_token_loss(engine(batch[:, :-1]), batch[:, 1:]))
        engine.step()
    inner = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    moments = [state["exp_avg"].flatten() for state in inner.state.values()]
    norm = float(engine.get_global_grad_norm())
    assert norm > 0.6
    assert torch.cat(moments).norm().item() / 0.1 == pytest.approx(clip or norm, rel=1e-3)


def test_what_the_run_file_says_is_not_overwritten(dataset, device, tmp_path):
    run = debug_run(dataset, tmp_path, "zero_optimization.reduce_bucket_size=1234", "timers.throughput.enabled=true")
    config = effective_config(run, batch_plan(run.deepspeed, 1), VOCAB, device)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1234
    assert config["timers"]["throughput"]["enabled"] is True
    assert config["gradient_accumulation_steps"] == 2
    assert "throughput" not in str(run.deepspeed_raw.get("zero_optimization"))


def test_a_mistake_inside_deepspeeds_own_sections_is_one_message(dataset, device, tmp_path):
    run = debug_run(dataset, tmp_path, "zero_optimization.overlap_com=true")
    with pytest.raises(UserError, match="overlap_com"):
        build_engine(run, batch_plan(run.deepspeed, 1), VOCAB, device)


# Where DeepSpeed itself waits for the device at the end of a step; docs/architecture.md has the lines.
DEEPSPEEDS_READS = {
    ("utils.py", "is_invalid_grad_norm"),
    ("utils.py", "has_overflow_serial"),
    ("utils.py", "has_overflow"),
    ("utils.py", "get_weight_norm"),
}


class Reads(TorchDispatchMode):
    """Where a tensor was read by the host, as (file, function): on a GPU each `_local_scalar_dense` makes it wait."""

    def __init__(self):
        super().__init__()
        self.sites = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.sites.append((Path(frames[-1].filename).name, frames[-1].name))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_steady_step_reads_nothing_back_but_what_deepspeed_reads_once(dataset, device, tmp_path, stage, dtype):
    def reads_of_a_step(accumulation):
        sizes = [f"train_batch_size={4 * accumulation}", f"bf16.enabled={json.dumps(dtype == 'bf16')}"]
        sizes += ['megagpt.guards.spikes={"action": "skip", "window": 8}']  # the guard that does most in a step
        run = debug_run(dataset, tmp_path / str(accumulation), f"zero_optimization.stage={stage}", *sizes)
        session = Session(prepare(run, device, fresh=False), device)
        batches = session.batches()
        for _ in range(3):  # stage 3 learns the order of modules, and compares it over ranks, in the first ones
            train_step(session, batches)
        with Reads() as reads:
            loss, *_ = train_step(session, batches)
        seen = list(reads.sites)
        with reads:
            loss.item()
        assert len(reads.sites) == len(seen) + 1  # the control: a read is seen
        return seen

    once = reads_of_a_step(1)
    assert set(once) <= DEEPSPEEDS_READS
    assert reads_of_a_step(3) == once  # none in a micro-batch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and MEGAGPT_TEST_GPU=1")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_on_a_gpu_a_steady_step_waits_for_it_in_deepspeed_alone(dataset, device, tmp_path, stage):
    sizes = ["train_batch_size=8", "bf16.enabled=true", f"zero_optimization.stage={stage}"]
    session = Session(prepare(debug_run(dataset, tmp_path / "run", *sizes), device, fresh=False), device)
    batches = session.batches()
    for _ in range(3):
        train_step(session, batches)
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        loss, *_ = train_step(session, batches)
        seen = len(waits)
        loss.item()
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) > seen  # the control: a wait is seen
    assert {Path(wait.filename).parts[-3] for wait in waits[:seen]} <= {"deepspeed", "runtime"}


def test_the_garbage_collector_leaves_alone_what_lives_as_long_as_the_run(dataset, device, tmp_path):
    session = Session(prepare(debug_run(dataset, tmp_path / "run"), device, fresh=False), device)
    state, recent = TrainState(), StepWindow()
    recent.add(train_step(session, session.batches()))
    before = gc.get_freeze_count()
    session.log(state.after_step(8, 64), recent)
    assert gc.get_freeze_count() > before + 10_000
    session.close(state, "")
    assert gc.get_freeze_count() == 0


EVERY_STAGE = """
import sys
from pathlib import Path
import torch
from megagpt.distributed.process_group import init_process_group
from megagpt.train.trainer import train
from support import ROOT, debug_run, environment
dataset, folder = map(Path, sys.argv[1:])
device = init_process_group()
for stage in range(4):
    for stop in (4, None):  # the second resumes
        out_dir = folder / f"stage {stage}"
        run = debug_run(dataset, out_dir, f"zero_optimization.stage={stage}", "megagpt.schedule.max_steps=8")
        train(run, device, stop_at=stop)
loaded = [name for name in sys.modules if name.startswith("torch._dynamo")]
assert not loaded, loaded
"""


@pytest.mark.process
def test_a_run_that_compiles_nothing_does_not_import_the_compiler(dataset, tmp_path):
    """It would take half of the processor time of a start."""
    command = [sys.executable, "-c", EVERY_STAGE, dataset, tmp_path]
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    done = subprocess.run(command, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(committed(tmp_path / "stage 3")) == 2


def test_no_recomputation_changes_a_step_at_stage_3(dataset, device, tmp_path):
    """From the second step on biases are not 0: one that was added twice would show."""
    few = ["zero_optimization.stage=3", "optimizer.params.lr=0.01", "megagpt.schedule.warmup_steps=0"]
    few += ["megagpt.schedule.max_steps=4", 'megagpt.every={"log": 1, "eval": 0, "save": 0}']
    curves = {}
    for policy in ("none", "selective", "full"):
        train(debug_run(dataset, tmp_path / policy, *few, f"megagpt.recompute.policy={policy}"), device)
        curves[policy] = [metric(tmp_path / policy, name) for name in ("train/loss", "optim/grad_norm")]
    assert curves["selective"] == curves["full"] == curves["none"]
