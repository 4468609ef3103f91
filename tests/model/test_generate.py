"""Texts generated together, alone, with and without a cache are one text; log probabilities are the model's."""

import pytest
import torch

from megagpt.config.generation import GenerationConfig
from megagpt.config.model import ModelConfig
from megagpt.data.dataset import open_dataset
from megagpt.model.generate import complete
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import padded_vocab_size

T = 16  # positions
PROMPTS = ["abc", "", "hello", "abcdefghijklmnop" * 2, "x" * (T - 2), "y" * (T - 1), "z" * T]


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return open_dataset(dataset).tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    cfg = ModelConfig(n_layer=2, n_head=2, n_embd=32, seq_len=T)
    return GPT(cfg, padded_vocab_size(tokenizer.vocab_size)).eval()


def texts(model, tokenizer, prompts, *, seed=3, batch=1, **options):
    cfg = GenerationConfig(**{"max_tokens": 3 * T, "temperature": 1.5} | options)
    return complete(model, tokenizer, prompts, cfg, seed=seed, batch=batch)


@torch.no_grad()
def one_by_one(model, tokenizer, prompt, n):
    """The likeliest tokens by whole forward passes over the window, and their log probabilities."""
    ids, begin, found = [tokenizer.eod_id, *tokenizer.encode(prompt).tolist()], 0, []
    for _ in range(n):
        begin = max(begin, len(ids) - T) if not found else begin
        if len(ids) - begin > T:
            begin = len(ids) - T // 2
        log_p = model(torch.tensor([ids[begin:]]))[0, -1, : tokenizer.vocab_size].log_softmax(-1)
        found.append((int(log_p.argmax()), float(log_p.max())))
        ids.append(found[-1][0])
        if ids[-1] == tokenizer.eod_id:
            break
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_together_texts_of_any_length_are_those_of_whole_passes_over_each(model, tokenizer, attention):
    other = GPT(model.cfg.model_copy(update={"attention": attention}), model.wte.num_embeddings).eval()
    other.load_state_dict(model.state_dict())
    for prompt, text in zip(PROMPTS, texts(other, tokenizer, PROMPTS, temperature=0.0), strict=True):
        expected = one_by_one(model, tokenizer, prompt, 3 * T)
        assert text.tokens == [token for token, _ in expected]
        assert text.log_probabilities == pytest.approx([p for _, p in expected], abs=1e-4)


def test_a_seed_gives_the_same_text_at_any_batch_size_and_place(model, tokenizer):
    together = texts(model, tokenizer, PROMPTS, repetition_penalty=1.2)
    for i, text in enumerate(together):
        [alone] = texts(model, tokenizer, [text.prompt], seed=3 + i, repetition_penalty=1.2)
        assert (alone.tokens, alone.ended) == (text.tokens, text.ended)
        assert alone.log_probabilities == pytest.approx(text.log_probabilities, abs=1e-4)
    several = texts(model, tokenizer, ["abc"], batch=3)
    assert [text.tokens for text in several] == [text.tokens for text in texts(model, tokenizer, ["abc"] * 3)]
    assert len({tuple(text.tokens) for text in several}) == 3


def test_padded_ids_are_never_picked(model, tokenizer):
    assert model.wte.num_embeddings > tokenizer.vocab_size
    found = texts(model, tokenizer, [""], batch=20, temperature=100.0, top_k=0)
    assert max(max(text.tokens) for text in found) < tokenizer.vocab_size


def test_a_text_ends_with_its_document_or_its_length(model, tokenizer):
    found = texts(model, tokenizer, [""], batch=40, max_tokens=40, temperature=100.0, top_k=0)
    ended = [text for text in found if text.ended == "end of document"]
    assert 0 < len(ended) < 40
    for text in found:
        at = text.tokens.index(tokenizer.eod_id) + 1 if tokenizer.eod_id in text.tokens else 40
        assert (len(text.tokens), text.ended == "length") == (at, text not in ended)
        assert text.text == tokenizer.decode(text.tokens)


def test_a_penalty_lets_no_token_come_back_and_spares_the_end_of_a_document(model, tokenizer):
    [text] = texts(model, tokenizer, ["abc"], max_tokens=T, temperature=0.0, repetition_penalty=100.0)
    assert len(set(text.tokens)) == len(text.tokens)
    assert set(text.tokens).isdisjoint(tokenizer.encode("abc").tolist())
    first = [texts(model, tokenizer, [""], max_tokens=1, repetition_penalty=p, batch=50)[0].tokens for p in (1, 100)]
    assert first[0] == first[1]  # there is no text yet


def test_generating_leaves_the_model_in_its_mode(model, tokenizer):
    model.train()
    texts(model, tokenizer, [""], max_tokens=1)
    assert model.training
    model.eval()
