"""Report which data the next samples of a run read, for `launch/pretrain.py --sample-report`; no model is loaded."""

from megagpt.checkpoint.commit import newest_record
from megagpt.checkpoint.run_samples import open_samples
from megagpt.config.run_file import RunConfig
from megagpt.data.training_set import TrainingSet
from megagpt.errors import UserError
from megagpt.train_state import TrainState

SHOWN = 8  # number of samples that are listed one by one


def sample_report(run: RunConfig, n: int, *, fresh: bool = False) -> str:
    """Report on the next n samples of this run, or the first n of a fresh one. Raises UserError as training would."""
    cfg = run.megagpt
    saved = None if fresh else newest_record(cfg.out_dir)
    if saved and saved.mixture.seed != cfg.data.seed:
        raise UserError(
            f"checkpoint {saved.step_dir} was saved with megagpt.data.seed={saved.mixture.seed}, and this run has "
            f"{cfg.data.seed}; set megagpt.data.seed to {saved.mixture.seed}, or give --fresh for a new run's samples"
        )
    data = open_samples(cfg, run.deepspeed.train_batch_size, saved)
    state = saved.state if saved else TrainState()
    first, batches = state.samples_seen, cfg.schedule.batches(run.deepspeed.train_batch_size)
    steps = batches.steps_to(batches.total(state.step) + n) - state.step
    steps_in_words = (
        f"{n / run.deepspeed.train_batch_size:,.1f} steps" if not cfg.schedule.first_batch else f"{steps} steps"
    )
    begins = f"resumes from {saved.step_dir}" if saved else "starts at step 0"
    lines = [
        f"{cfg.out_dir} {begins}; its next {n:,} samples are {first:,} to {first + n - 1:,}, "
        f"{steps_in_words}, {n * cfg.seq_len:,} tokens in samples of {cfg.seq_len}:"
    ]
    return "\n".join([*lines, *_by_dataset(data, first, n, cfg.seq_len), *_one_by_one(data, first, min(n, SHOWN))])


def _by_dataset(data: TrainingSet, first: int, n: int, seq_len: int) -> list[str]:
    """Return a table with each dataset's samples, tokens, share and epochs."""
    sampler, numbers = data.mixture.sampler(first), {s.fingerprint: k for k, s in enumerate(data.mixture.sources)}
    before, after = sampler.turns(first), sampler.turns(first + n)
    epochs = zip(data.epochs(first), data.epochs(first + n), strict=True)
    lines = [f"  {'samples':>12} {'tokens':>16} {'share':>8}  {'epochs':20} dataset"]
    for dataset, (begin, end) in zip(data.datasets, epochs, strict=True):
        k = numbers[dataset.fingerprint]
        samples = after[k] - before[k]
        lines.append(
            f"  {samples:>12,} {samples * seq_len:>16,} {samples / n:>8.2%}  {f'{begin:.4f} to {end:.4f}':20} "
            f"{dataset.path}"
        )
    return lines


def _one_by_one(data: TrainingSet, first: int, n: int) -> list[str]:
    """Return a line for each span of the first n samples: its dataset, epoch and tokens."""
    lines = []
    for sample in range(first, first + n):
        for span in data.spans(sample):
            lines.append(
                f"  sample {sample:,}: {span.dataset.path} variant {span.variant}, epoch {span.epoch}, "
                f"tokens {span.start:,} to {span.start + len(span.tokens) - 1:,} of its train split"
            )
    return lines
