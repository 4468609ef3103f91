"""Describe a run that starts: sizes of model, data and batch, and where it begins or resumes."""

import json
import math
from pathlib import Path
from typing import Any

import torch

from megagpt.checkpoint.commit import read_commit
from megagpt.checkpoint.identity import changed_keys, described
from megagpt.config.run_file import SECTION
from megagpt.config.validation_sets import sets_of
from megagpt.data.lost_text import changed_prompts, lost_text, token_counts, unknown_share
from megagpt.distributed.process_group import print_rank0
from megagpt.model.flops import n_params
from megagpt.planner.sizing import EPOCHS, TOKENS_PER_PARAMETER
from megagpt.terminal import YELLOW, counted, typed
from megagpt.train.early_stopping import restarted
from megagpt.train.lr_schedule import jumps_of_rates
from megagpt.train.preflight import RunSetup
from megagpt.train.run_log import LOG

# A factor from TOKENS_PER_PARAMETER that is far; upwards its square, for small models that are cheap to use.
FAR = 10
# A run of fewer steps tries something out, and nobody expects a good model of it.
TRIAL = 1000


def print_opening(setup: RunSetup, device: torch.device) -> None:
    """Print the sizes of model, data and batch, where the run begins or resumes, and notes on them."""
    cfg, batch = setup.run.megagpt, setup.batch
    tokens = [f"{dataset.variants('train')[0].tokens:,}" for dataset in setup.training_set.datasets]
    lines = [
        f"{cfg.out_dir}: {n_params(cfg.model, setup.data.vocab_size):,} parameters "
        f"({counted(cfg.model.n_layer, 'layer')}, {cfg.model.n_embd} wide, vocabulary {setup.data.vocab_size:,}"
        + (f", preset {cfg.model.preset}" if cfg.model.preset else "")
        + "), "
        f"{setup.run.deepspeed.dtype} on {_device(device, batch.world_size)}",
        f"  {' + '.join(tokens)} training tokens; global batch {batch.global_batch} = micro-batch {batch.micro_batch} "
        f"x accumulation {batch.accumulation} x "
        + counted(batch.replicas, "rank" if batch.sequence_parallel_size == 1 else "group")
        + ("" if batch.sequence_parallel_size == 1 else f" of {batch.sequence_parallel_size} ranks"),
        _how_much(setup),
        _where_to_look(setup),
    ]
    lines += setup.training_set.packing()
    if setup.saved is None:
        weights = f" with the weights of {setup.start}" if setup.start else ""
        lines.append(f"no checkpoint in {cfg.out_dir}: starting at step 0{weights}")
    else:
        changes = changed_keys(setup.saved.step_dir, setup.record.effective)
        lines += [f"resuming from {setup.saved.step_dir}", *(f"  changed: {line}" for line in described(changes))]
        saved_run = json.loads((setup.saved.step_dir / "run.json").read_bytes())
        optimizer, step = setup.run.deepspeed.optimizer, setup.saved.state.step
        peaks = {"lr": optimizer.params.lr}
        if optimizer.type == "Muon":
            peaks["muon_lr"] = optimizer.params.of_muon
        lines += [f"  {jump}" for jump in jumps_of_rates(saved_run, step, peaks, cfg.schedule)]
        if setup.training_set.mixture.segments != setup.saved.mixture.segments:
            mixture = setup.training_set.describe(setup.saved.state.samples_seen, cfg.seq_len)
            lines.append(f"  samples from now on: {mixture}")
    print_rank0("\n".join(lines))
    for note in notes(setup):
        print_rank0(note, color=YELLOW)


def notes(setup: RunSetup) -> list[str]:
    """Return a line for data that is read many times, for a model far too large or small for its tokens, for more
    positions than it begins with, for text that the tokenizer loses, and for a best step that is measured otherwise.
    """
    cfg, epochs, ratio = setup.run.megagpt, _epochs(setup), _tokens_per_parameter(setup)
    key, length = cfg.schedule.length
    lines = [*_positions_without_weights(setup), *_what_the_tokenizer_loses(setup), *_best_on_other_tokens(setup)]
    lines += _other_early_stopping(setup)
    for dataset, times in zip(setup.training_set.datasets, epochs, strict=True):
        if times > EPOCHS:
            lines.append(
                f"note: {dataset.path} is read {_short(times)} times; after about {EPOCHS} times repeated text teaches "
                f"little more (Muennighoff et al. 2023): add text, or set {key}={max(1, int(length * EPOCHS / times))}"
            )
    most = f"about {TOKENS_PER_PARAMETER} make the most of the same computing time (Hoffmann et al. 2022)"
    if ratio < TOKENS_PER_PARAMETER / FAR and cfg.schedule.max_steps >= TRIAL:
        lines.append(f"note: {_short(ratio)} tokens per parameter; {most}: a smaller model learns more from these")
    if ratio > TOKENS_PER_PARAMETER * FAR * FAR:
        lines.append(f"note: {_short(ratio)} tokens per parameter; {most}: a larger model learns more from these")
    return lines


def _positions_without_weights(setup: RunSetup) -> list[str]:
    given = read_commit(setup.start).identity.model["seq_len"] if setup.start else math.inf
    if setup.run.megagpt.seq_len <= given:
        return []
    return [
        f"note: the model of {setup.start} has {given:,} positions, and this run's {setup.run.megagpt.seq_len:,}: the "
        "embeddings of those after them begin at random"
    ]


def _best_on_other_tokens(setup: RunSetup) -> list[str]:
    if setup.saved is None or not (stopper := setup.state.stopper).best_step:
        return []
    before = _tokens_that_decide(json.loads((setup.saved.step_dir / "run.json").read_bytes())[SECTION])
    now = _tokens_that_decide(setup.run.as_json()[SECTION])
    if before == now:
        return []
    return [
        f"note: val/loss is measured on {' + '.join(now)} tokens from now on, and the best, {stopper.best:.4f} at step "
        f"{stopper.best_step}, was on {' + '.join(before)}: later steps are compared with it all the same; for a new "
        "comparison begin a run with megagpt.init_from"
    ]


def _other_early_stopping(setup: RunSetup) -> list[str]:
    if setup.saved is None or not setup.saved.state.stopper.best_step:
        return []
    return restarted(setup.saved.state.stopper, setup.run.megagpt.early_stopping)


def _tokens_that_decide(section: dict[str, Any]) -> list[str]:
    """Return how many tokens val/loss is measured on, of each set that decides."""
    deciding = sorted(sets_of(section, deciding=True).items())
    tokens = [one.get("tokens") or section["data"].get("val_tokens") for _, one in deciding]
    return [f"{n:,}" if n else "all" for n in tokens]


def _device(device: torch.device, n_ranks: int) -> str:
    if device.type == "cpu":
        return "the CPU"
    name = torch.cuda.get_device_name(device)
    return name if n_ranks == 1 else f"{n_ranks} x {name}"


def _how_much(setup: RunSetup) -> str:
    run, steps = setup.run, setup.run.megagpt.schedule.max_steps
    first, full = run.tokens(1), setup.batch.global_batch * run.megagpt.seq_len
    per_step = f"{full:,}" if first == full else f"{first:,} to {full:,}"
    return (
        f"  {counted(steps, 'step')} of {per_step} tokens: {run.tokens(steps):,} tokens, "
        f"{' + '.join(map(_short, _epochs(setup)))} epochs, {_short(_tokens_per_parameter(setup))} tokens per parameter"
    )


def _where_to_look(setup: RunSetup) -> str:
    cfg, board = setup.run.megagpt, setup.run.deepspeed.tensorboard
    parent = cfg.out_dir.parent
    # There the run has the name of its folder, next to other runs.
    logdir = board.output_path or (cfg.out_dir if parent == Path() else parent)
    command = f"tensorboard --logdir {typed(logdir)}"
    return f"  log: {cfg.out_dir / LOG}; curves: {command if board.enabled else 'set tensorboard.enabled=true'}"


def _epochs(setup: RunSetup) -> list[float]:
    """Return how often the whole run reads each dataset."""
    schedule, state = setup.run.megagpt.schedule, setup.state
    batches = schedule.batches(setup.batch.global_batch)
    left = max(0, batches.total(schedule.max_steps) - batches.total(state.step))
    return setup.training_set.epochs(state.samples_seen + left)


def _tokens_per_parameter(setup: RunSetup) -> float:
    run = setup.run
    return run.tokens(run.megagpt.schedule.max_steps) / n_params(run.megagpt.model, setup.data.vocab_size)


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _what_the_tokenizer_loses(setup: RunSetup) -> list[str]:
    """Tell of validation text and prompts that the tokenizer cannot spell; those of data_tools spell all."""
    tokenizer, cfg = setup.data.tokenizer, setup.run.megagpt
    if tokenizer.is_lossless:
        return []
    unknown = max(unknown_share(token_counts(one.windows), tokenizer) for one in setup.data.val.values())
    lost = lost_text(unknown, tokenizer)
    changed = changed_prompts(tokenizer, cfg.sample.prompts) if cfg.every.sample else []
    return [line for line in (lost, *changed) if line]
