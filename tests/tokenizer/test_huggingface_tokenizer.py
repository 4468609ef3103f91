"""A Hugging Face tokenizer.json has the ids of its own package, exact bytes, and no control token from text."""

import json
import pickle
import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_of_others import json_of, of_the_package, write_json

from data_tools.__main__ import main
from megagpt.config.augmentation import AugmentConfig
from megagpt.data.augmentation import sentinels
from megagpt.errors import UserError
from megagpt.tokenizer import huggingface_model
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.tokenizer.tokenizer_json import LETTERS

KINDS = ("gpt2", "llama", "unigram")
TRAPS = [
    *(
        "\0",
        "\u2581",
        " ",
        "   ",
        "\t",
        "\n\n",
        "\r\n",
        "</s>",
        "<s>",
        "<unk>",
        "<|endoftext|>",
        "<0x41>",
        "'s",
        "\u0120",
    ),
    *("\ufeff", "\ufffd", "e\u0301", "\U0001f469\u200d\U0001f680", "\u4e2d\u6587", "\x85", "\u2028", "1234", "the cat"),
]
ORDERED = "as'1!\u00e9 \n\u00a0\u3000\x1c\x85"
ENDS = {"gpt2": 0, "llama": 2, "unigram": 1}
trapped_text = st.lists(st.one_of(st.sampled_from(TRAPS), st.text(st.characters(exclude_categories=["Cs"])))).map(
    "".join
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_json(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def hostile_lines(n: int) -> list[str]:
    rng = random.Random(0)
    letters = [*TRAPS, *(chr(i) for i in range(1, 0x180)), *(chr(rng.randrange(0x10000, 0x30000)) for _ in range(50))]
    return ["".join(rng.choices(letters, k=rng.randrange(20))) for _ in range(n)]


@pytest.mark.parametrize("n", [3000, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_packages_own(files: dict[str, Path], kind: str, n: int) -> None:
    tokenizer, own = Tokenizer.load(files[kind]), of_the_package(files[kind])
    lines = hostile_lines(n)
    if kind == "unigram":  # which the package reads as control tokens
        lines = [line for line in lines if "</s>" not in line and "<unk>" not in line]
    expected = [encoding.ids for encoding in own.encode_batch(lines, add_special_tokens=False)]
    assert [ids.tolist() for ids in tokenizer.encode_batch(lines)] == expected
    assert tokenizer.vocab_size == own.get_vocab_size()
    assert tokenizer.eod_id == ENDS[kind] == own.token_to_id(tokenizer.names()[tokenizer.eod_id])


def test_segments_have_the_ids_of_the_whole_text_for_every_order_of_letters(tmp_path: Path) -> None:
    """GPT-2's pattern looks at letters, numbers, the apostrophe, white space (not all of it ASCII), and the rest.

    Any two bytes of them are merged wherever the pattern leaves them in one word.
    """
    letters = [letter for letter, byte in LETTERS.items() if byte in {bytes([one]) for one in ORDERED.encode()}]
    merges = [list(pair) for pair in product(letters, repeat=2)]
    vocab = [*LETTERS, *map("".join, merges), "<|endoftext|>"]
    model = json_of("gpt2")["model"] | {"vocab": {piece: i for i, piece in enumerate(vocab)}, "merges": merges}
    end = json_of("gpt2")["added_tokens"][0] | {"id": len(vocab) - 1}
    path = write_json(tmp_path, "gpt2", model=model, added_tokens=[end])
    tokenizer, own = Tokenizer.load(path), of_the_package(path)
    assert tokenizer._model._segments is not None  # type: ignore[union-attr]
    texts = list(map("".join, product(ORDERED, repeat=4)))
    texts += [f"the {text} cat" for text in texts[::7]]
    expected = [encoding.ids for encoding in own.encode_batch_fast(texts, add_special_tokens=False)]
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
)
def test_no_segments_are_cut_of_another_pattern(tmp_path: Path, changes: dict[str, Any]) -> None:
    tokenizer = Tokenizer.load(path := write_json(tmp_path, "gpt2", **changes))
    assert tokenizer._model._segments is None  # type: ignore[union-attr]
    expected = [encoding.ids for encoding in of_the_package(path).encode_batch(hostile_lines(300))]
    assert [ids.tolist() for ids in tokenizer.encode_batch(hostile_lines(300))] == expected


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=trapped_text)
def test_no_text_gives_a_control_token(files: dict[str, Path], kind: str, text: str) -> None:
    tokenizer = Tokenizer.load(files[kind])
    assert not set(tokenizer.encode(text).tolist()) & (set(tokenizer.control_ids()) - {tokenizer.unknown_id})


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(trapped_text, max_size=3))
def test_a_byte_level_tokenizer_keeps_every_byte_wherever_text_is_cut(files: dict[str, Path], parts: list[str]) -> None:
    tokenizer, text = Tokenizer.load(files["gpt2"]), "".join(parts)
    assert tokenizer.is_lossless
    ids = [i for part in parts for i in tokenizer.encode(part).tolist()]
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@settings(max_examples=200, deadline=None)
@given(text=trapped_text)
def test_a_tokenizer_with_byte_fallback_loses_its_own_sign_of_a_space_alone(files: dict[str, Path], text: str) -> None:
    tokenizer, n = Tokenizer.load(files["llama"]), text.count("\u2581")
    assert not tokenizer.is_lossless
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")
    lost = tokenizer.lost(text).total()  # in a token that also has a space, that is between them
    assert lost >= 3 * n
    assert (lost > 0) == (n > 0)


def test_bytes_by_hand() -> None:
    """GPT-2 spells a space U+0120, a line feed U+010A, and most bytes above 0x7F as the letters of Latin-1."""
    vocab = {
        "a": 0,
        "\u0120a": 1,
        "\u010a": 2,
        "\u00c3\u00a9": 3,
        "<|endoftext|>": 4,
        "\u00c3": 5,
        "def": 6,
        "\u0100": 7,
    }
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        plain | {"id": 4, "content": "<|endoftext|>", "special": True},
        plain | {"id": 9, "content": "\u00e9 ", "special": False},  # it stands for its own letters
    ]
    spec = json_of("gpt2") | {"added_tokens": added}
    spec["model"] |= {"vocab": vocab, "merges": [["\u0120", "a"]]}
    spec["model"]["vocab"] |= {"\u0120": 8}
    stored = {"format": "megagpt-tokenizer", "end_of_document": "<|endoftext|>", "tokenizer_json": json.dumps(spec)}
    tokenizer = Tokenizer(json.dumps(stored).encode())
    assert tokenizer.token_bytes().tolist() == [1, 2, 1, 2, 0, 1, 3, 1, 1, 3]
    assert tokenizer.decode([6, 1, 2, 3, 4, 9, 0]) == "def a\n\u00e9\u00e9 a"
    assert tokenizer.encode(" a\u00e9 a").tolist() == [1, 9, 0]
    assert not tokenizer.is_lossless  # most bytes have no token
    assert dict(tokenizer.lost("aba")) == {"b": 1}


def test_an_added_token_of_spaces_is_spaces(tmp_path: Path) -> None:
    """As Gemma's: the model gives its id for two spaces, and the search before it for two times their sign."""
    spec = json_of("llama")
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    number = vocab.setdefault("\u2581\u2581", len(vocab))
    spec["model"]["merges"] = [["\u2581", "\u2581"], *(pair for pair in merges if pair != ["\u2581", "\u2581"])]
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": number, "content": "\u2581\u2581", "special": False})
    tokenizer = Tokenizer.load(write_json(tmp_path, "llama", **spec))
    ids = tokenizer.encode("q  q")
    assert number in ids
    assert tokenizer.decode(ids) == "q  q"
    assert tokenizer.token_bytes()[number] == 2
    assert dict(tokenizer.lost("a\u2581\u2581 the")) == {"\u2581\u2581": 6}


def test_lost_text_by_hand(files: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(files["unigram"])
    assert dict(tokenizer.lost("the \u0416\u0416 cat")) == {"\u0416\u0416": 4}
    assert tokenizer.lost("the cat").total() == 0
    composed = write_json(files["gpt2"].parent / "nfc", "gpt2", normalizer={"type": "NFC"})
    assert Tokenizer.load(composed).lost("caf\u00e9 e\u0301 \U0001f600").total() == 3
    assert not Tokenizer.load(composed).is_lossless


def test_what_would_change_or_add_tokens_is_off(tmp_path: Path, files: dict[str, Path]) -> None:
    text = "the cat sat on a mat and models that learn"
    padding = {"strategy": {"Fixed": 30}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    padding["pad_to_multiple_of"] = None
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    plain = json_of("gpt2")
    changed = write_json(tmp_path, "gpt2", padding=padding, truncation=cut, model=plain["model"] | {"dropout": 0.9})
    assert Tokenizer.load(changed).encode(text).tolist() == Tokenizer.load(files["gpt2"]).encode(text).tolist()
    beginning = files["llama"]  # has a post-processor that puts <s> before each text
    assert of_the_package(beginning).encode(text).ids[0] == 1
    assert Tokenizer.load(beginning).encode(text)[0] != 1


def test_the_end_of_a_document_is_that_of_the_config_beside_it(tmp_path: Path) -> None:
    path = write_json(tmp_path, "llama")
    assert Tokenizer.load(path).eod_id == 2
    for named in ("<s>", {"content": "<s>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer.eod_id == 1
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "stored.model").write_bytes(tokenizer.model_bytes)  # as in a dataset: it tells the end itself
    again = Tokenizer.load(tmp_path / "stored.model", sha256=tokenizer.sha256)
    assert (again.eod_id, again.sha256) == (1, tokenizer.sha256)
    assert again.sha256 != Tokenizer.load(path).sha256  # data of another end is never mixed with it
    assert pickle.loads(pickle.dumps(again)).encode("the cat").tolist() == tokenizer.encode("the cat").tolist()


def test_special_tokens_can_be_named_as_sentinels(tmp_path: Path) -> None:
    spec, pieces = json_of("gpt2"), ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    first, end = len(spec["model"]["vocab"]), spec["added_tokens"][0]
    more = [end | {"id": first + i, "content": piece} for i, piece in enumerate(pieces)]
    tokenizer = Tokenizer.load(write_json(tmp_path, "gpt2", added_tokens=[end, *more]))
    fim = AugmentConfig(fim={"rate": 1.0, "pieces": pieces})
    assert sentinels(fim, tokenizer, 384) == ([first, first + 1, first + 2], [])
    assert not set(tokenizer.encode("".join(pieces)).tolist()) & {first, first + 1, first + 2}
    with pytest.raises(UserError, match=r"'<\|endoftext\|>' is the end of a document; name another piece"):
        sentinels(AugmentConfig(fim={"rate": 1.0, "pieces": ["<|endoftext|>", *pieces[1:]]}), tokenizer, 384)


def test_the_end_may_be_a_piece_that_is_no_special_token(tmp_path: Path) -> None:
    """As in what ByteLevelBPETokenizer saves of vocab.json and merges.txt."""
    path = write_json(tmp_path, "gpt2", added_tokens=[])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer.load(path)
    assert (tokenizer.eod_id, tokenizer.control_ids()) == (0, [0])
    assert tokenizer.decode(tokenizer.encode("a<|endoftext|>")) == "a<|endoftext|>"


def test_ids_without_a_token_stand_for_nothing(tmp_path: Path) -> None:
    spec = json_of("gpt2")
    spec["model"]["vocab"] = {piece: i if i < 300 else i + 70_000 for piece, i in spec["model"]["vocab"].items()}
    tokenizer = Tokenizer.load(write_json(tmp_path, "gpt2", model=spec["model"]))
    assert tokenizer.vocab_size == max(spec["model"]["vocab"].values()) + 1 > 2**16
    assert tokenizer.token_bytes()[300:70_300].sum() == 0
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert {301, 70_299} < set(tokenizer.control_ids())


def changed(kind: str, **model: Any) -> dict[str, Any]:
    spec = json_of(kind)
    return spec | {"model": spec["model"] | model}


def special(*names: str) -> list[dict[str, Any]]:
    return [{"id": i, "content": name, "special": True} for i, name in enumerate(names)]


NO_END = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]]}
WRONG: dict[str, tuple[Any, str]] = {
    "cut off": (lambda: json.dumps(json_of("gpt2"))[:500], r"is damaged: it is not whole JSON .*fetch it again"),
    "vocab.json": (lambda: {"a": 0, "b": 1}, r"is a vocabulary alone; give the tokenizer\.json"),
    "config.json": (lambda: {"model_type": "gpt2", "n_embd": 3}, r'it has no section "model"'),
    "WordPiece": (lambda: {"model": {"type": "WordPiece", "vocab": {"a": 0}}}, r"is a WordPiece tokenizer, made for"),
    "CLIP": (lambda: changed("gpt2", end_of_word_suffix="</w>"), r"loses the spaces between words"),
    "no end": (lambda: json_of("gpt2") | {"added_tokens": special("<bos>")}, r"echo '\{\"eos_token\": \"<bos>\"\}' > "),
    "two ends": (lambda: json_of("gpt2") | {"added_tokens": special("</s>", "<eos>")}, r"it has </s> and <eos>; name"),
    "no special tokens": (
        lambda: json_of("unigram") | {"added_tokens": [], "model": NO_END},
        r"no special tokens at all",
    ),
    "end is not special": (lambda: json_of("gpt2") | {"added_tokens": []}, r"name one of <\|endoftext\|>, for example"),
    "no vocabulary": (lambda: changed("gpt2", vocab=3), r"its vocabulary is no list of pieces"),
    "two of one id": (lambda: changed("gpt2", vocab={"a": 0, "b": 0}, merges=[]), r"both have id 0"),
    "huge ids": (lambda: changed("gpt2", vocab={"a": 10**12}, merges=[]), r"ids are not within"),
    "merges of nothing": (
        lambda: changed("gpt2", merges=[["x", "yz"]]),
        r"the package tokenizers fails with .*; fetch it",
    ),
    "end is unknown": (lambda: changed("unigram", unk_id=1), r"both for unknown text and for the end of a document"),
    "no unknown": (lambda: changed("unigram", unk_id=None), r"without an unknown token"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_cannot_be_used_is_one_message(tmp_path: Path, case: str) -> None:
    make, complaint = WRONG[case]
    content = make()
    (tmp_path / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=complaint) as caught:
        Tokenizer.load(tmp_path / "tokenizer.json")
    assert len(str(caught.value)) < 700


def test_a_folder_without_a_tokenizer_and_a_name_of_a_hub_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match=r"cannot read the tokenizer gpt2: .*names of a hub are not downloaded"):
        Tokenizer.load("gpt2")


def test_a_missing_package_is_named_with_the_command(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_model._read.cache_clear()
    monkeypatch.setattr(huggingface_model, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package tokenizers; install with pip install 'tokenizers>=0.20'"):
        Tokenizer.load(files["gpt2"])


def test_a_lone_surrogate_is_named(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="lone surrogate at character 1"):
        Tokenizer.load(files["gpt2"]).encode("a\ud800")


def test_variants_are_refused_before_anything_is_read(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("the cat")
    options = ["--input", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "subword.variants=2"]
    assert main(["build", *options, f"tokenizer={files['gpt2']}"]) == 2
    assert "subword.variants has no effect with a Hugging Face BPE tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


STEPS = (
    *(
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": one}
        for one in (True, False)
    ),
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    *(
        {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": how, "invert": False}
        for how in ("Isolated", "Removed")
    ),
    {"type": "Digits", "individual_digits": True},
    {"type": "Punctuation", "behavior": "Isolated"},
    {"type": "WhitespaceSplit"},
    {"type": "UnicodeScripts"},  # drops spaces at the beginning
)
NORMALIZERS = [*[None] * 9, {"type": "NFC"}, {"type": "Lowercase"}, {"type": "ByteLevel"}, {"type": "StripAccents"}]


def odd_tokenizer(rng: random.Random) -> dict[str, Any]:
    """A byte-level BPE with some of what a file may have around it, and added tokens of which some are also pieces."""
    spec = json_of("gpt2")
    vocab = spec["model"]["vocab"]
    steps = [*rng.choices(STEPS, k=rng.choice([0, 0, 1, 2])), rng.choice(STEPS[:3])]
    spec |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "normalizer": rng.choice(NORMALIZERS)}
    for content in rng.sample(["def", "\u00e9", "  ", "\u0120", "<x>"], rng.randrange(3)):
        flags = {name: rng.random() < 0.2 for name in ("special", "lstrip", "rstrip", "normalized", "single_word")}
        number = vocab.get(content, len(vocab) + len([one for one in spec["added_tokens"] if one["id"] >= len(vocab)]))
        spec["added_tokens"].append({"id": number, "content": content, **flags})
    return spec


@pytest.mark.parametrize("n", [60, pytest.param(3000, marks=pytest.mark.long)])
def test_what_is_said_to_lose_nothing_loses_nothing(tmp_path: Path, n: int) -> None:
    rng, lossless = random.Random(1), 0
    lines = [
        " The  cat\u00e9 def  defe\u0301\n it's \u0120\u2581 x </s> <|endoftext|> \t 12 \u4e2d a.b,\r\n",
        " ",
        "\u0120a",
    ]
    for _ in range(n):
        (tmp_path / "tokenizer.json").write_text(json.dumps(odd_tokenizer(rng)))
        tokenizer = Tokenizer.load(tmp_path)
        for line in lines if tokenizer.is_lossless else ():
            ids = tokenizer.encode(line)
            assert tokenizer.decode(ids) == line
            assert tokenizer.token_bytes()[ids].sum() == len(line.encode())
            lossless += 1
    assert lossless > n / 10


ODD = [
    None,
    -1,
    10**30,
    "",
    "x",
    [],
    ["a"],
    [["a", 1, 2]],
    {},
    {"type": "Sequence"},
    {"type": "x"},
    {"a": None},
    {"a": "b"},
]


def places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to each section, and to the first entries of each list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [place for key, one in list(inner)[:12] for place in places(one, (*above, key))]
    return [above, *found] if above else found


@pytest.mark.parametrize("n", [100, pytest.param(3000, marks=pytest.mark.long)])
def test_a_file_with_a_wrong_section_is_a_message_or_a_tokenizer(tmp_path: Path, n: int) -> None:
    rng = random.Random(2)
    for _ in range(n):
        spec = json_of(rng.choice(KINDS))
        *above, last = rng.choice(places(spec))
        section = spec
        for key in above:
            section = section[key]
        section[last] = rng.choice(ODD)
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        try:
            tokenizer = Tokenizer.load(tmp_path)
            ids = tokenizer.encode("the </s> <|endoftext|> \u0416\0").tolist()
        except UserError:
            continue
        assert tokenizer.eod_id not in ids
        assert tokenizer.lost(tokenizer.decode(ids)).total() <= len(tokenizer.decode(ids).encode())
