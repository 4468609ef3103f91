"""The rules' verdict on a document: options, order, custom rules, languages, and the check before a build."""

import json
import pickle
import re

import fasttext
import pytest
from pydantic import ValidationError

from data_tools.filters.cleaning import CleanConfig
from data_tools.filters.quality import C4Config, GopherQualityConfig
from data_tools.filters.repetition import GopherRepetitionConfig
from data_tools.filters.rules import RulesConfig, Verdict, apply_rules, check_rules, clean_only
from megagpt.errors import UserError

ENGLISH = "The committee met on Monday to talk about the new library and the people who will have to run it."
GERMAN = "Der Ausschuss traf sich am Montag und sprach lange darüber, wer die neue Bücherei leiten soll."
THREADS = 11  # fastText's initialization is in ten parts, one for each thread: with fewer, the rest is left as it was


def rules(**options: object) -> RulesConfig:
    return RulesConfig.model_validate(options)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """Two languages, from a few words of each."""
    folder = tmp_path_factory.mktemp("fasttext")
    (folder / "train.txt").write_text(f"__label__en {ENGLISH}\n__label__de {GERMAN}\n" * 50)
    model = fasttext.train_supervised(
        str(folder / "train.txt"), dim=8, epoch=100, lr=0.5, minn=2, maxn=3, bucket=2000, thread=THREADS, verbose=0
    )
    model.save_model(str(folder / "two.bin"))
    return folder / "two.bin"


@pytest.fixture
def my_rules(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(
        "def keep(text): return True\n"
        "def say_nothing(text): return None\n"
        "def short(text): return len(text) < 20\n"
        "def named(text): return 'has a tab' if '\\t' in text else None\n"
        "def broken(text): return text[10**9]\n"
        "def number(text): return 7\n"
        "constant = 3\n"
        "class Nested:\n    pass\n"
    )
    (tmp_path / "raises_at_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)


# --- options ------------------------------------------------------------------------------------------------------


def test_without_options_nothing_is_changed_or_rejected():
    for text in ("", "\ufeffx\r\n", "{lorem ipsum}", "a"):
        assert apply_rules(text, RulesConfig()) == Verdict(text, (), None)


def test_true_is_the_published_rule_and_false_is_none():
    assert rules(gopher_quality=True).gopher_quality == GopherQualityConfig()
    assert rules(gopher_repetition={}).gopher_repetition == GopherRepetitionConfig()
    assert rules(c4={"min_sentences": 3}).c4 == C4Config(min_sentences=3)
    assert rules(c4=False, fineweb=None, language=False, clean=False) == RulesConfig()
    repairs = rules(clean=True).clean
    assert repairs.mojibake
    assert not repairs.emails


def test_a_misspelt_threshold_is_an_error():
    with pytest.raises(ValidationError, match="min_word"):
        rules(gopher_quality={"min_word": 3})


def test_options_survive_json_and_pickle_and_can_be_keys(language_model):
    cfg = rules(
        clean={"nfc": True, "drop_lines": ["Share"], "drop_patterns": ["^Page [0-9]+$"]},
        gopher_repetition=True,
        c4=True,
        language={"model": str(language_model), "keep": ["en"]},
        custom=["a.b:c"],
    )
    assert RulesConfig.model_validate_json(cfg.model_dump_json()) == cfg
    assert RulesConfig.model_validate(json.loads(json.dumps(cfg.model_dump(mode="json")))) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg
    assert {cfg: 1}[cfg.model_copy()] == 1


def test_every_option_is_described():
    for model in (RulesConfig, *(type(rules(**{name: True}).__getattribute__(name)) for name in RULES), CleanConfig):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


RULES = ("gopher_quality", "gopher_repetition", "c4", "fineweb")


# --- the verdict --------------------------------------------------------------------------------------------------


def test_the_first_rule_that_rejects_has_the_word():
    text = "{ short }"
    everything = dict.fromkeys(RULES, True)
    assert apply_rules(text, rules(**everything)).rejected_by == "gopher_quality: fewer than 50 words"
    everything["gopher_quality"] = False
    assert apply_rules(text, rules(**everything)).rejected_by == "gopher_repetition: the most frequent 2-gram"
    everything["gopher_repetition"] = False
    assert apply_rules(text, rules(**everything)).rejected_by == "c4: fewer than 5 sentences"
    assert (
        apply_rules(text, rules(fineweb=True)).rejected_by == "fineweb: share of lines with end punctuation below 0.12"
    )


def test_rules_judge_the_cleaned_text():
    text = "word\r\n" * 3
    lines = {"max_duplicate_lines": 0.4, "max_duplicate_line_characters": None, "max_top_ngrams": []}
    cfg = rules(clean=True, gopher_repetition=lines)
    assert apply_rules(text, cfg) == Verdict("word\nword\nword\n", ("newlines",), "gopher_repetition: duplicate lines")


def test_a_text_of_which_cleaning_leaves_nothing_is_rejected():
    cfg = rules(clean={"drop_lines": ["share this"]})
    assert apply_rules("Share this\n", cfg).rejected_by == "clean: nothing is left"


def test_c4_drops_lines_and_says_so():
    text = "Home | About\n" + "This is a sentence of words.\n" * 5
    kept = "\n".join(["This is a sentence of words."] * 5)
    assert apply_rules(text, rules(c4=True)) == Verdict(kept, ("c4",), None)


def test_later_pieces_are_cleaned_but_not_judged():
    text = "Home | About\nThis has a { in it.\r\n"
    assert clean_only(text, rules(clean=True, c4=True, gopher_quality=True)) == Verdict(
        "\nThis has a { in it.", ("newlines", "c4"), None
    )


# --- custom rules -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("my_rules")
def test_a_custom_rule_keeps_rejects_or_gives_a_reason():
    def rejected_by(text: str, *paths: str) -> str | None:
        cfg = rules(custom=paths)
        check_rules(cfg)
        return apply_rules(text, cfg).rejected_by

    assert rejected_by("x" * 30, "my_rules:keep", "my_rules.say_nothing") is None
    assert rejected_by("x", "my_rules:short") is None
    assert rejected_by("x" * 30, "my_rules:keep", "my_rules:short") == "custom: my_rules:short"
    assert rejected_by("\t", "my_rules.named") == "custom: my_rules.named: has a tab"
    assert rules(custom="my_rules:keep,my_rules:short").custom == ("my_rules:keep", "my_rules:short")


@pytest.mark.usefixtures("my_rules")
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:rule", "cannot import no_such_module"),
        ("raises_at_import:rule", "ZeroDivisionError"),
        ("my_rules:missing", "no function 'missing'"),
        ("my_rules:constant", "no function 'constant'"),
        ("rule", "write package.module:function"),
        (":rule", "write package.module:function"),
    ],
)
def test_a_custom_rule_that_cannot_be_called_is_found_beforehand(path, message):
    with pytest.raises(UserError, match=message):
        check_rules(rules(custom=[path]))


@pytest.mark.usefixtures("my_rules")
def test_a_custom_rule_that_fails_is_named():
    with pytest.raises(UserError, match="my_rules:broken failed with IndexError"):
        apply_rules("text", rules(custom=["my_rules:broken"]))
    with pytest.raises(UserError, match="my_rules:number returned 7"):
        apply_rules("text", rules(custom=["my_rules:number"]))


# --- languages ----------------------------------------------------------------------------------------------------


def test_languages_that_are_not_wanted_are_rejected(language_model):
    english = rules(language={"model": str(language_model), "keep": ["en"]})
    check_rules(english)
    assert apply_rules(ENGLISH + "\n" + ENGLISH, english).rejected_by is None
    assert apply_rules(GERMAN, english).rejected_by == "language: not one of en"
    both = rules(language={"model": str(language_model), "keep": ["en", "de"]})
    assert apply_rules(GERMAN, both).rejected_by is None


def test_without_a_list_any_language_that_is_clear_is_kept(language_model):
    clear = rules(language={"model": str(language_model), "min_score": 0.9})
    assert apply_rules(GERMAN, clear).rejected_by is None
    certain = rules(language={"model": str(language_model), "min_score": 1 - 1e-9})
    assert apply_rules(GERMAN, certain).rejected_by == "language: none that is clear"


def test_what_is_no_language_model_is_refused(tmp_path):
    (tmp_path / "text.bin").write_text("no model")
    (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    for name, message in {
        "missing.bin": "No such file",
        "text.bin": "is not a fastText model",
        "pointer.bin": rf"pointer\.bin is a Git LFS pointer, .* git -C {re.escape(str(tmp_path))} lfs pull$",
    }.items():
        with pytest.raises(UserError, match=message):
            check_rules(rules(language={"model": str(tmp_path / name)}))


# --- patterns -----------------------------------------------------------------------------------------------------


def test_a_pattern_that_does_not_compile_is_found_beforehand():
    with pytest.raises(UserError, match=r"drop_patterns: '\(' is not a regular expression"):
        check_rules(rules(clean={"drop_patterns": ["("]}))
