"""Generation, held against transformers' on the exported folder."""

import json
from pathlib import Path

import pytest
import torch
from data_support import small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config.generation import GenerationConfig
from megagpt.config.model import ModelConfig
from megagpt.config.regularization import NO_DROPOUT
from megagpt.huggingface.weights import config_json, renamed, write_weights
from megagpt.model.generate import complete
from megagpt.model.gpt import GPT
from megagpt.model.packed_weights import packed_weights
from megagpt.model.sampling import candidates, penalized
from megagpt.tokenizer.tokenizer import padded_vocab_size

T = 64  # positions
LLAMA = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "n_kv_head": 2, "tied": False}
PROMPTS = ["", "the cat sat on the mat and read", "def", "that"]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module", params=[{}, LLAMA], ids=["gpt2", "llama"])
def model(request, tokenizer) -> GPT:
    torch.manual_seed(0)
    cfg = ModelConfig(n_layer=3, n_head=4, n_embd=64, seq_len=T, **request.param)
    model = GPT(cfg, padded_vocab_size(tokenizer.vocab_size)).eval()
    for weight in model.parameters():  # as large as a trained model's, so that no two tokens are as likely
        weight.data.mul_(3.0)
    return model


@pytest.fixture(scope="module")
def theirs(model, tokenizer, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder: Path = tmp_path_factory.mktemp("exported")
    write_weights(renamed(model.state_dict(), model.cfg, tokenizer.vocab_size), folder, torch.float32)
    config = config_json(model.cfg, tokenizer.vocab_size, tokenizer.eod_id, NO_DROPOUT, "fp32")
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("packed", [False, True])
def test_greedy_texts_are_those_of_transformers(model, theirs, tokenizer, packed):
    cfg = GenerationConfig(max_tokens=30, temperature=0.0)
    with packed_weights(model, steps=30 if packed else 1):
        assert (model.lm_head.packed is not None) == packed
        texts = complete(model, tokenizer, PROMPTS, cfg)
    assert model.lm_head.packed is None
    for text in texts:
        ids = torch.tensor([text.context])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, pad_token_id=tokenizer.eod_id
        )[0, len(text.context) :]
        assert text.tokens == expected.tolist()
        with torch.no_grad():
            log_p = theirs(torch.tensor([[*text.context, *text.tokens]])).logits[0].log_softmax(-1)
        at = torch.arange(len(text.tokens))
        found = log_p[at + len(text.context) - 1, torch.tensor(text.tokens)]
        assert text.log_probabilities == pytest.approx(found.tolist(), abs=1e-4)


def test_packed_weights_change_logits_by_rounding_alone(model):
    tokens = torch.randint(100, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            other = GPT(model.cfg, model.wte.num_embeddings).eval()
            other.load_state_dict(model.state_dict())
            plain = other.to(dtype)(tokens)
            with packed_weights(other, steps=100):
                assert torch.allclose(other(tokens).float(), plain.float(), rtol=tolerance, atol=tolerance * 10)
            assert torch.equal(other(tokens), plain)


def test_nothing_is_packed_where_memory_is_short(model, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with packed_weights(model, steps=100):
        assert model.lm_head.packed is None


@settings(max_examples=60)
@given(
    st.lists(st.integers(-500, 500).map(lambda n: n / 100), min_size=2, max_size=12, unique=True),
    st.sets(st.integers(0, 1)),
    st.integers(0, 12),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
    st.floats(0.1, 5.0),
    st.floats(0.5, 2.0),
)
def test_the_distribution_is_that_of_transformers(logits, seen, top_k, top_p, min_p, temperature, penalty):
    from transformers import generation as theirs

    scores, ids = torch.tensor([logits]), torch.tensor([[*seen, *seen]], dtype=torch.int64)
    processors = [theirs.RepetitionPenaltyLogitsProcessor(penalty), theirs.TemperatureLogitsWarper(temperature)]
    processors += [theirs.TopKLogitsWarper(top_k)] if top_k else []
    processors += [theirs.TopPLogitsWarper(top_p), theirs.MinPLogitsWarper(min_p)]
    expected = scores
    for processor in processors:
        expected = processor(ids, expected)
    once = torch.zeros(1, len(logits), dtype=torch.bool).scatter(1, ids, True)
    p, tokens = candidates(penalized(scores, once, penalty) / temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = p if tokens is None else torch.zeros_like(scores).scatter(1, tokens, p)
    found, expected = found / found.sum(), expected.softmax(-1)
    # On the border of a filter rounding decides.
    assert torch.allclose(found, expected, atol=1e-5) or bool((found > 0).ne(expected > 0).sum() == 1)
