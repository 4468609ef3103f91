"""Generate text with temperature, top-k and top-p sampling and a key-value cache.

Shapes: B texts at once, T positions, V padded vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megagpt.config.schema import GenerationConfig
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.tokenizer.tokenizer import Tokenizer


def pick(logits: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """Sample one token (B, 1) for each row of finite logits (B, V). Temperature 0 takes the likeliest."""
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)  # (B, 1)
    ordered, tokens = (logits.float() / temperature).sort(-1, descending=True)  # (B, V) each
    p = ordered.softmax(-1)
    # Nucleus sampling (Holtzman et al. 2020): drop a token if the likelier ones already make up top_p. The first stays.
    outside = p.cumsum(-1) - p >= top_p
    if top_k > 0:
        outside[:, top_k:] = True
    p = p.masked_fill(outside, 0.0)
    place = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)  # (B, 1); scale does not matter
    return tokens.gather(-1, place)


@torch.no_grad()
def generate(
    model: GPT,
    prompt: Tensor,
    *,
    max_tokens: int,
    vocab_size: int,
    eod_id: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    use_cache: bool = True,
    until_ended: bool = True,
    agree: Callable[[bool], bool] = lambda fine: fine,
) -> Tensor:
    """Continue prompt (B, T) by up to max_tokens tokens, prompt included; a text that ended is padded with eod_id.

    With `until_ended` it returns as soon as all texts have ended. Without, it always takes max_tokens steps: ranks that
    share a model (ZeRO-3) must run the same number of forward passes. `agree` tells whether it is fine on all of them.
    Raises UserError for logits that are not finite.
    When all seq_len positions are used, the later half of the window becomes the context, and a new cache is filled.
    """
    seq_len = model.cfg.seq_len
    tokens, begin = prompt, max(0, prompt.size(1) - seq_len)
    caches = model.new_caches(len(prompt)) if use_cache else None
    ended = torch.zeros(len(prompt), 1, dtype=torch.bool, device=prompt.device)
    with evaluating(model):
        for _ in range(max_tokens):
            if tokens.size(1) - begin > seq_len:
                begin = tokens.size(1) - max(1, seq_len // 2)
                caches = model.new_caches(len(prompt)) if use_cache else None
            known = caches[0].length if caches else 0
            logits = model(tokens[:, begin + known :], caches)[:, -1, :vocab_size]  # padded ids are never picked
            if not agree(bool(logits.isfinite().all())):
                raise UserError(
                    "the model's output is not finite, so nothing can be generated; use an earlier checkpoint"
                )
            picked = pick(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            tokens = torch.cat([tokens, picked.masked_fill(ended, eod_id)], dim=1)
            ended |= picked == eod_id
            if until_ended and ended.all():
                break
    return tokens


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, also when what it computes raises an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def with_continuation(prompt: str, text: str) -> tuple[str, str]:
    """Split a completion into prompt and continuation; all is continuation if the tokenizer changed the prompt."""
    return (prompt, text.removeprefix(prompt)) if text.startswith(prompt) else ("", text)


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Iterable[str],
    cfg: GenerationConfig,
    *,
    batch: int = 1,
    seed: int = 0,
    until_ended: bool = True,
    agree: Callable[[bool], bool] = lambda fine: fine,
) -> list[str]:
    """Return `batch` continuations of each prompt, prompt included. The same seed gives the same texts.

    Every prompt starts a document: an end-of-document id precedes it, as in the training stream.
    """
    device = next(model.parameters()).device
    texts = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.tensor([[tokenizer.eod_id, *tokenizer.encode(prompt).tolist()]], device=device)
        out = generate(
            model,
            ids.expand(batch, -1),
            max_tokens=cfg.max_tokens,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            generator=generator,
            temperature=cfg.temperature,
            top_k=cfg.top_k,
            top_p=cfg.top_p,
            until_ended=until_ended,
            agree=agree,
        )
        texts += [tokenizer.decode(row[1:]) for row in out.cpu().numpy()]
    return texts
