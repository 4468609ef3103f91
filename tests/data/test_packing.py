from collections import Counter
from typing import get_args

import numpy as np
import pytest
import torch
from data_support import write_dataset
from hypothesis import given
from hypothesis import strategies as st
from support import debug_run, metric

from megagpt.checkpoint.commit import committed
from megagpt.checkpoint.identity import packing_identity
from megagpt.checkpoint.load import packing_of
from megagpt.checkpoint.run_samples import open_samples
from megagpt.config.augmentation import GoldfishConfig, PackingConfig
from megagpt.config.model import ModelConfig
from megagpt.config.schema import DataConfig
from megagpt.data.augmentation import GoldfishTokens, goldfish_mask
from megagpt.data.dataset import open_dataset
from megagpt.data.loader import document_numbers, open_data, prefetched
from megagpt.data.loss_mask import IGNORE, split, unmarked
from megagpt.data.packing import PACKING, PackedRows, Packing, best_fit_decreasing, plan_best_fit
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_loss
from megagpt.train.trainer import train

EOD = 2
SEQ_LEN = 16
VOCAB = 128


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    """Random tokens; each document ends with EOD."""
    rng = np.random.default_rng(0)
    return [np.append(rng.integers(3, VOCAB, n - 1), EOD) for n in lengths]


class Memory:
    """A stream held in memory."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self.tokens = np.concatenate(documents)
        self.n_tokens = len(self.tokens)

    def copy(self, start: int, out: np.ndarray) -> None:
        out[:] = self.tokens[start : start + len(out)]


def all_rows(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of every row."""
    plan = plan_best_fit(np.array([len(d) for d in documents]), SEQ_LEN)
    packed = PackedRows(Memory(documents), plan, EOD)
    rows = np.empty((plan.n_rows, SEQ_LEN + 1), dtype=np.int64)
    for i, row in enumerate(rows):
        packed.copy(i, row)
    targets = np.empty((plan.n_rows, SEQ_LEN), dtype=np.int64)
    split(rows, targets)
    return rows[:, :-1], targets


# --- the plan -------------------------------------------------------------------------------------------------


def plain_best_fit(sizes: list[int], capacity: int) -> list[int]:
    """Free space of each row, one chunk at a time: the textbook."""
    free: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, space in enumerate(free) if space >= size]
        if fitting:
            free[min(fitting, key=lambda i: free[i])] -= size
        else:
            free.append(capacity - size)
    return sorted(free)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=200))
def test_rows_are_as_full_as_those_of_the_textbooks_best_fit(sizes):
    row = best_fit_decreasing(np.array(sizes), 30)
    filled = np.bincount(row, weights=sizes)
    assert sorted((30 - filled).tolist()) == plain_best_fit(sizes, 30)


def test_best_fit_by_hand():
    plan = plan_best_fit(np.array([4, 3, 5, 4]), 8)
    assert plan.n_rows == 2
    assert [plan.length[a:b].tolist() for a, b in zip(plan.first, plan.first[1:], strict=False)] == [[3, 5], [4, 4]]
    assert plan.padding_share == 0.0
    assert plan.cut_share == 0.0


def test_a_long_document_is_cut_into_rows_and_a_rest():
    plan = plan_best_fit(np.array([20, 5]), 8)
    assert sorted(zip(plan.start.tolist(), plan.length.tolist(), plan.continues.tolist(), strict=True)) == [
        (0, 8, False),
        (8, 8, True),
        (16, 4, True),
        (20, 5, False),
    ]
    assert plan.n_rows == 4
    assert plan.padding_share == pytest.approx(7 / 32)
    assert plan.cut_share == 0.5


# --- rows -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40))
def test_every_token_is_a_target_once_but_where_a_document_was_cut(lengths):
    documents = documents_of(lengths)
    _, targets = all_rows(documents)
    lost = [document[at] for document in documents for at in range(SEQ_LEN, len(document), SEQ_LEN)]
    expected = Counter(np.concatenate(documents).tolist())
    assert Counter(targets[targets != IGNORE].tolist()) + Counter(map(int, lost)) == expected


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40))
def test_each_chunk_of_a_row_follows_the_end_of_a_document(lengths):
    documents = documents_of(lengths)
    inputs, targets = all_rows(documents)
    chunks = {tuple(d[at : at + SEQ_LEN].tolist()) for d in documents for at in range(0, len(d), SEQ_LEN)}
    for row, wanted in zip(inputs, targets, strict=True):
        assert row[0] == EOD
        for chunk in np.split(np.arange(SEQ_LEN), np.flatnonzero(row == EOD)[1:]):
            following = [*row[chunk[1:]].tolist(), wanted[chunk[-1]]]
            if following[-1] == IGNORE:  # padding, or a rest of one token
                assert len(chunk) == 1
            else:
                assert tuple(following) in chunks


def test_a_packed_row_is_the_same_text_without_the_tokens_that_goldfish_drops():
    goldfish = GoldfishConfig(k=2, context=3)
    documents = documents_of([12, 37, 5, 9])
    plan = plan_best_fit(np.array([12, 37, 5, 9]), SEQ_LEN)
    plain, marked = np.empty(SEQ_LEN + 1, dtype=np.int64), np.empty(SEQ_LEN + 1, dtype=np.int64)
    stream = Memory(documents)
    dropped = goldfish_mask(stream.tokens, EOD, goldfish)
    n_dropped = 0
    for i in range(plan.n_rows):
        PackedRows(stream, plan, EOD).copy(i, plain)
        PackedRows(GoldfishTokens(stream, EOD, goldfish), plan, EOD).copy(i, marked)
        assert np.array_equal(np.maximum(plain, ~plain), np.maximum(marked, ~marked))
        n_dropped += int(((marked < 0) & (plain >= 0)).sum())
    first_of_chunks = plan.start[plan.continues]
    assert n_dropped == dropped.sum() - dropped[first_of_chunks].sum() > 5


def test_lengths_come_from_the_shards_offsets(tmp_path):
    lengths = [3, 50, 1, 7, 120, 9, 2]
    write_dataset(tmp_path / "data", documents_of(lengths), n_shards=3, batch_tokens=20)
    assert open_dataset(tmp_path / "data").stream("train").document_lengths().tolist() == lengths


@pytest.fixture
def best_fit(tmp_path):
    """A run on 300 documents: (its samples, all rows of its plan)."""
    write_dataset(tmp_path / "data", documents_of([int(n) for n in np.random.default_rng(1).integers(2, 30, 300)]))
    sizes = f"megagpt.model.seq_len={SEQ_LEN}"
    run = debug_run(tmp_path / "data", tmp_path / "run", "megagpt.packing.kind=best-fit", sizes)
    stream = open_dataset(tmp_path / "data").stream("train")
    plan = plan_best_fit(stream.document_lengths(), SEQ_LEN)
    rows = np.empty((plan.n_rows, SEQ_LEN + 1), dtype=np.int64)
    for i, row in enumerate(rows):
        PackedRows(stream, plan, EOD).copy(i, row)
    return open_samples(run.megagpt, 8, None), rows


def test_an_epoch_draws_every_row_once_and_the_next_in_another_order(best_fit):
    data, rows = best_fit
    epochs = np.empty((2, *rows.shape), dtype=np.int64)
    for e in range(2):
        data.fill(e * len(rows), epochs[e])
        assert sorted(map(tuple, epochs[e])) == sorted(map(tuple, rows))
    assert not np.array_equal(epochs[0], epochs[1])
    assert data.epochs(len(rows)) == [1.0]


def test_the_spans_of_a_sample_are_what_its_row_holds(best_fit):
    data, rows = best_fit
    row = np.empty((1, SEQ_LEN + 1), dtype=np.int64)
    for sample in range(len(rows)):
        data.fill(sample, row)
        held = unmarked(row[0])
        tokens = np.concatenate([span.tokens for span in data.spans(sample)])
        assert held.tolist() == [EOD, *tokens, *[EOD] * (SEQ_LEN - len(tokens))]


def test_the_shares_of_padding_and_cuts_are_reported(best_fit):
    data, rows = best_fit
    lengths = data.datasets[0].stream("train").document_lengths()
    share = 1 - lengths.sum() / (len(rows) * SEQ_LEN)
    [line] = data.packing()
    assert line.endswith(f"{share:.2%} of them padding, {(lengths > SEQ_LEN).mean():.2%} of the documents cut")
    assert f"300 documents into {len(rows)} rows of 16 tokens" in line


# --- attention ------------------------------------------------------------------------------------------------


def model(attention: str = "sdpa") -> GPT:
    torch.manual_seed(0)
    gpt = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, seq_len=SEQ_LEN, attention=attention), VOCAB)
    for p in gpt.parameters():  # larger than GPT-2's, so that attention is not nearly uniform
        torch.nn.init.normal_(p, 0.0, 0.3)
    return gpt.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_of_a_packed_row_is_that_of_its_documents_alone(attention):
    documents = [torch.from_numpy(d) for d in documents_of([7, 4, 3])]
    eod = torch.tensor([EOD])
    row = torch.cat([eod, *documents, eod, eod])
    inputs = row[:SEQ_LEN].unsqueeze(0)
    targets = torch.cat([*documents, torch.full((2,), IGNORE)]).unsqueeze(0)
    gpt = model(attention)
    packed = next_token_loss(gpt(inputs, documents=document_numbers(inputs, EOD)), targets)
    alone = [next_token_loss(gpt(torch.cat([eod, d[:-1]]).unsqueeze(0)), d.unsqueeze(0)).item() for d in documents]
    assert packed.item() == pytest.approx(sum(x * len(d) for x, d in zip(alone, documents, strict=True)) / 14, rel=1e-5)
    crossing = next_token_loss(gpt(inputs), targets)
    assert abs(crossing.item() - packed.item()) > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_logit_has_no_gradient_from_other_documents_or_the_future(attention):
    gpt = model(attention)
    inputs = torch.from_numpy(np.concatenate([[EOD], *documents_of([6, 5, 5])])[:SEQ_LEN]).unsqueeze(0)
    documents = document_numbers(inputs, EOD)
    embedded: list[torch.Tensor] = []

    def keep(module, args, output):
        output.retain_grad()
        embedded.append(output)

    gpt.wte.register_forward_hook(keep)
    for t in range(SEQ_LEN):
        gpt(inputs, documents=documents)[0, t].sum().backward()
        seen = embedded[-1].grad[0].abs().sum(-1) > 0
        expected = (documents[0] == documents[0, t]) & (torch.arange(SEQ_LEN) <= t)
        assert torch.equal(seen, expected)


def test_documents_are_numbered_by_the_ends_before_them():
    inputs = torch.tensor([[5, 6, EOD, 7, EOD, EOD], [EOD, 3, 4, 5, EOD, 9]])
    assert document_numbers(inputs, EOD).tolist() == [[0, 0, 1, 1, 2, 3], [1, 1, 1, 1, 2, 2]]


# --- the table ------------------------------------------------------------------------------------------------


def test_the_table_of_methods_has_the_kinds_of_the_run_file():
    assert set(PACKING) == set(get_args(PackingConfig.model_fields["kind"].annotation))


def test_the_identity_of_a_checkpoint_tells_runs_apart_that_number_rows_otherwise():
    windows = packing_identity("concatenate", 64)
    assert windows == packing_identity("concatenate-masked", 32) == {"best-fit rows of": None}
    assert packing_identity("best-fit", 64) == {"best-fit rows of": 64}


def test_another_method_is_one_entry(monkeypatch):
    monkeypatch.setitem(PACKING, "first-fit", Packing(masked=True, plan_rows=plan_best_fit))
    documents = documents_of([9, 12, 3])
    lengths = np.array([9, 12, 3])
    rows = PACKING["first-fit"].tokens(Memory(documents), lambda: lengths, SEQ_LEN, EOD)
    assert isinstance(rows, PackedRows)
    assert PACKING["first-fit"].window(SEQ_LEN) == 1
    assert packing_identity("first-fit", 64) == {"best-fit rows of": None, "first-fit rows of": 64}


# --- in training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["concatenate-masked", "best-fit"])
def test_masked_training_learns_and_recomputing_changes_nothing(dataset, device, tmp_path, kind):
    packing = f"megagpt.packing.kind={kind}"
    recompute = 'megagpt.recompute={"policy": "full", "kind": "%s"}'
    train(debug_run(dataset, tmp_path / "plain", packing), device)
    losses = metric(tmp_path / "plain", "train/loss")
    assert losses[20] < losses[1] - 0.5
    for kind_of in ("torch", "deepspeed"):
        train(debug_run(dataset, tmp_path / kind_of, packing, recompute % kind_of), device, stop_at=6)
        assert metric(tmp_path / kind_of, "train/loss") == {step: losses[step] for step in range(1, 7)}
    assert packing_of(committed(tmp_path / "plain")[-1]).kind == kind


def test_a_change_that_would_renumber_the_rows_is_refused(dataset, device, tmp_path):
    short = "megagpt.schedule.max_steps=4"
    train(debug_run(dataset, tmp_path / "run", "megagpt.packing.kind=best-fit", short), device)
    for change in (["megagpt.packing.kind=concatenate"], ["megagpt.packing.kind=best-fit", "megagpt.data.seq_len=32"]):
        with pytest.raises(UserError, match=r"was saved with data \{'best-fit rows of': 64\}"):
            train(debug_run(dataset, tmp_path / "run", *change), device)


def test_validation_windows_are_plain_with_attention_masked_as_in_training(dataset):
    plain, masked = (
        open_data(DataConfig(train=[{"path": dataset}], val=dataset), SEQ_LEN, masked=masked)[0][""].windows
        for masked in (False, True)
    )
    assert (plain.document_end, masked.document_end) == (None, open_dataset(dataset).eod_id)
    rows = [
        next(prefetched(b.fill, [0], (2, SEQ_LEN + 1), torch.device("cpu"), document_end=b.document_end))
        for b in (plain, masked)
    ]
    assert torch.equal(rows[0].inputs, rows[1].inputs)
    assert torch.equal(rows[0].targets, rows[1].targets)
    assert rows[0].documents is None
    assert rows[1].documents is not None
