"""Text as it comes: whole characters, joined the text of all tokens, and ended before the first stop string."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from data_support import lossy_tokenizer, small_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers_of_others import KINDS, write_json

from megagpt.config.generation import GenerationConfig
from megagpt.model.generated_text import GeneratedText
from megagpt.tokenizer.tokenizer import Tokenizer

TOKENIZERS = ["sentencepiece unigram", "sentencepiece char", "lossy unigram", "lossy bpe", *KINDS]


@cache
def tokenizer_of(name: str) -> Tokenizer:
    kind, _, rest = name.partition(" ")
    if kind in KINDS:
        with TemporaryDirectory() as folder:
            return Tokenizer.load(write_json(Path(folder), kind))
    return (small_tokenizer if kind == "sentencepiece" else lossy_tokenizer)(rest)


def streamed(tokenizer, prompt, tokens, stop=()):
    """A text of all tokens, unless it ends before, and what was new after each."""
    text = GeneratedText(tokenizer, prompt, GenerationConfig(max_tokens=len(tokens), stop=tuple(stop)), seed=0)
    shown = []
    for token in tokens:
        if text.ended is None:
            text.add(token, -1.0)
            shown.append(text.new_text())
    return text, shown


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100)
@given(prompt=st.sampled_from(["", "the", "caf\u00e9 \u4f60 "]), numbers=st.lists(st.integers(0), min_size=1))
def test_what_is_shown_is_joined_the_text_of_all_tokens(name, prompt, numbers):
    tokenizer = tokenizer_of(name)
    # Control tokens of a SentencePiece model are within no character; a tokenizer.json's may be.
    left_out = {tokenizer.eod_id} | (set(tokenizer.control_ids()) if name in KINDS else set())
    usual = [i for i in range(tokenizer.vocab_size) if i not in left_out]
    tokens = [usual[number % len(usual)] for number in numbers]
    text, shown = streamed(tokenizer, prompt, tokens)
    assert text.whole == tokenizer.decode([*tokenizer.encode(prompt), *tokens])
    assert "".join(shown) == text.text
    assert (text.ended, text.tokens) == ("length", tokens)


def test_a_character_of_several_tokens_is_shown_once_it_is_whole():
    tokenizer = tokenizer_of("gpt2")
    *bytes_of_one, a = tokenizer.encode("\U0001f680a").tolist()
    assert len(bytes_of_one) > 1
    assert streamed(tokenizer, "", [*bytes_of_one, a])[1] == ["", "", "", "\U0001f680", "a"][-len(bytes_of_one) - 1 :]
    assert streamed(tokenizer, "", bytes_of_one[:-1])[0].text == "\ufffd"  # ended within


@settings(max_examples=200)
@given(
    tokens=st.lists(st.sampled_from(["a", "b", "ab", "ba", "c", "\u00e9", " the"]), min_size=1, max_size=12),
    stop=st.lists(st.text("abc\u00e9", min_size=1, max_size=4), max_size=3),
)
@example(tokens=["a", "b", "c"], stop=["abc", "b"])
@example(tokens=["ab", "a"], stop=["aba", "ba"])
def test_a_text_ends_before_the_stop_string_that_is_complete_first(tokens, stop):
    tokenizer = tokenizer_of("sentencepiece char")
    whole = "".join(tokens)
    ids = tokenizer.encode(whole).tolist()
    text, shown = streamed(tokenizer, "abc", ids, stop)
    first = [(whole.index(s) + len(s), whole.index(s)) for s in stop if s in whole]
    assert text.text == "".join(shown) == (whole[: min(first)[1]] if first else whole)
    assert text.ended == ("stop" if first else "length")
    for n, so_far in enumerate(shown):
        assert not any(s in "".join(shown[: n + 1]) for s in stop), so_far


def test_a_stop_string_may_be_within_one_token_and_across_several():
    tokenizer = tokenizer_of("sentencepiece unigram")
    [cat] = tokenizer.encode(" cat").tolist()
    assert streamed(tokenizer, "", [cat, cat], ["a"])[0].text == " c"
    assert streamed(tokenizer, "", [cat, cat], ["t c"])[0].text == " ca"
    assert streamed(tokenizer, "", [cat, cat], ["t x"])[0].text == " cat cat"
    assert streamed(tokenizer, " cat", [cat, cat], ["cat c"])[0].text == " "  # the prompt is no part of it
    ended, _ = streamed(tokenizer, "", [cat, tokenizer.eod_id], ["t "])
    assert (ended.text, ended.ended, ended.tokens) == (" cat", "end of document", [cat, tokenizer.eod_id])
