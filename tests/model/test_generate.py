import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.schema import ModelConfig
from megagpt.model.generate import generate, pick
from megagpt.model.gpt import GPT

VOCAB, EOD = 100, 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, seq_len=16), 128).eval()


def run(model, prompt, **options):
    settings = {"max_tokens": 8, "vocab_size": VOCAB, "eod_id": EOD, "temperature": 1.0} | options
    return generate(model, torch.tensor(prompt), generator=torch.Generator().manual_seed(3), **settings)


@pytest.mark.parametrize("prompt_length", [1, 5, 16, 20])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_equals_uncached_also_beyond_the_models_positions(model, prompt_length, temperature):
    prompt = [[7] * prompt_length, [9] * prompt_length]
    cached = run(model, prompt, max_tokens=40, temperature=temperature)
    assert torch.equal(cached, run(model, prompt, max_tokens=40, temperature=temperature, use_cache=False))
    assert cached.size(1) > 16 or (cached[:, -1] == EOD).all()


def test_the_same_seed_gives_the_same_text_and_rows_differ(model):
    texts = run(model, [[7, 8]] * 3, max_tokens=12)
    assert torch.equal(texts, run(model, [[7, 8]] * 3, max_tokens=12))
    assert len({tuple(row) for row in texts.tolist()}) == 3


def test_padded_ids_are_never_picked(model):
    assert run(model, [[1]] * 50, max_tokens=30, temperature=5.0, vocab_size=10).max() < 10


def test_a_text_that_ended_stays_ended(model, monkeypatch):
    picks = iter([[5, EOD], [6, 7], [EOD, 8], [9, 9]])
    monkeypatch.setattr("megagpt.model.generate.pick", lambda *_, **__: torch.tensor(next(picks)).unsqueeze(1))
    assert run(model, [[1], [1]]).tolist() == [[1, 5, 6, EOD], [1, EOD, EOD, EOD]]


def test_generating_leaves_the_model_in_its_mode(model):
    model.train()
    run(model, [[1]])
    assert model.training
    model.eval()


def picks(logits, n=400, **options):
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    rows = torch.tensor([logits]).expand(n, -1)
    return set(pick(rows, generator=torch.Generator().manual_seed(0), **settings).flatten().tolist())


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert picks(logits) == {0, 1, 2, 3}
    assert picks(logits, top_k=2) == {0, 1}
    assert picks(logits, top_p=0.5) == {0}
    assert picks(logits, top_p=0.51) == {0, 1}
    assert picks(logits, top_p=0.96) == {0, 1, 2, 3}
    assert picks(logits, temperature=0.0) == {0}
    assert picks(logits, temperature=1e-4) == {0}


@settings(max_examples=50)
@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=9),
    st.integers(0, 9),
    st.floats(0.01, 1.0),
    st.floats(0.1, 5.0),
)
def test_every_pick_is_among_the_top_k(logits, top_k, top_p, temperature):
    scaled = (torch.tensor(logits) / temperature).tolist()  # in fp32, as picked from: close logits may tie there
    allowed = sorted(scaled, reverse=True)[: top_k or None]
    assert all(scaled[i] >= allowed[-1] for i in picks(logits, 20, top_k=top_k, top_p=top_p, temperature=temperature))
