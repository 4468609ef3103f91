"""Each choice of the model's parts equals a reference: transformers' Llama and Qwen3, a formula, or another choice."""

import math

import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from model_support import SIZES, TOKENS, VOCAB, model_of
from pydantic import ValidationError

from megagpt.config.model import PRESETS, ModelConfig
from megagpt.config.recompute import RecomputeConfig
from megagpt.config.regularization import NO_DROPOUT
from megagpt.data.loss_mask import IGNORE
from megagpt.errors import UserError
from megagpt.huggingface.weights import class_of, config_json, renamed
from megagpt.model import loss as loss_module
from megagpt.model.flops import n_params, param_sizes
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_loss, next_token_score, token_nats
from megagpt.model.positions import alibi_mask, alibi_slopes, rotary_tables, rotate, sinusoidal
from megagpt.model.recompute import recompute_blocks

CHOICES = [
    *({"preset": preset} for preset in PRESETS),
    *({"position": position} for position in ("sinusoidal", "rotary", "alibi")),
    {"position": "rotary", "rotary_base": 500.0, "rotary_scaling": 4.0},
    *({"norm": norm, "qk_norm": True} for norm in ("layernorm", "rmsnorm", "rmsnorm_unweighted")),
    *({"mlp": mlp} for mlp in ("relu2", "swiglu", "geglu")),
    {"mlp": "geglu", "mlp_width": 40},
    *({"n_kv_head": n, "position": "rotary"} for n in (1, 2)),
    {"bias": False, "tied": False},
    {"preset": "llama", "n_kv_head": 2, "attention": "eager"},
    {"position": "alibi", "attention": "eager", "n_kv_head": 2},
    {"logit_softcap": 2.0},
    {"embedding_shortcut": True},
    {"sliding_window": 5, "position": "rotary"},
    {"sliding_window": 1, "sliding_window_pattern": 2, "position": "alibi", "value_residual": True},
    {"value_residual": True, "embedding_shortcut": True, "position": "rotary", "n_kv_head": 2},
]


def name(choice: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in choice.items())


every_choice = pytest.mark.parametrize("choice", CHOICES, ids=name)
SHAPES = [{}, {"n_kv_head": 2}, {"n_kv_head": 1, "rotary_scaling": 3.0}, {"mlp_width": 40, "norm_eps": 1e-2}]


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("more", SHAPES)
def test_logits_are_those_of_transformers(more, qk_norm):
    """Those of Llama and, with norms of queries and keys, of Qwen3, by the names and settings of an export."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    ours = model_of({"preset": "llama", "qk_norm": qk_norm, "rotary_base": 500.0, **more}).eval()
    config_of, causal_lm = (Qwen3Config, Qwen3ForCausalLM) if qk_norm else (LlamaConfig, LlamaForCausalLM)
    theirs = causal_lm(config_of(**config_json(ours.cfg, 100, 0, NO_DROPOUT, "fp32"))).eval()
    theirs.load_state_dict(renamed(ours.state_dict(), ours.cfg, 100), strict=True)
    with torch.no_grad():
        expected, found = theirs(TOKENS % 100).logits, ours(TOKENS % 100)[..., :100]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * max(10.0, expected.abs().max().item()))


@pytest.mark.parametrize("more", [{}, {"tied": False}, {"mlp_width": 40, "norm_eps": 1e-2}])
def test_logits_are_those_of_transformers_gpt2(more):
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = model_of(more).eval()
    theirs = GPT2LMHeadModel(GPT2Config(**config_json(ours.cfg, 100, 0, NO_DROPOUT, "fp32"))).eval()
    theirs.load_state_dict(renamed(ours.state_dict(), ours.cfg, 100), strict=False)
    with torch.no_grad():
        expected, found = theirs(TOKENS % 100).logits, ours(TOKENS % 100)[..., :100]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * max(10.0, expected.abs().max().item()))


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        ({"preset": "speedrun"}, "megagpt.model.norm=rmsnorm_unweighted, megagpt.model.mlp=relu2"),
        ({"position": "alibi"}, "a model with megagpt.model.position=alibi;"),
        ({"n_kv_head": 1}, "a model with megagpt.model.n_kv_head=1;"),
        ({"preset": "llama", "sliding_window": 8}, "a model with megagpt.model.sliding_window=8;"),
        ({"value_residual": True}, "a model with megagpt.model.value_residual=True;"),
        ({"preset": "llama", "embedding_shortcut": True}, "a model with megagpt.model.embedding_shortcut=True;"),
        ({"preset": "llama", "logit_softcap": 30.0}, "a model with megagpt.model.logit_softcap=30.0;"),
    ],
)
def test_what_transformers_does_not_compute_is_not_exported(choice, complaint):
    with pytest.raises(UserError, match=complaint):
        class_of(ModelConfig(**SIZES, **choice))


def test_the_preset_gpt2_is_what_no_preset_is():
    assert ModelConfig(preset="gpt2").model_dump() == ModelConfig().model_dump()
    sizes = {"n_layer": 12, "n_head": 12, "n_embd": 768, "seq_len": 1024, "attention": "sdpa"}
    assert ModelConfig().identity() == sizes  # as older checkpoints have it


@every_choice
def test_what_is_written_out_is_the_same_model(choice):
    """And is one for a checkpoint, also where a width is written that was the default."""
    cfg = ModelConfig(**SIZES, **choice)
    again = ModelConfig(**cfg.model_dump())
    in_numbers = ModelConfig(**(cfg.model_dump() | {"n_kv_head": cfg.kv_heads, "mlp_width": cfg.mlp_inner}))
    assert again.identity() == in_numbers.identity() == cfg.identity()
    assert ModelConfig.whole(cfg.identity()) == ModelConfig.whole(cfg.model_dump())


@every_choice
def test_parameters_are_counted(choice):
    model = model_of(choice)
    assert sorted(param_sizes(model.cfg, VOCAB)) == sorted(p.numel() for p in model.parameters())
    assert n_params(model.cfg, VOCAB) == sum(p.numel() for p in model.parameters())


@every_choice
def test_generation_with_caches_equals_the_whole_text(choice):
    model = model_of(choice).eval()
    caches = model.new_caches(1)
    with torch.no_grad():
        parts = [model(part, caches) for part in TOKENS.split([7, 1, 1, 15], dim=1)]
        assert torch.allclose(torch.cat(parts, dim=1), model(TOKENS), atol=1e-4, rtol=1e-5)


@every_choice
def test_texts_of_different_lengths_are_computed_together_as_if_alone(choice):
    model = model_of(choice).eval()
    texts = [TOKENS[:, :3], TOKENS[:, 5:13]]
    together, alone = model.new_caches(2), [model.new_caches(1) for _ in texts]
    with torch.no_grad():
        for row, text in enumerate(texts):
            model(text, together.row(row))
            model(text, alone[row])
        together.lengths = [text.size(1) for text in texts]
        new = TOKENS[:, 20:22].T  # (2, 1)
        found = model(new, together)
        expected = torch.cat([model(token.view(1, 1), cache) for token, cache in zip(new, alone, strict=True)])
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)


@every_choice
def test_a_packed_document_is_computed_as_if_alone(choice):
    model = model_of(choice).eval()
    documents = torch.tensor([[3] * 9 + [4] * 15])
    with torch.no_grad():
        packed = model(TOKENS, documents=documents)
        alone = torch.cat([model(part) for part in TOKENS.split([9, 15], dim=1)], dim=1)
    assert torch.allclose(packed, alone, atol=1e-4, rtol=1e-5)


@every_choice
def test_both_attentions_are_one(choice):
    models = [model_of({**choice, "attention": attention}).eval() for attention in ("sdpa", "eager")]
    with torch.no_grad():
        one, other = (model(TOKENS) for model in models)
    assert torch.allclose(one, other, atol=1e-4, rtol=1e-5)


@every_choice
def test_no_position_sees_a_later_one(choice):
    model = model_of(choice).eval()
    changed = TOKENS.clone()
    changed[0, 10] = 99
    with torch.no_grad():
        before, after = model(TOKENS)[0], model(changed)[0]
    assert torch.equal(before[:10], after[:10])
    assert not torch.allclose(before[10:], after[10:])


@pytest.mark.parametrize("zero3", [False, True])
@pytest.mark.parametrize("policy", ["selective", "full"])
@every_choice
def test_recomputing_changes_no_gradient(choice, policy, zero3, monkeypatch):
    linear = zero3_linear_wrap if zero3 else torch._C._nn.linear  # zero.Init puts its own there for good
    monkeypatch.setattr(F, "linear", linear)
    targets = TOKENS.roll(-1, 1)
    grads = []
    for recompute in (RecomputeConfig(), RecomputeConfig(policy=policy)):
        model = model_of(choice).train()
        model.recompute = recompute_blocks(recompute, NO_DROPOUT)
        model(TOKENS, score=next_token_score(targets)).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("rows", ["whole", "chunks", "blocks"])
def test_the_capped_loss_in_chunks_is_the_plain_one(softcap, rows, monkeypatch):
    """Loss and gradients, against autograd through the formula itself."""
    if rows == "chunks":
        monkeypatch.setattr(loss_module, "CHUNK_BYTES", 4 * 5 * VOCAB)
    if rows == "blocks":
        monkeypatch.setattr(loss_module, "ROW_BLOCK_BYTES", 4 * 3 * VOCAB)
    torch.manual_seed(0)
    targets = torch.where(torch.rand(2, 9) < 0.2, IGNORE, torch.randint(VOCAB, (2, 9)))
    found = []
    for way in ("score", "formula"):
        torch.manual_seed(1)
        x, weight = torch.randn(2, 9, 48, requires_grad=True), torch.randn(VOCAB, 48, requires_grad=True)
        options = {"label_smoothing": 0.1, "z_loss": 0.01}
        if way == "score":
            loss = next_token_score(targets, **options)(x, weight, softcap)
        else:
            logits = F.linear(x, weight)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            loss = next_token_loss(logits, targets, **options)
        loss.backward()
        found.append((loss.detach(), x.grad, weight.grad))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)


def test_evaluation_and_training_have_one_capped_loss():
    model = model_of({"logit_softcap": 2.0}).eval()
    targets = TOKENS.roll(-1, 1)
    with torch.no_grad():
        nats = model(TOKENS, score=token_nats(targets))
        by_logits = F.cross_entropy(model(TOKENS)[0], targets[0], reduction="none")
        assert torch.allclose(nats[0], by_logits, atol=1e-5)
        assert model(TOKENS).abs().max() < 2.0
        assert torch.allclose(model(TOKENS, score=next_token_score(targets)), nats.mean(), atol=1e-5)


def test_sinusoidal_positions_by_hand():
    """Position 3 of width 4: sines of 3 and 3 / 100, then their cosines."""
    expected = [math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]
    assert sinusoidal(torch.tensor([3]), 4)[0].tolist() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 500))
def test_a_rotated_product_depends_on_the_distance_alone(i, j, shift):
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def product(a: int, b: int) -> float:
        turned = [rotate(x, rotary_tables(torch.tensor([at]), 8, 100.0, 1.0)) for x, at in ((q, a), (k, b))]
        return (turned[0] * turned[1]).sum().item()

    assert product(i, j) == pytest.approx(product(i + shift, j + shift), abs=1e-4)  # angles are fp32


def test_scaled_rotary_positions_are_interpolated():
    one, other = (rotary_tables(torch.tensor([at]), 8, 100.0, by) for at, by in ((12, 4.0), (3, 1.0)))
    assert torch.equal(one, other)


def test_alibis_slopes_are_the_papers():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6) == pytest.approx([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3])
    assert alibi_slopes(1) == [2.0**-8]


def test_alibi_by_hand():
    """One head's slope is 2^-8; the query at position 2 sees the keys at 0 to 2, and not the one at 3."""
    slope = 2.0**-8
    assert alibi_mask(1, torch.tensor([2, 3]), 4, None)[0, 0].tolist() == [
        [-2 * slope, -slope, 0.0, -math.inf],
        [-3 * slope, -2 * slope, -slope, 0.0],
    ]


def test_what_is_zero_at_the_start_leaves_even_odds():
    """The blocks add nothing, and an untied head gives every token the same logit."""
    model = GPT(ModelConfig(**SIZES, preset="speedrun"), VOCAB).eval()
    with torch.no_grad():
        assert model(TOKENS).abs().max() == 0.0
        x = model.wte(TOKENS)
        assert torch.equal(model.h[0](x), x)


@pytest.mark.parametrize(
    ("choice", "complaint"),
    [
        (
            {"preset": "llama", "norm": "layernorm", "tied": True},
            "norm='layernorm', megagpt.model.tied=True: that contradicts megagpt.model.preset=llama",
        ),
        ({"preset": "gpt2", "position": "rotary"}, "contradicts megagpt.model.preset=gpt2"),
        ({"n_kv_head": 3}, "set megagpt.model.n_kv_head to 2"),
        ({"n_kv_head": 8}, "set megagpt.model.n_kv_head to 4"),
        ({"n_embd": 20, "position": "rotary"}, "a width of 5 is odd"),
        ({"n_embd": 21, "n_head": 1, "position": "sinusoidal"}, "a width of 21 is odd"),
        ({"rotary_base": 5e5}, "set megagpt.model.position to rotary"),
        ({"rotary_scaling": 0.5, "position": "rotary"}, "greater than or equal to 1"),
        ({"logit_softcap": 0}, "greater than 0"),
        ({"sliding_window": 0}, "greater than 0"),
        ({"sliding_window_pattern": 2}, "set megagpt.model.sliding_window"),
        ({"sliding_window": 5, "sliding_window_pattern": 3}, "attend to all positions; remove it"),
        ({"sliding_window": 5, "sliding_window_pattern": 1}, "greater than or equal to 2"),
        ({"value_residual": True, "n_layer": 1}, "value_residual=true has no effect with megagpt.model.n_layer=1"),
        ({"embedding_shortcut": True, "n_layer": 1}, "embedding_shortcut=true has no effect"),
        ({"preset": "mistral"}, "'gpt2', 'llama' or 'speedrun'"),
    ],
)
def test_what_does_not_fit_is_told(choice, complaint):
    with pytest.raises(ValidationError, match=complaint):
        ModelConfig(**{**SIZES, **choice})
