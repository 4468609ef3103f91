"""Augmentations on rows of small ids: the end of a document is 2, sentinels are 90 and more."""

import numpy as np
import pytest
from data_support import small_tokenizer, write_dataset
from hypothesis import given
from hypothesis import strategies as st
from support import debug_run, metric

from megagpt.config.augmentation import AugmentConfig, GoldfishConfig, PackingConfig, SpanCorruptionConfig
from megagpt.data.augmentation import (
    GoldfishTokens,
    batch_transform,
    corrupt_spans,
    fill_in_the_middle,
    goldfish_mask,
    sample_generator,
)
from megagpt.data.dataset import open_dataset
from megagpt.data.loss_mask import IGNORE, marked, split, unmarked
from megagpt.errors import UserError
from megagpt.train.trainer import train

EOD = 2
FIM = (90, 91, 92)
SPANS = (93, 94)
T = 64
CONCATENATE = PackingConfig()
GOLDFISH = GoldfishConfig(k=4, context=5)


def text(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 80, n)


def stream_of(n_documents: int, n_tokens: int) -> np.ndarray:
    return np.concatenate([np.append(text(n_tokens, seed), EOD) for seed in range(n_documents)])


def rows_of(n: int) -> np.ndarray:
    """n windows of documents of 29 tokens."""
    stream = stream_of(n * 3, 29)
    return np.stack([stream[i * T : i * T + T + 1] for i in range(n)])


def augmented(cfg: AugmentConfig, rows: np.ndarray, first: int = 0, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    transform = batch_transform(cfg, CONCATENATE, small_tokenizer(), 384, seed)
    assert transform is not None
    rows, targets = rows.copy(), np.empty((len(rows), T), dtype=np.int64)
    transform(first, rows, targets)
    return rows[:, :-1], targets


# --- marks ----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2**32), st.booleans()), min_size=2))
def test_a_marked_token_is_an_input_and_no_target(tokens):
    plain = np.array([token for token, _ in tokens])
    row = np.where([mark for _, mark in tokens], marked(plain), plain)
    assert np.array_equal(unmarked(row), plain)
    assert np.array_equal(marked(marked(row)), marked(plain))
    rows, targets = row[None].copy(), np.empty((1, len(plain) - 1), dtype=np.int64)
    split(rows, targets)
    assert np.array_equal(rows[0], plain)
    assert targets[0].tolist() == [IGNORE if mark else token for token, mark in tokens[1:]]


# --- fill-in-the-middle ---------------------------------------------------------------------------------------


def test_fill_in_the_middle_by_hand():
    part = np.array([10, 11, 12, 13, 14, EOD])
    for spm in (False, True):
        rng = sample_generator(0, 0)
        a, b = np.sort(sample_generator(0, 0).integers(0, 6, size=2))
        prefix, middle, suffix = list(range(10, 10 + a)), list(range(10 + a, 10 + b)), list(range(10 + b, 15))
        psm = [90, *prefix, 91, *suffix, 92, *middle, EOD]
        expected = [90, 91, *suffix, 92, *prefix, *middle, EOD] if spm else psm
        assert fill_in_the_middle(part, 100, EOD, FIM, spm, rng).tolist() == expected


@given(st.integers(5, 60), st.integers(8, 70), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_fill_in_the_middle_loses_no_text_that_has_room(n, room, ends, spm, sample):
    body = text(n)
    part = np.append(body, EOD) if ends else body
    out = fill_in_the_middle(part, room, EOD, FIM, spm, sample_generator(0, sample))
    kept = body[: room - 3]
    assert sorted(out.tolist()) == sorted([*kept, *FIM, *([EOD] if ends else [])])
    prefix_at, suffix_at, middle_at = (out.tolist().index(i) for i in FIM)
    prefix, suffix = out[prefix_at + 1 : suffix_at], out[suffix_at + 1 : middle_at]  # SPM: its prefix is empty
    last = out[middle_at + 1 : len(out) - ends]  # and stands here, before the middle
    assert np.array_equal(np.concatenate([prefix, last, suffix]), kept)
    assert len(prefix) == 0 or not spm


# --- span corruption ------------------------------------------------------------------------------------------


@given(
    st.integers(8, 300),
    st.booleans(),
    st.integers(0, 1000),
    st.sampled_from([0.05, 0.15, 0.5]),
    st.sampled_from([1.0, 3.0, 10.0]),
)
def test_corrupted_spans_can_be_put_back(n, ends, sample, density, mean_span):
    cfg = SpanCorruptionConfig(rate=1.0, density=density, mean_span=mean_span)
    body = text(n)
    part = np.append(body, EOD) if ends else body
    out = corrupt_spans(part, 10_000, EOD, SPANS, cfg, sample_generator(0, sample))
    if ends:
        assert out[-1] == EOD
        out = out[:-1]
    at = np.flatnonzero(np.isin(out, SPANS))
    n_spans = len(at) // 2
    kept = np.split(out[: at[n_spans]], at[:n_spans])
    spans = np.split(out[at[n_spans] :], at[n_spans + 1 :] - at[n_spans])
    back = [kept[0], *(x for i in range(n_spans) for x in (spans[i][1:], kept[i + 1][1:]))]
    assert np.array_equal(np.concatenate(back), body)
    assert sum(len(span) - 1 for span in spans) == max(round(n * density), 1)
    assert [span[0] for span in spans] == [out[i] for i in at[:n_spans]]


@given(st.integers(8, 300), st.integers(8, 300), st.integers(0, 1000))
def test_spans_too_long_for_the_room_fill_it_to_within_a_span(n, room, sample):
    cfg = SpanCorruptionConfig(rate=1.0)
    out = corrupt_spans(np.append(text(n), EOD), room, EOD, SPANS, cfg, sample_generator(0, sample))
    needed = n + 1 + 2 * max(round(max(round(n * 0.15), 1) / 3), 1)
    assert len(out) == needed if needed <= room else room <= len(out) <= room + 3


# --- rows -----------------------------------------------------------------------------------------------------

EVERYTHING = AugmentConfig(
    fim={"rate": 0.4}, span_corruption={"rate": 0.4, "sentinels": 8}, token_dropout={"rate": 0.2}, goldfish=GOLDFISH
)


def test_a_sample_is_augmented_alike_in_any_batch_and_another_sample_is_not():
    rows = rows_of(8)
    inputs, targets = augmented(EVERYTHING, rows, first=1000)
    for i in (0, 3, 7):
        alone = augmented(EVERYTHING, rows[i : i + 1], first=1000 + i)
        assert np.array_equal(alone[0][0], inputs[i])
        assert np.array_equal(alone[1][0], targets[i])
    assert not np.array_equal(augmented(EVERYTHING, rows, first=2000)[0], inputs)
    assert not np.array_equal(augmented(EVERYTHING, rows, first=1000, seed=8)[0], inputs)


def test_rearranged_rows_keep_their_length_and_their_documents_ends():
    rows = rows_of(50)
    inputs, targets = augmented(AugmentConfig(fim={"rate": 0.5}, span_corruption={"rate": 0.5}), rows)
    assert np.array_equal(inputs[:, 1:], targets[:, :-1])
    sentinel = inputs >= small_tokenizer().vocab_size
    assert sentinel.any(axis=1).all()
    first_ends = [np.flatnonzero(row == EOD)[0] for row in rows]
    for row, out, end in zip(rows, inputs, first_ends, strict=True):
        plain = out[: np.flatnonzero(out == EOD)[0]] if (out == EOD).any() else out
        if end + 8 < T:
            assert sorted(plain[plain < 300].tolist()) == sorted(row[:end].tolist())


def test_marks_move_with_their_tokens():
    rows = rows_of(20)
    rows = np.where(rows % 3 == 0, ~rows, rows)
    inputs, targets = augmented(AugmentConfig(fim={"rate": 0.5}, span_corruption={"rate": 0.5}), rows)
    following = inputs[:, 1:]
    assert np.array_equal(targets[:, :-1] == IGNORE, (following % 3 == 0) & (following < 300))


def test_token_dropout_hides_inputs_alone_and_never_a_documents_end():
    rows = rows_of(100)
    inputs, targets = augmented(AugmentConfig(token_dropout={"rate": 0.3}), rows)
    assert np.array_equal(targets, rows[:, 1:])
    hidden = inputs != rows[:, :-1]
    assert set(inputs[hidden]) == {0}  # <unk>
    assert not hidden[rows[:, :-1] == EOD].any()
    assert hidden[rows[:, :-1] != EOD].mean() == pytest.approx(0.3, abs=0.02)


def test_rates_are_what_happens():
    rows = np.tile(np.append(text(T), EOD), (2000, 1))
    inputs, _ = augmented(AugmentConfig(fim={"rate": 0.3, "spm_rate": 0.5}, span_corruption={"rate": 0.2}), rows)
    prefix, suffix = small_tokenizer().vocab_size, small_tokenizer().vocab_size + 1
    fim = inputs[:, 0] == prefix
    assert fim.mean() == pytest.approx(0.3, abs=0.04)
    assert (inputs[fim][:, 1] == suffix).mean() == pytest.approx(0.5, abs=0.06)
    assert ((inputs >= 303).any(axis=1)).mean() == pytest.approx(0.2, abs=0.04)


def test_without_augmentation_rows_pass_as_they_are():
    assert batch_transform(AugmentConfig(), CONCATENATE, small_tokenizer(), 384, 0) is None
    assert batch_transform(AugmentConfig(), PackingConfig(kind="best-fit"), small_tokenizer(), 384, 0) is not None


# --- goldfish -------------------------------------------------------------------------------------------------


def test_goldfish_drops_one_target_in_k_of_any_text():
    for k in (2, 4, 7):
        mask = goldfish_mask(text(200_000), EOD, GoldfishConfig(k=k))
        assert mask.mean() == pytest.approx(1 / k, abs=0.005)


def test_goldfish_drops_the_same_tokens_of_a_text_wherever_it_stands():
    document = np.append(text(50), EOD)
    alone = goldfish_mask(document, EOD, GOLDFISH)
    assert not alone[: GOLDFISH.context].any()
    for n in (0, 1, 7, 100):
        around = np.concatenate([np.append(text(n, seed=9), EOD), document, text(20, seed=8)])
        assert np.array_equal(goldfish_mask(around, EOD, GOLDFISH)[n + 1 :][: len(document)], alone)


def test_goldfish_depends_on_the_context_and_on_nothing_else():
    tokens = text(40)
    mask = goldfish_mask(tokens, EOD, GOLDFISH)
    other = tokens.copy()
    other[20] = 81
    changed = np.flatnonzero(mask != goldfish_mask(other, EOD, GOLDFISH))
    assert set(changed) <= set(range(21, 21 + GOLDFISH.context))


def test_goldfish_drops_the_same_tokens_in_every_window(tmp_path):
    documents = [np.append(text(70, seed), EOD) for seed in range(6)]
    write_dataset(tmp_path / "data", documents)
    stream = open_dataset(tmp_path / "data").stream("train")
    whole = np.concatenate(documents)
    expected = np.where(goldfish_mask(whole, EOD, GOLDFISH), ~whole, whole)
    marked_stream = GoldfishTokens(stream, EOD, GOLDFISH)
    out = np.empty(33, dtype=np.int64)
    for start in range(len(whole) - 33):
        marked_stream.copy(start, out)
        assert np.array_equal(out, expected[start : start + 33])


# --- what a user can get wrong --------------------------------------------------------------------------------


def sentinel_error(cfg: AugmentConfig, vocab_size: int) -> str:
    with pytest.raises(UserError) as caught:
        batch_transform(cfg, CONCATENATE, small_tokenizer(), vocab_size, 0)
    return str(caught.value)


def test_too_few_free_ids_are_refused_with_the_vocabulary_to_build():
    message = sentinel_error(AugmentConfig(fim={"rate": 0.5}), 302)
    assert "needs 3 ids for sentinels" in message
    assert "leaves 2 free" in message
    assert "vocab_size=299 or less" in message


def test_named_pieces_are_used_and_must_exist():
    named = AugmentConfig(fim={"rate": 1.0, "pieces": ["<0x01>", "<0x02>", "<0x03>"]})
    inputs, _ = augmented(named, rows_of(1))
    assert {small_tokenizer().piece_id(f"<0x0{i}>") for i in (1, 2, 3)} <= set(inputs[0].tolist())
    assert inputs.max() < small_tokenizer().vocab_size
    assert "no piece '<fim>'" in sentinel_error(AugmentConfig(fim={"rate": 1.0, "pieces": ["<fim>", "a", "b"]}), 384)
    hidden = AugmentConfig(token_dropout={"rate": 0.1, "piece": "</s>"})
    assert "is the end of a document" in sentinel_error(hidden, 384)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ('megagpt.augment={"fim": {"rate": 0.6}, "span_corruption": {"rate": 0.6}}', "exceed 1"),
        ("megagpt.augment.goldfish.k=1", "would drop every target"),
        ("megagpt.augment.fim.rat=1", "did you mean 'megagpt.augment.fim.rate'"),
        ("megagpt.packing.kind=bestfit", "best-fit"),
    ],
)
def test_settings_that_cannot_be_are_refused(dataset, tmp_path, override, complaint):
    with pytest.raises(UserError, match=complaint):
        debug_run(dataset, tmp_path, override)


# --- in training ----------------------------------------------------------------------------------------------

AUGMENTED = [
    'megagpt.augment={"fim": {"rate": 0.3}, "span_corruption": {"rate": 0.3}, "token_dropout": {"rate": 0.1}, '
    '"goldfish": {"k": 3, "context": 4}}',
    "megagpt.schedule.max_steps=6",
]


@pytest.mark.parametrize("kind", ["concatenate", "best-fit"])
def test_training_does_not_depend_on_micro_batches_when_targets_are_dropped(dataset, device, tmp_path, kind):
    """Micro-batches hold unequal numbers of targets: averaging their means would weigh them wrongly."""
    options = [*AUGMENTED, f"megagpt.packing.kind={kind}"]
    for micro in (8, 2):
        run = debug_run(dataset, tmp_path / str(micro), *options, f"train_micro_batch_size_per_gpu={micro}")
        train(run, device)
    whole, parts = (metric(tmp_path / run, "train/loss") for run in ("8", "2"))
    assert parts == pytest.approx(whole, rel=1e-4)
    norms = [metric(tmp_path / run, "optim/grad_norm") for run in ("8", "2")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_an_augmented_run_stopped_and_resumed_sees_the_same_samples(dataset, device, tmp_path):
    constant = [
        "megagpt.schedule.shape=constant",
        "megagpt.schedule.warmup_steps=0",
    ]  # a shorter run has the same rates
    for out_dir, stops in (("straight", [6]), ("cut", [3, 6])):
        for stop in stops:
            options = [*AUGMENTED, *constant, f"megagpt.schedule.max_steps={stop}"]
            train(debug_run(dataset, tmp_path / out_dir, *options), device)
    assert metric(tmp_path / "cut", "train/loss") == metric(tmp_path / "straight", "train/loss")
