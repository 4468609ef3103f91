"""Describe a run that starts: sizes of model, data and batch, and where it begins or resumes."""

import json
from typing import Any

from megagpt.checkpoint.identity import changed_keys, described
from megagpt.data.lost_text import changed_prompts, lost_text, token_counts, unknown_share
from megagpt.terminal import counted
from megagpt.train.lr_schedule import jump_of_rate
from megagpt.train.preflight import RunSetup


def opening(setup: RunSetup, effective: dict[str, Any]) -> list[str]:
    """Return the lines that a start prints: the sizes of model, data and batch, and where the run begins or resumes."""
    cfg, batch = setup.run.megagpt, setup.batch
    tokens = [f"{dataset.variants('train')[0].tokens:,}" for dataset in setup.training_set.datasets]
    lines = [
        f"{cfg.out_dir}: {counted(cfg.model.n_layer, 'layer')}, {cfg.model.n_embd} wide, "
        f"vocabulary {setup.data.vocab_size:,}; "
        f"{' + '.join(tokens)} training tokens; global batch {batch.global_batch} = micro-batch {batch.micro_batch} "
        f"x accumulation {batch.accumulation} x "
        + counted(batch.replicas, "rank" if batch.sequence_parallel_size == 1 else "group")
        + ("" if batch.sequence_parallel_size == 1 else f" of {batch.sequence_parallel_size} ranks")
    ]
    lines += setup.training_set.packing()
    lines += _what_the_tokenizer_loses(setup)
    if setup.saved is None:
        lines.append(f"no checkpoint in {cfg.out_dir}: starting at step 0")
    else:
        lines.append(f"resuming from {setup.saved.step_dir}")
        lines += [f"  changed: {line}" for line in described(changed_keys(setup.saved.step_dir, effective))]
        saved_run = json.loads((setup.saved.step_dir / "run.json").read_bytes())
        peak, step = setup.run.deepspeed.optimizer.params.lr, setup.saved.state.step
        if jump := jump_of_rate(saved_run, step, peak, cfg.schedule):
            lines.append(f"  {jump}")
        if setup.training_set.mixture.segments != setup.saved.mixture.segments:
            mixture = setup.training_set.describe(setup.saved.state.samples_seen, cfg.seq_len)
            lines.append(f"  samples from now on: {mixture}")
    return lines


def _what_the_tokenizer_loses(setup: RunSetup) -> list[str]:
    """Tell of validation text and prompts that the tokenizer cannot spell; those of data_tools spell all."""
    tokenizer, cfg = setup.data.tokenizer, setup.run.megagpt
    if tokenizer.is_lossless:
        return []
    unknown = unknown_share(token_counts(setup.data.val_windows), tokenizer)
    changed = changed_prompts(tokenizer, cfg.sample.prompts) if cfg.every.sample else []
    return [line for line in (lost_text(unknown, tokenizer), *changed) if line]
