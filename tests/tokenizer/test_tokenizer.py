"""Text survives encoding to the last byte, and a bad model is one clear message."""

import contextlib
import io
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from data_support import VOCAB_SIZE, WORDS, document, lossy_tokenizer, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.config import TokenizerConfig
from data_tools.stages.train_tokenizer import train_sample
from megagpt.errors import UserError
from megagpt.tokenizer.tokenizer import Tokenizer, padded_vocab_size

KINDS = ("unigram", "bpe", "char")
TRAPS = [
    *("\0", "\u2581", "\u2581\u2581", " ", "    ", "\t", "\n", "\r\n", "</s>", "<s>", "<unk>", "<0x41>"),
    *("\u2585", "\u2047", "\ufeff", "\ufffd", "\u0301", "\U0001f389", "\u4e2d\u6587", "\x7f", "\x85", "\u2028"),
]
any_text = st.text(st.characters(exclude_categories=["Cs"]))
trapped_text = st.lists(st.one_of(st.sampled_from([*TRAPS, *WORDS]), any_text)).map("".join)
FIRST_BYTE_ID = 5  # after <unk>, <s>, </s>, newline and tab


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(text=trapped_text)
def test_any_text_survives_and_its_bytes_are_counted(kind: str, text: str) -> None:
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & {0, 1, tokenizer.eod_id}  # <unk>, <s>, </s> never come from text


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(trapped_text, max_size=5))
def test_a_batch_encodes_as_its_texts_do_one_by_one(texts: list[str]) -> None:
    tokenizer = small_tokenizer()
    batch = tokenizer.encode_batch(texts)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text).tolist() for text in texts]


def sentencepiece_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes).encode(text)
    return ids


@pytest.mark.parametrize("kind", ["bpe", "char"])
@settings(max_examples=200, deadline=None)
@given(text=trapped_text.map(lambda text: text.replace("\u2581", "")))
def test_segments_have_the_ids_that_sentencepiece_gives_the_whole_text(kind: str, text: str) -> None:
    tokenizer = small_tokenizer(kind)
    assert tokenizer.encode(text).tolist() == sentencepiece_ids(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(text=trapped_text.map(lambda text: text.replace("\u2581", "")))
def test_segments_are_as_likely_as_what_sentencepiece_makes_of_the_whole_text(text: str) -> None:
    """Where two ways are equally likely, it lets the rounding of a float32 sum over all before them decide."""
    tokenizer = small_tokenizer()
    scores = np.zeros(tokenizer.vocab_size)
    for i, score in tokenizer.pieces().values():
        scores[i] = score
    ours, theirs = tokenizer.encode(text), sentencepiece_ids(tokenizer, text)
    single_bytes = (scores == 0).nonzero()[0]
    assert np.isin(ours, single_bytes).sum() == np.isin(theirs, single_bytes).sum()
    assert scores[ours].sum() == pytest.approx(scores[theirs].sum(), abs=1e-4)


def test_a_text_has_its_ids_whatever_was_encoded_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megagpt.tokenizer.segment_cache.REMEMBERED_SEGMENTS", 20)
    model = small_tokenizer().model_bytes
    texts = [document(i) for i in range(20)]
    one_by_one = [Tokenizer(model).encode(text).tolist() for text in texts]
    tokenizer = Tokenizer(model)
    assert [tokenizer.encode(text).tolist() for text in texts] == one_by_one


def test_threads_that_share_a_tokenizer_get_the_ids_of_their_texts() -> None:
    tokenizer, texts = Tokenizer(small_tokenizer().model_bytes), [document(seed) for seed in range(200)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds; a thread loses its turn wherever it can
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(tokenizer.encode, texts))
    finally:
        sys.setswitchinterval(interval)
    assert [tokenizer.decode(ids) for ids in found] == texts


def test_a_tokenizer_that_was_used_can_be_sent_to_another_process() -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(document(0))
    assert pickle.loads(pickle.dumps(tokenizer)).encode(document(0)).tolist() == ids.tolist()


def test_ids_worked_out_by_hand() -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.encode("\n\t\0").tolist() == [3, 4, FIRST_BYTE_ID + 0]
    assert tokenizer.encode("\u2581").tolist() == [FIRST_BYTE_ID + byte for byte in (0xE2, 0x96, 0x81)]
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.encode("cat").dtype == np.int32
    assert tokenizer.token_bytes()[[0, 1, 2, 3, 4, 5]].tolist() == [0, 0, 0, 1, 1, 1]
    assert tokenizer.token_bytes().shape == (VOCAB_SIZE,)


def test_control_ids_leave_no_trace_in_text() -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.eod_id == 2
    assert tokenizer.decode([1, *tokenizer.encode("the cat"), tokenizer.eod_id]) == "the cat"


def test_indentation_is_one_token() -> None:
    tokenizer = small_tokenizer()
    assert len(tokenizer.encode("    ")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_the_same_bytes(kind: str) -> None:
    sample = [document(i) for i in range(50)]
    config = TokenizerConfig(tokenizer_type=kind, vocab_size=VOCAB_SIZE)
    again = train_sample(sample, config)
    assert again == small_tokenizer(kind).model_bytes
    assert Tokenizer(again).kind == kind


def test_no_line_is_lost_to_training() -> None:
    """SentencePiece drops lines over 4192 bytes and lines with NUL: their characters must still get pieces."""
    sample = ["cat " * 2000 + "\u00e9" * 3000, "a\0\u00e8" * 500]
    tokenizer = Tokenizer(train_sample(sample, TokenizerConfig(tokenizer_type="char", vocab_size=400)))
    assert len(tokenizer.encode("\u00e9\u00e8")) == 2


def test_padded_vocab_size_is_the_next_multiple_of_128() -> None:
    assert [padded_vocab_size(n) for n in (1, 128, 129, 50257)] == [128, 128, 256, 50304]


def foreign_model(**options: Any) -> bytes:
    """What somebody else's SentencePiece defaults make."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for i in range(50) for line in document(i).splitlines()),
        model_writer=model,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"vocab_size": 60, **options},
    )
    return model.getvalue()


def test_foreign_models_load_and_are_described() -> None:
    tokenizer = Tokenizer(foreign_model(model_type="word"))
    assert (tokenizer.kind, tokenizer.normalizer) == ("word", "nmt_nfkc")
    tokenizer = Tokenizer(foreign_model(model_type="bpe"))
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"


# the text, and what the tokens of lossy_tokenizer do not decode to
LOST = {
    "the cat": {},
    "": {},
    "the \u4f60\u597d cat": {"\u4f60\u597d": 6},  # one unknown token
    "  the  cat ": {"  ": 2, " ": 2},
    "the\ncat": {"\n": 1},  # becomes a space
    "\uff43\uff41\uff54": {"\uff43\uff41\uff54": 9},  # full-width letters become "cat"
    "\u2581cat": {"\u2581": 3},  # is taken for a space
    "cat</s>": {"</": 2, ">": 1},
}


@pytest.mark.parametrize("text", LOST)
def test_what_is_lost_is_counted_in_bytes(text: str) -> None:
    tokenizer = lossy_tokenizer()
    assert not tokenizer.is_lossless
    assert dict(tokenizer.lost(text)) == LOST[text]
    assert (tokenizer.decode(tokenizer.encode(text)) == text) == (not LOST[text])


@settings(max_examples=100, deadline=None)
@given(text=trapped_text)
def test_nothing_is_lost_where_the_text_comes_back(text: str) -> None:
    tokenizer = lossy_tokenizer()
    lost = tokenizer.lost(text)
    assert 0 <= lost.total() <= len(text.encode())
    assert bool(lost) or tokenizer.round_trips(text)
    assert not small_tokenizer().lost(text)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_of_data_tools_are_lossless(kind: str) -> None:
    assert small_tokenizer(kind).is_lossless
    assert not Tokenizer(foreign_model(byte_fallback=True, vocab_size=320)).is_lossless  # it normalizes


def test_a_model_without_end_of_sentence_is_refused() -> None:
    with pytest.raises(UserError, match=r"no end-of-sentence piece </s>.*train it again"):
        Tokenizer(foreign_model(eos_id=-1))


@pytest.mark.parametrize(
    "model_bytes",
    [b"", b"hello, this is text", b"\x0a\x03abc" * 100, b"\xff" * 1000, "cut", "no UTF-8"],
    ids=["empty", "text", "protobuf of something else", "noise", "truncated", "pieces that are no text"],
)
def test_what_is_no_model_is_refused(model_bytes: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    whole = small_tokenizer().model_bytes
    changed = {"cut": whole[: len(whole) // 2], "no UTF-8": whole.replace("\u2581".encode(), b"\xff" * 3)}
    path.write_bytes(changed[model_bytes] if isinstance(model_bytes, str) else model_bytes)
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model; give the \.model file"):
        Tokenizer.load(path)


@pytest.mark.parametrize("sha256", [None, "0" * 64], ids=["given by the user", "of a dataset"])
def test_a_git_lfs_pointer_is_named_with_the_command(sha256: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(UserError, match=rf"tokenizer\.model is a Git LFS pointer, .* git -C {tmp_path} lfs pull$"):
        Tokenizer.load(path, sha256=sha256)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, len(small_tokenizer().model_bytes) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_is_a_model_or_a_user_error(position: int, bit: int) -> None:
    damaged = bytearray(small_tokenizer().model_bytes)
    damaged[position] ^= 1 << bit
    with contextlib.suppress(UserError):
        Tokenizer(bytes(damaged))


def test_another_model_than_the_expected_one_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small_tokenizer("bpe").model_bytes)
    with pytest.raises(UserError, match=r"not the tokenizer this dataset was made with.*restore"):
        Tokenizer.load(path, sha256=small_tokenizer("unigram").sha256)
    path.write_bytes(small_tokenizer().model_bytes)
    assert Tokenizer.load(path, sha256=small_tokenizer().sha256).vocab_size == VOCAB_SIZE


def test_a_missing_file_and_a_lone_surrogate_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.model: No such file.*train-tokenizer"):
        Tokenizer.load(tmp_path / "absent.model")
    for texts in (["a\ud800b"], ["fine", "a\ud800b"], ["fine", "\u2581\ud800"]):
        with pytest.raises(UserError, match="lone surrogate at character"):
            small_tokenizer().encode_batch(texts)
