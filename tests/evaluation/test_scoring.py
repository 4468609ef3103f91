"""Continuations score what their own logits say, whatever the batch, also where the context is cut."""

import math
import random

import pytest
import torch

from megagpt.config.model import ModelConfig
from megagpt.errors import UserError
from megagpt.evaluation.scoring import Continuation, Scored, score_continuations
from megagpt.model.gpt import GPT

SEQ_LEN, VOCAB_SIZE, PADDED = 16, 100, 128


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, seq_len=SEQ_LEN), PADDED)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)  # far from uniform, so that a wrong place would show
    return model


def by_logits(model: GPT, one: Continuation) -> Scored:
    """The definition, on one text alone."""
    tokens = [*one.context, *one.ids][-(SEQ_LEN + 1) :]
    with torch.no_grad():
        log_p = model(torch.tensor([tokens[:-1]]))[0, :, :VOCAB_SIZE].double().log_softmax(-1)
    places = range(len(tokens) - 1 - len(one.ids), len(tokens) - 1)
    greedy = all(log_p[place].argmax() == tokens[place + 1] for place in places)
    return Scored(sum(log_p[place, tokens[place + 1]].item() for place in places), greedy)


def likeliest(model: GPT, context: list[int], n: int) -> list[int]:
    ids: list[int] = []
    for _ in range(n):
        ids.append(int(model(torch.tensor([context + ids]))[0, -1, :VOCAB_SIZE].argmax()))
    return ids


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_a_continuation_scores_what_its_own_logits_say(model, micro_batch):
    rng = random.Random(0)
    wanted = [
        Continuation(rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 2 * SEQ_LEN)), rng.choices(range(VOCAB_SIZE), k=n))
        for n in [1, 1, 2, 5, 9, SEQ_LEN, SEQ_LEN]
    ]
    wanted += [Continuation(context, likeliest(model, context, 3)) for context in ([1], [5, 6, 7])]
    found = score_continuations(model, wanted, vocab_size=VOCAB_SIZE, micro_batch=micro_batch)
    expected = [by_logits(model, one) for one in wanted]
    assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]
    assert [one.is_greedy for one in found][-2:] == [True, True]
    # fp32 against fp64 of the same logits: 1e-6 of log probabilities of up to some tens, added up
    assert [one.log_probability for one in found] == pytest.approx([one.log_probability for one in expected], rel=1e-5)


def test_ids_that_pad_the_vocabulary_take_no_probability(model):
    each = [Continuation([3], [token]) for token in range(VOCAB_SIZE)]
    found = score_continuations(model, each, vocab_size=VOCAB_SIZE, micro_batch=50)
    assert sum(math.exp(one.log_probability) for one in found) == pytest.approx(1.0, abs=1e-5)
    assert sum(one.is_greedy for one in found) == 1


def test_output_that_is_not_finite_is_no_score(model):
    broken = GPT(model.cfg, PADDED)
    broken.ln_f.weight.data[0] = math.nan
    with pytest.raises(UserError, match="the model's output is not finite"):
        score_continuations(broken, [Continuation([1], [2])], vocab_size=VOCAB_SIZE, micro_batch=1)
