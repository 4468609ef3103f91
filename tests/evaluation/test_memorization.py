"""`megagpt evaluate --memorization`: which passages a run has read, how often, and what the model recites of them."""

import shutil

import numpy as np
import pytest
import torch
from data_support import documents_of
from support import DEBUG_RUN, debug_run, overrides

from megagpt.__main__ import main
from megagpt.checkpoint.load import load_model
from megagpt.checkpoint.run_samples import next_samples
from megagpt.cli.pretrain import pretrain
from megagpt.config.model import ModelConfig
from megagpt.data.dataset import open_dataset
from megagpt.data.loss_mask import unmarked
from megagpt.data.mixture import Mixture
from megagpt.data.packing import PACKING
from megagpt.data.times_read import trained_samples
from megagpt.data.training_set import TrainingSet, source_of
from megagpt.errors import UserError
from megagpt.evaluation.memorization import Recited, recited, right_tokens, training_passages, unread_passages
from megagpt.evaluation.scoring import Continuation, score_continuations
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_score
from megagpt.tokenizer.tokenizer import padded_vocab_size

STEPS = 25


@pytest.fixture(scope="module")
def noise(dataset):
    """Random letters, in which no passage comes twice."""
    return open_dataset(dataset.parent / "noise")


def rows_of(data: TrainingSet, step: int) -> list[bytes]:
    """The rows that the steps up to this one read, in a form in which one can search."""
    rows = []
    for sample in (sample for one in range(1, step + 1) for sample in data.mixture.samples_of(one)):
        width = next(s.seq_len for s in reversed(data.mixture.segments) if s.first_sample <= sample)
        row = np.empty((1, (width if width > 1 else 64) + 1), np.int64)
        data.fill(sample, row)
        rows.append(searchable(unmarked(row[0])))
    return rows


def searchable(tokens: np.ndarray) -> bytes:
    return "".join(map(chr, tokens)).encode()


def check_times(data: TrainingSet, kind: str, half: int, step: int = STEPS) -> np.ndarray:
    passages, times = training_passages(data, PACKING[kind], step, 60, half)
    rows = rows_of(data, step)
    assert times.tolist() == [sum(searchable(passage) in row for row in rows) for passage in passages]
    assert len(passages) == 60
    return times


@pytest.mark.parametrize("kind", PACKING)
def test_a_passage_was_read_as_often_as_it_stands_in_the_rows(noise, tmp_path, kind):
    cfg = debug_run(noise.path, tmp_path, f"megagpt.packing.kind={kind}", "megagpt.augment.goldfish.k=4").megagpt
    times = check_times(next_samples(cfg, 8, None, [noise]), kind, 10)
    assert len(set(times.tolist())) > 1


def test_so_it_was_after_a_roll_back_with_other_lengths_batches_and_weights(noise, dataset):
    other = open_dataset(dataset)
    mixture = Mixture(1).continued([(source_of(noise), 1.0)], step=0, sample=0, seq_len=64, global_batch=8)
    mixture = mixture.jumped(step=10, sample=120)
    both = [(source_of(noise), 3.0), (source_of(other), 1.0)]
    mixture = mixture.continued(both, step=20, sample=200, seq_len=48, global_batch=6)
    data = TrainingSet(mixture, [noise, other])
    check_times(data, "concatenate", 10)
    expected = [sample for step in range(1, STEPS + 1) for sample in mixture.samples_of(step)]
    assert [sample for part in trained_samples(mixture, STEPS) for sample in part] == expected
    assert not set(range(80, 120)) & set(expected)


def test_a_passage_is_text_of_one_document(noise, dataset):
    tokenizer = noise.tokenizer()
    mixture = Mixture(1).continued([(source_of(noise), 1.0)], step=0, sample=0, seq_len=64, global_batch=8)
    passages, _ = training_passages(TrainingSet(mixture, [noise]), PACKING["concatenate"], STEPS, 20, 10)
    unread = unread_passages(noise.stream("val"), 20, 10)
    texts = documents_of(noise.path)
    for split, found in (("train", passages), ("val", unread)):
        assert len(found) == 20
        assert all(any(tokenizer.decode(passage) in text for text in texts[split]) for passage in found)


def test_documents_that_are_shorter_than_a_passage_are_one_message(noise):
    mixture = Mixture(1).continued([(source_of(noise), 1.0)], step=0, sample=0, seq_len=256, global_batch=8)
    with pytest.raises(UserError, match=r"samples begins with 128 tokens of one document"):
        training_passages(TrainingSet(mixture, [noise]), PACKING["concatenate"], STEPS, 20, 64)
    assert len(unread_passages(noise.stream("val"), 20, 64)) == 0


def test_a_model_that_knows_its_text_by_heart_recites_it_and_no_other(noise):
    """Of eight random letters one in eight is right by chance."""
    torch.manual_seed(0)
    tokenizer = noise.tokenizer()
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=64, seq_len=32), padded_vocab_size(tokenizer.vocab_size))
    read, unread = (unread_passages(noise.stream(split), 12, 10) for split in ("train", "val"))
    inputs, targets = (torch.from_numpy(read[:, part]) for part in (slice(None, -1), slice(1, None)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    for _ in range(150):
        optimizer.zero_grad()
        model(inputs, score=next_token_score(targets)).backward()
        optimizer.step()
    found = [
        recited(right_tokens(model, tokenizer, passages, begins_documents=False, micro_batch=8))
        for passages in (read, unread)
    ]
    assert found[0] == Recited(12, 1.0, 1.0)
    assert found[1].exactly == 0.0
    assert found[1].tokens < 0.4


@pytest.fixture(scope="module")
def trained(dataset, device, tmp_path_factory):
    """A run of two steps in the folder `run`, on data in the folder `data` next to it."""
    folder = tmp_path_factory.mktemp("trained")
    data = shutil.copytree(dataset, folder / "data")
    steps = [
        "megagpt.schedule.max_steps=2",
        "megagpt.schedule.warmup_steps=0",
        "megagpt.every.sample=0",
        "megagpt.every.save=1",
    ]
    assert pretrain(["--deepspeed_config", str(DEBUG_RUN), *overrides(data, folder / "run", *steps)]) == 0
    return folder


def test_what_comes_whole_is_what_scores_as_greedy(trained):
    """Two ways to one fact; some of the passages are what the model says, so that some come whole."""
    model, tokenizer, *_ = load_model(trained / "run", torch.device("cpu"))
    passages = unread_passages(open_dataset(trained / "data").stream("val"), 12, 4)
    for wanted in passages[::2]:
        for at in range(4, 8):
            with torch.no_grad():
                logits = model(torch.tensor([wanted[:at].tolist()]))[0, -1, : tokenizer.vocab_size]
            wanted[at] = logits.argmax()
    found = [
        right_tokens(model, tokenizer, passages, begins_documents=False, micro_batch=size).tolist() for size in (1, 5)
    ]
    assert found[0] == found[1]
    asked = [Continuation(passage[:4].tolist(), passage[4:].tolist()) for passage in passages]
    scored = score_continuations(model, asked, vocab_size=tokenizer.vocab_size, micro_batch=4)
    assert [all(tokens) for tokens in found[0]] == [one.is_greedy for one in scored]
    assert all(one.is_greedy for one in scored[::2])


def test_the_table_has_the_baseline_and_mistakes_are_one_message(trained, capsys):
    run, data = str(trained / "run"), trained / "data"
    capsys.readouterr()
    assert main(["evaluate", run, "--memorization", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("16 tokens after 16 tokens, greedy:")
    assert lines[2].split()[:4] == ["read", "1", "time", "9"]
    assert lines[3].split()[:4] == ["validation,", "not", "read", "9"]
    for options, complaint in (
        (["--tokens", "5"], "--tokens has no effect on --memorization, whose data is its own; remove it"),
        (["--data", str(data)], "--data has no effect on --memorization"),
        (["--split", "test"], "--split has no effect on --memorization"),
        (["--tasks", "x"], "--tasks and --memorization are both given; give one at a time"),
        (["--limit", "5"], "--limit 5 is for --tasks; give --memorization N for N passages"),
    ):
        assert main(["evaluate", run, "--memorization", "9", *options]) == 2
        assert complaint in capsys.readouterr().err
    steps = [f"{run}/checkpoints/step_{step:08}" for step in (1, 2)]
    assert main(["average", *steps, str(trained / "averaged")]) == 0
    assert main(["evaluate", str(trained / "averaged"), "--memorization"]) == 2
    assert "averaged, so that there is no record of what it has read" in capsys.readouterr().err
    data.rename(trained / "moved")
    assert main(["evaluate", run, "--memorization"]) == 2
    assert f"read {data}, which is not here, and only what it read can be recited" in capsys.readouterr().err
    (trained / "moved").rename(data)
