"""Value residuals, embedding shortcuts and sliding windows equal a formula, or transformers' Mistral and Qwen3."""

import math

import pytest
import torch
from model_support import SIZES, TOKENS, VOCAB, model_of

from megagpt.config.model import ModelConfig
from megagpt.config.regularization import NO_DROPOUT
from megagpt.huggingface.weights import config_json, renamed
from megagpt.model.gpt import GPT
from megagpt.model.loss import next_token_score


@pytest.mark.parametrize("pattern", [None, 2])
def test_windows_are_those_of_transformers(pattern):
    """Those of Mistral in all layers, and of Qwen3 in every other one."""
    from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

    whole = ModelConfig(**SIZES, preset="llama", qk_norm=pattern is not None)
    ours = model_of(
        {"preset": "llama", "qk_norm": whole.qk_norm, "sliding_window": 5, "sliding_window_pattern": pattern}
    )
    config = config_json(whole, 100, 0, NO_DROPOUT, "fp32") | {"sliding_window": 5, "attn_implementation": "eager"}
    if pattern is None:
        theirs = MistralForCausalLM(MistralConfig(**config)).eval()
    else:
        layers = ["sliding_attention", "full_attention"]
        theirs = Qwen3ForCausalLM(Qwen3Config(**config, use_sliding_window=True, layer_types=layers)).eval()
    theirs.load_state_dict(renamed(ours.state_dict(), whole, 100), strict=True)
    with torch.no_grad():
        expected, found = theirs(TOKENS % 100).logits, ours.eval()(TOKENS % 100)[..., :100]
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * max(10.0, expected.abs().max().item()))


def test_shortcuts_are_their_formulas():
    """x = a x + b x_0, and v = c v + d v_0, with the embeddings x_0 and the first block's values v_0."""
    model = model_of({"value_residual": True, "embedding_shortcut": True}).eval()
    n_head, width = SIZES["n_head"], SIZES["n_embd"] // SIZES["n_head"]

    def heads(x):
        return x.view(24, n_head, width).transpose(0, 1)

    with torch.no_grad():
        x = embeddings = (model.wte(TOKENS) + model.wpe(torch.arange(24)))[0]
        for i, block in enumerate(model.h):
            if i > 0:
                a, b = block.shortcut.scalars
                x = a * x + b * embeddings
            q, k, v = map(heads, block.attn.c_attn(block.ln_1(x)).chunk(3, dim=-1))
            if i == 0:
                first = v
            else:
                c, d = block.attn.value_mix.scalars
                v = c * v + d * first
            scores = (q @ k.mT / width**0.5).masked_fill(torch.ones(24, 24).triu(1).bool(), -math.inf)
            x = x + block.attn.c_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(24, -1))
            x = x + block.mlp(block.ln_2(x))
        assert torch.allclose(model(TOKENS)[0], model.lm_head(model.ln_f(x)), atol=1e-4, rtol=1e-5)


def test_shortcuts_begin_as_the_model_without_them_and_learn():
    shortcuts = {"value_residual": True, "embedding_shortcut": True}
    torch.manual_seed(0)
    plain = GPT(ModelConfig(**SIZES), VOCAB)
    torch.manual_seed(0)
    model = GPT(ModelConfig(**SIZES, **shortcuts), VOCAB)
    assert torch.equal(plain(TOKENS), model(TOKENS))
    model(TOKENS, score=next_token_score(TOKENS.roll(-1, 1))).backward()
    scalars = {name: p for name, p in model.named_parameters() if name.endswith(".scalars")}
    assert set(scalars) == {"h.1.shortcut.scalars", "h.1.attn.value_mix.scalars"}
    assert all(p.grad.abs().min() > 0.0 for p in scalars.values())
