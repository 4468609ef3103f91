import math

import pytest
import torch
from torch import nn

from megagpt.config.model import ModelConfig
from megagpt.config.regularization import RegularizationConfig
from megagpt.model.attention import ATTENTION
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_loss
from megagpt.model.masks import document_positions
from megagpt.model.stochastic_depth import StochasticDepth

TINY = ModelConfig(n_layer=3, n_head=2, n_embd=32, seq_len=16)
VOCAB = 128


def build(dropout: float = 0.0, **changes) -> GPT:
    torch.manual_seed(0)
    return GPT(TINY.model_copy(update=changes), VOCAB, RegularizationConfig(dropout=dropout))


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def test_logits_equal_hugging_faces_on_the_same_weights():
    transformers = pytest.importorskip("transformers", reason="the huggingface extra is not installed")
    ours = build().eval()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=3, n_head=2)
    ).eval()
    weights = {}
    for name, weight in ours.state_dict().items():
        transposed = name.endswith("weight") and any(part in name for part in ("c_attn", "c_proj", "c_fc"))
        weights[name if name.startswith("lm_head") else f"transformer.{name}"] = weight.T if transposed else weight
    theirs.load_state_dict(weights)
    tokens = some_tokens(2, 16)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_parameters_carry_gpt2s_names():
    block = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    modules = ["wte", "wpe", *(f"h.{i}.{part}" for i in range(3) for part in block), "ln_f", "lm_head"]
    assert [name.removesuffix(".weight") for name in build().state_dict() if name.endswith("weight")] == modules


@pytest.mark.parametrize("n_keys", [1, 5, 9])
def test_attention_variants_agree_with_and_without_a_past(n_keys):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, min(4, n_keys), 8), torch.randn(2, 3, n_keys, 8), torch.randn(2, 3, n_keys, 8)
    torch.testing.assert_close(ATTENTION["sdpa"](q, k, v), ATTENTION["eager"](q, k, v))


def test_attention_variants_agree_under_a_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 8)
    _, mask = document_positions(torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [4, 4, 4, 4, 4, 4, 4, 4, 5]]))
    masked = ATTENTION["sdpa"](q, k, v, mask=mask)
    torch.testing.assert_close(masked, ATTENTION["eager"](q, k, v, mask=mask))
    torch.testing.assert_close(masked[0, :, 3:5], ATTENTION["eager"](*(x[:1, :, 3:5] for x in (q, k, v)))[0])


def test_documents_kept_apart_by_hand():
    positions, mask = document_positions(torch.tensor([[3, 3, 4, 4, 4]]))
    assert positions.tolist() == [[0, 1, 0, 1, 2]]
    assert mask.int().tolist() == [
        [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]]
    ]


def test_one_document_is_what_no_documents_are():
    tokens = some_tokens(2, 16)
    model = build().eval()
    torch.testing.assert_close(model(tokens, documents=torch.zeros_like(tokens)), model(tokens))


def test_a_token_never_sees_its_future():
    model, tokens = build().eval(), some_tokens(1, 16)
    changed = tokens.clone()
    changed[0, 9] = (changed[0, 9] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=0, rtol=0)
    assert not torch.allclose(before[:, 9], after[:, 9])


def test_untrained_loss_is_the_log_of_the_padded_vocabulary():
    tokens = some_tokens(8, 17)
    loss = next_token_loss(build()(tokens[:, :-1]), tokens[:, 1:])
    assert loss.item() == pytest.approx(math.log(VOCAB), rel=0.02)


def test_projections_into_the_residual_stream_start_smaller():
    model = GPT(ModelConfig(n_layer=8, n_head=4, n_embd=256, seq_len=16), VOCAB)
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03)
        elif p.ndim == 2 and "wpe" not in name:
            assert p.std().item() == pytest.approx(0.02, rel=0.03)


def test_head_and_embedding_are_one_parameter():
    model = build()
    assert model.lm_head.weight is model.wte.weight


def test_dropout_acts_in_training_alone():
    model, tokens = build(dropout=0.5), some_tokens(2, 16)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_dropout_touches_embeddings_attention_and_residuals(monkeypatch):
    calls = []
    original = nn.functional.dropout
    monkeypatch.setattr(
        "megagpt.model.gpt.F.dropout",
        lambda x, p, training: calls.append((tuple(x.shape), p)) or original(x, p, training),
    )
    attention_p = []
    sdpa = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "megagpt.model.attention.F.scaled_dot_product_attention",
        lambda *args, dropout_p, **kwargs: attention_p.append(dropout_p) or sdpa(*args, dropout_p=dropout_p, **kwargs),
    )
    build(dropout=0.25)(some_tokens(2, 16))
    assert calls == [((2, 16, 32), 0.25)] * (1 + 2 * TINY.n_layer)
    assert attention_p == [0.25] * TINY.n_layer
    calls.clear(), attention_p.clear()
    rates = RegularizationConfig(dropout=0.25, embedding_dropout=0.0, attention_dropout=0.5)
    GPT(TINY, VOCAB, rates)(some_tokens(2, 16))
    assert [p for _, p in calls] == [0.0, *[0.25] * (2 * TINY.n_layer)]
    assert attention_p == [0.5] * TINY.n_layer


DEEP = RegularizationConfig(stochastic_depth=0.5)


def test_skipping_blocks_is_by_hand_what_huang_et_al_describe(monkeypatch):
    """Of 2 blocks at 0.5 the first is skipped by 1/4 of the samples and the second by 1/2, as x + f(x) / (1 - rate)."""
    assert DEEP.skip_rates(2) == (0.25, 0.5)
    assert DEEP.model_copy(update={"stochastic_depth_shape": "constant"}).skip_rates(2) == (0.5, 0.5)
    assert DEEP.skip_rates(1) == (0.5,)
    model, tokens = GPT(TINY.model_copy(update={"n_layer": 2}), VOCAB, DEEP), some_tokens(4, 16)
    drawn = torch.tensor([[0.24, 0.26, 0.24, 0.26], [0.49, 0.49, 0.51, 0.51]])  # below the rate: skipped
    monkeypatch.setattr("torch.rand", lambda *shape, device: drawn)
    x = model.wte(tokens) + model.wpe(torch.arange(16))
    first, second = model.blocks()
    for i, block, rate in ((0, first, 0.25), (1, second, 0.5)):
        kept = (drawn[i] >= rate).float().view(4, 1, 1)
        x = x + kept * (block(x) - x) / (1 - rate)
    torch.testing.assert_close(model(tokens), model.lm_head(model.ln_f(x)), atol=1e-5, rtol=1e-5)


def test_no_block_is_skipped_in_evaluation_and_generation():
    model, tokens = GPT(TINY, VOCAB, DEEP).eval(), some_tokens(2, 16)
    plain = GPT(TINY, VOCAB).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(model(tokens, model.new_caches(2)), plain(tokens, plain.new_caches(2)))


def test_a_skipped_block_gets_no_gradient_and_the_mean_is_that_of_all_blocks():
    """Of 4,000 draws the mean of what a block adds is within 5 standard errors of what it adds without skipping."""
    depth = StochasticDepth((0.3,))
    x, y = torch.zeros(4000, 1, 1), torch.ones(4000, 1, 1, requires_grad=True)
    kept = depth.draw(4000, x.device)
    out = depth.after(0, x, y, kept)
    assert out.mean().item() == pytest.approx(1.0, abs=5 * (0.3 / 0.7 / 4000) ** 0.5)
    out.sum().backward()
    assert torch.equal(y.grad != 0, kept[0])


def test_too_many_positions_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match="position 17 does not fit the model's 16 positions"):
        build()(some_tokens(1, 17))


def test_cached_logits_equal_uncached():
    model, tokens = build().eval(), some_tokens(2, 16)
    caches = model.new_caches(2)
    pieces = [model(tokens[:, a:b], caches) for a, b in [(0, 5), (5, 6), (6, 10), (10, 16)]]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), atol=1e-5, rtol=1e-5)
