from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import write_dataset
from support import build_dataset, debug_run

from megagpt.config.batch import BatchPlan
from megagpt.config.schema import DataConfig
from megagpt.data.dataset import open_dataset
from megagpt.data.loader import ValWindows, open_data, prefetched, rank_samples
from megagpt.data.loss_mask import IGNORE, marked, split
from megagpt.data.mixture import Mixture
from megagpt.data.training_set import DRAW, TrainingSet, source_of
from megagpt.errors import UserError

CPU = torch.device("cpu")
SEQ_LEN = 32


@pytest.fixture(scope="module")
def train_data(dataset):
    opened = open_dataset(dataset)
    mixture = Mixture(1234).continued([(source_of(opened), 1.0)], step=0, sample=0, seq_len=SEQ_LEN, global_batch=8)
    return TrainingSet(mixture, [opened])


def batches_from(first: int, plan: BatchPlan) -> Iterator[range]:
    return (range(begin, begin + plan.global_batch) for begin in count(first, plan.global_batch))


def global_batch(data, plan: BatchPlan, step: int) -> list[tuple[int, ...]]:
    """The rows of one global batch, gathered from every rank's micro-batches, as a sorted list."""
    rows = []
    for rank in range(plan.world_size):
        batches = prefetched(
            data.fill,
            rank_samples(plan, rank, batches_from(step * plan.global_batch, plan)),
            (plan.micro_batch, SEQ_LEN + 1),
            CPU,
        )
        rows += [tuple(row) for _ in range(plan.accumulation) for row in next(batches).inputs.tolist()]
    return sorted(rows)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_global_batches_do_not_depend_on_ranks_or_micro_batches(train_data, world_size, micro_batch):
    plan = BatchPlan(16, micro_batch, 16 // (micro_batch * world_size), world_size)
    for step in (0, 3):
        assert global_batch(train_data, plan, step) == global_batch(train_data, BatchPlan(16, 16, 1, 1), step)


def test_going_on_at_a_step_gives_the_batches_that_follow_it(train_data):
    plan, shape = BatchPlan(8, 4, 2, 1), (4, SEQ_LEN + 1)
    straight = prefetched(train_data.fill, rank_samples(plan, 0, batches_from(0, plan)), shape, CPU)
    for _ in range(2 * 5):
        next(straight)
    resumed = prefetched(train_data.fill, rank_samples(plan, 0, batches_from(5 * 8, plan)), shape, CPU)
    for _ in range(6):
        assert torch.equal(next(straight).targets, next(resumed).targets)


def test_a_micro_batch_is_windows_of_the_stream(train_data, dataset):
    stream = open_dataset(dataset).stream("train")
    whole = np.empty(stream.n_tokens, dtype=np.int64)
    stream.copy(0, whole)
    rows = np.empty((20, SEQ_LEN + 1), dtype=np.int64)
    train_data.fill(DRAW - 6, rows)  # across the edge of what is drawn at once
    starts = train_data.mixture.sampler(0).draw(DRAW - 6, 20).start
    for row, start in zip(rows, starts, strict=True):
        assert np.array_equal(row, whole[start : start + SEQ_LEN + 1])


def test_epochs_read_the_variants_in_turn(tmp_path):
    rng = np.random.default_rng(0)
    variants = [[np.append(rng.integers(3, 300, 90 + 30 * v), 2) for _ in range(10)] for v in range(3)]
    write_dataset(tmp_path / "data", variants[0], resampled=variants[1:])
    opened = open_dataset(tmp_path / "data")
    mixture = Mixture(1).continued([(source_of(opened), 1.0)], step=0, sample=0, seq_len=8, global_batch=1)
    data, first = TrainingSet(mixture, [opened]), 0
    for epoch in range(6):
        flat = np.concatenate(variants[epoch % 3])
        rows = np.empty(((len(flat) - 1) // 8 - 1, 9), dtype=np.int64)  # all windows of the epoch
        data.fill(first, rows)
        for i, row in enumerate(rows):
            [span] = data.spans(first + i)
            assert (span.variant, span.epoch) == (epoch % 3, epoch)
            assert np.array_equal(row, flat[span.start : span.start + 9])
            assert np.array_equal(row[:-1], span.tokens)
        first += len(rows)


def test_a_sample_of_several_stretches_is_their_tokens_one_after_the_other(tmp_path):
    """The target of a stretch's last input is the next stretch's first token; the row ends with the stream's next."""
    flat = np.append(np.arange(3, 300).repeat(2)[:500], 2)
    write_dataset(tmp_path / "data", [flat], n_shards=1)
    opened = open_dataset(tmp_path / "data")
    wanted = [(source_of(opened), 1.0)]
    mixture = Mixture(1).continued(wanted, step=0, sample=0, seq_len=10, global_batch=1)
    mixture = mixture.continued(wanted, step=3, sample=3, seq_len=16, global_batch=1)
    data, rows = TrainingSet(mixture, [opened]), np.empty((20, 17), dtype=np.int64)
    data.fill(3, rows)
    for i, row in enumerate(rows):
        spans = data.spans(3 + i)
        assert len(spans) in (2, 3)
        expected = [flat[span.start : span.start + len(span.tokens)] for span in spans]
        last = spans[-1].start + len(spans[-1].tokens)
        assert np.array_equal(row, np.concatenate([*expected, flat[last : last + 1]]))


def test_reading_ahead_does_not_overwrite_the_batch_in_use(train_data):
    plan, shape = BatchPlan(4, 4, 1, 1), (4, SEQ_LEN + 1)
    expected = [batch.inputs.clone() for batch in prefetched(train_data.fill, range(0, 40, 4), shape, CPU)]
    batches = prefetched(train_data.fill, rank_samples(plan, 0, batches_from(0, plan)), shape, CPU)
    for i, batch in zip(range(10), batches, strict=False):
        assert torch.equal(batch.inputs, expected[i])


def test_inputs_and_targets_are_one_apart_and_share_their_memory(train_data):
    batch = next(prefetched(train_data.fill, [0], (4, SEQ_LEN + 1), CPU))
    rows = np.empty((4, SEQ_LEN + 1), dtype=np.int64)
    train_data.fill(0, rows)
    assert np.array_equal(batch.inputs, rows[:, :-1])
    assert np.array_equal(batch.targets, rows[:, 1:])
    assert batch.targets.data_ptr() == batch.inputs.data_ptr() + 8
    assert batch.documents is None


def test_transformed_batches_are_their_samples_in_order(train_data):
    """A transform of its own: every token of sample g goes up by g, and every third is no target."""

    def transform(first, rows, targets):
        rows += np.arange(first, first + len(rows))[:, None]
        rows[:, ::3] = marked(rows[:, ::3])
        split(rows, targets)

    batches = prefetched(train_data.fill, range(0, 40, 4), (4, SEQ_LEN + 1), CPU, transform=transform, document_end=7)
    for first, batch in zip(range(0, 40, 4), batches, strict=True):
        rows = np.empty((4, SEQ_LEN + 1), dtype=np.int64)
        train_data.fill(first, rows)
        rows += np.arange(first, first + 4)[:, None]
        assert np.array_equal(batch.inputs, rows[:, :-1])
        rows[:, ::3] = IGNORE
        assert np.array_equal(batch.targets, rows[:, 1:])
        assert np.array_equal(batch.documents, np.cumsum(batch.inputs.numpy() == 7, axis=1))


def test_an_error_while_reading_ahead_reaches_the_loop():
    def fill(first, rows):
        raise UserError(f"shard of sample {first} is gone")

    with pytest.raises(UserError, match="sample 0 is gone"):
        next(prefetched(fill, [0, 4], (4, 5), CPU))


def test_epochs_are_counted_in_windows(train_data):
    [n_windows] = [(tokens - 1) // SEQ_LEN - 1 for tokens in train_data.mixture.sources[0].n_tokens]
    assert train_data.epochs(n_windows) == [1.0]
    assert train_data.epochs(n_windows + 1) == [1 + 1 / n_windows]


def test_validation_windows_are_the_streams_first_and_overlap_by_one(dataset):
    stream = open_dataset(dataset).stream("val")
    whole = np.empty(stream.n_tokens, dtype=np.int64)
    stream.copy(0, whole)
    windows = ValWindows(stream, SEQ_LEN, max_tokens=100)
    assert len(windows) == 3
    rows = np.empty((3, SEQ_LEN + 1), dtype=np.int64)
    windows.fill(0, rows)
    assert [row.tolist() for row in rows] == [whole[i * 32 : i * 32 + 33].tolist() for i in range(3)]


def test_too_little_validation_data_is_refused_with_what_there_is(dataset):
    stream = open_dataset(dataset).stream("val")
    available = (stream.n_tokens - 1) // SEQ_LEN * SEQ_LEN
    with pytest.raises(UserError, match=f"give megagpt.data.val_tokens={available}"):
        ValWindows(stream, SEQ_LEN, max_tokens=10**9)
    with pytest.raises(UserError, match=f"=1 is less than one window of {SEQ_LEN} tokens; give .*val_tokens={SEQ_LEN}"):
        ValWindows(stream, SEQ_LEN, max_tokens=1)
    with pytest.raises(UserError, match="larger val_fraction"):
        ValWindows(stream, 10**6)
    with pytest.raises(UserError, match=r"are 0 windows of 1000000; build the data with a larger val_fraction$"):
        ValWindows(stream, 10**6, option="--tokens ")  # of `evaluate`: the model has its seq_len


def test_datasets_of_two_tokenizers_are_refused_with_the_way_out(dataset, tmp_path):
    other = build_dataset(tmp_path / "other", n_documents=40, seed=1)
    mixed = DataConfig(train=[{"path": dataset}, {"path": other}], val=dataset)
    if open_dataset(other).manifest.tokenizer.sha256 == open_dataset(dataset).manifest.tokenizer.sha256:
        pytest.fail("the two corpora gave one tokenizer: the test would prove nothing")
    with pytest.raises(UserError, match=r"tokenized with another model.*build it again with tokenizer="):
        open_data(mixed, SEQ_LEN)


def test_a_sequence_longer_than_the_data_is_refused(dataset):
    with pytest.raises(UserError, match=r"lower megagpt\.model\.seq_len to"):
        open_data(DataConfig(train=[{"path": dataset}], val=dataset), 10**6)


def test_a_dataset_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing"):
        open_data(debug_run(tmp_path / "nothing", tmp_path).megagpt.data, SEQ_LEN)


def test_a_shard_missing_or_cut_short_is_found_before_training(dataset, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    shard = next(Path(copy).glob("train/v0/*.arrow"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(UserError, match=shard.name):
        open_data(DataConfig(train=[{"path": copy}], val=copy), SEQ_LEN)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        open_data(DataConfig(train=[{"path": copy}], val=copy), SEQ_LEN)
