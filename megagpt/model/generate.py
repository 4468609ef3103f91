"""Generate text: one pass over all prompts, then one position of each text at a time, with key-value caches.

Shapes: B texts at once, T positions, C width, V the tokenizer's vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megagpt.config.generation import GenerationConfig
from megagpt.errors import UserError
from megagpt.model.cache import KeyValueCaches
from megagpt.model.generated_text import GeneratedText, Prompt
from megagpt.model.gpt import GPT, OutputHead
from megagpt.model.loss import Score, capped
from megagpt.model.products import linear
from megagpt.model.sampling import penalized, pick, uniforms
from megagpt.tokenizer.tokenizer import Tokenizer


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    cfg: GenerationConfig,
    *,
    batch: int = 1,
    seed: int = 0,
    until_ended: bool = True,
    agree: Callable[[bool], bool] = lambda fine: fine,
) -> list[GeneratedText]:
    """Return `batch` continuations of each prompt. Text number i is drawn with seed + i, whichever others there are."""
    texts = new_texts(tokenizer, prompts, cfg, batch=batch, seed=seed)
    for _ in extend(model, tokenizer, texts, cfg, until_ended=until_ended, agree=agree):
        pass
    return texts


def new_texts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], cfg: GenerationConfig, *, batch: int = 1, seed: int = 0
) -> list[GeneratedText]:
    """Return `batch` texts to generate for each prompt, with seeds that count up."""
    each = [prompt for prompt in prompts for _ in range(batch)]
    return [GeneratedText(tokenizer, prompt, cfg, seed=(seed + i) % 2**64) for i, prompt in enumerate(each)]


@torch.no_grad()
def extend(
    model: GPT,
    tokenizer: Tokenizer,
    texts: Sequence[GeneratedText],
    cfg: GenerationConfig,
    *,
    until_ended: bool = True,
    agree: Callable[[bool], bool] = lambda fine: fine,
) -> Iterator[None]:
    """Add a token to each text, yield, and again until all have ended; new texts of any lengths.

    With `until_ended` it returns as soon as all texts have ended. Without, it always takes max_tokens steps: ranks that
    share a model (ZeRO-3) must run the same number of forward passes. `agree` tells whether it is fine on all of them.
    Raises UserError for logits that are not finite.
    When a text has used all seq_len positions, the later half of its window becomes its context, read once more.
    """
    seq_len, vocab_size, device = model.cfg.seq_len, tokenizer.vocab_size, model.wte.weight.device
    ids = [list(text.context) for text in texts]  # of each text all tokens so far
    caches = model.new_caches(len(texts), min(seq_len, max(map(len, ids)) + cfg.max_tokens - 1))
    numbers = uniforms([text.seed for text in texts], device)
    seen = _seen(ids, tokenizer, device) if cfg.repetition_penalty != 1.0 else None
    with evaluating(model):
        logits = _read(model, caches, [row[-seq_len:] for row in ids], vocab_size)  # (B, V)
        for step in range(cfg.max_tokens):
            tokens, log_p = _next_tokens(logits, seen, numbers, cfg)
            if not agree(all(map(math.isfinite, log_p))):
                raise UserError(
                    "the model's output is not finite, so nothing can be generated; use an earlier checkpoint"
                )
            for row, text, token, p in zip(ids, texts, tokens.flatten().tolist(), log_p, strict=True):
                row.append(token)
                if text.ended is None:
                    text.add(token, p)
            yield
            if step + 1 == cfg.max_tokens or (until_ended and all(text.ended for text in texts)):
                return
            for i, row in enumerate(ids):
                if caches.lengths[i] == seq_len:
                    caches.lengths[i] = _read_again(model, caches.row(i), row[-max(1, seq_len // 2) : -1], vocab_size)
            logits = model(tokens, caches, score=_last_logits(model.lm_head, vocab_size))  # (B, V)


def _read(model: GPT, caches: KeyValueCaches, rows: Sequence[list[int]], vocab_size: int) -> Tensor:
    """Fill the caches with texts of any lengths in one pass; return the logits (B, V) at the end of each.

    Shorter texts are padded at their end, which no position before it can see.
    """
    device, lengths = caches.kept.device, [len(row) for row in rows]
    padded = [row + [0] * (max(lengths) - len(row)) for row in rows]
    ends = torch.tensor(lengths, device=device) - 1  # (B,)
    logits = model(torch.tensor(padded, device=device), caches, score=_last_logits(model.lm_head, vocab_size, ends))
    caches.lengths = lengths
    return logits


def _read_again(model: GPT, caches: KeyValueCaches, row: list[int], vocab_size: int) -> int:
    """Fill the caches of one text with a shorter context; return its length."""
    if row:
        _read(model, caches, [row], vocab_size)
    return len(row)


def _last_logits(head: OutputHead, vocab_size: int, ends: Tensor | None = None) -> Score:
    """Return a score that is the fp32 logits (B, V) at position `ends` (B,) of each text; default: at the last one.

    Ids that only pad the vocabulary have none, so that they are never picked.
    """

    def score(x: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
        last = x[:, -1] if ends is None else x[torch.arange(len(x), device=x.device), ends]  # (B, C)
        # Packed, the head multiplies and caps by itself.
        logits = capped(linear(last, weight), softcap) if head.packed is None else head(last)
        return logits[:, :vocab_size].float()

    return score


def _next_tokens(
    logits: Tensor, seen: Tensor | None, numbers: Iterator[Tensor], cfg: GenerationConfig
) -> tuple[Tensor, list[float]]:
    """Return the next token (B,) of each text and its log probability, which is not finite if any logit is not."""
    allowed = logits if seen is None else penalized(logits, seen, cfg.repetition_penalty)
    tokens = pick(allowed, next(numbers), cfg).unsqueeze(1)  # (B, 1)
    if seen is not None:
        seen.scatter_(1, tokens, True)
    log_p = logits.gather(1, tokens).squeeze(1) - logits.logsumexp(-1)  # (B,)
    return tokens, log_p.tolist()


def _seen(rows: Sequence[list[int]], tokenizer: Tokenizer, device: torch.device) -> Tensor:
    """Return which tokens (B, V) each text has. The end-of-document id before it is none of its own."""
    seen = torch.zeros(len(rows), tokenizer.vocab_size, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        seen[i, row[1:]] = True
    return seen


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, also when what it computes raises an error."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
