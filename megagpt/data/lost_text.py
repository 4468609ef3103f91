"""Tell what a tokenizer loses: text that it cannot spell, or changes before it encodes it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megagpt.data.loader import ValWindows, prefetched
from megagpt.tokenizer.tokenizer import Tokenizer, common_length

UNKNOWN = "<unk>"
SHOWN = 40  # characters of a text, in a message


def token_counts(windows: ValWindows) -> Tensor:
    """Return how often each token is a target: int64, up to the largest id that occurs."""
    counts = torch.zeros(0, dtype=torch.int64)
    for batch in prefetched(windows.fill, range(len(windows)), (1, windows.seq_len + 1), torch.device("cpu")):
        more = torch.bincount(batch.targets[0], minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return counts


def unknown_share(counts: Tensor, tokenizer: Tokenizer) -> float:
    """Return the share of unknown tokens, which stand for text that the tokenizer cannot spell."""
    if tokenizer.unknown_id is None or len(counts) <= tokenizer.unknown_id:
        return 0.0
    return (counts[tokenizer.unknown_id] / counts.sum()).item()


def lost_text(unknown: float, tokenizer: Tokenizer) -> str:
    """Tell what bits per byte leave out, given the share of unknown tokens; nothing for a tokenizer that loses none."""
    reasons = [f"{100 * unknown:.3g}% of these tokens are {UNKNOWN}, text that it cannot spell"] if unknown else []
    reasons += [f"it changes text before it encodes it (normalizer {tokenizer.normalizer})"] * tokenizer.normalizes
    if not reasons:
        return ""
    return (
        f"the tokenizer loses text: {', and '.join(reasons)}; loss and bits per byte leave that out, so do not compare "
        "them with those of another tokenizer"
    )


def changed_prompts(tokenizer: Tokenizer, prompts: Iterable[str], seq_len: int | None = None) -> list[str]:
    """Return a line for each prompt that the model cannot read as it is: what it reads instead.

    It is text that the tokenizer cannot spell, or longer than the model's `seq_len` positions.
    """
    lines = []
    for prompt in prompts:
        n_tokens = len(tokenizer.encode(prompt))
        if seq_len is not None and n_tokens >= seq_len:  # an end-of-document id precedes them
            lines.append(
                f"the prompt {prompt[:SHOWN]!r} is {n_tokens:,} tokens, and the model has {seq_len:,} positions: it "
                "reads the end of the prompt only"
            )
        if change := misspelt(tokenizer, prompt):
            lines.append(f"the tokenizer cannot spell the prompt {prompt[:SHOWN]!r}: {change}")
    return lines


def misspelt(tokenizer: Tokenizer, text: str) -> str | None:
    """Return where the tokenizer changes a text that it cannot spell, and what the model reads there."""
    read = tokenizer.decode(tokenizer.encode(text))
    if read == text:
        return None
    at = common_length(text, read)
    return f"at character {at:,} the model reads {read[at : at + SHOWN]!r} instead of {text[at : at + SHOWN]!r}"
