"""Each cleaning step alone, what it must not change, and that cleaning a cleaned text changes nothing."""

import ftfy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_tools.filters.cleaning import REPAIR, CleanConfig, clean, repair_mojibake

EVERYTHING = CleanConfig(
    newlines=True,
    mojibake=True,
    control_characters=True,
    zero_width=True,
    nfc=True,
    emails=True,
    public_ips=True,
    policy_lines=True,
    drop_lines=("Share this",),
    drop_patterns=(r"^Page \d+ of \d+$",),
)

# texts on which steps tend to interact: mojibake, half of it, marks, controls, line ends, addresses
PIECES = [
    *"aZ 1.@:-\n\r\t\0\x0b\x0c\x1b\x7f\x85\x81\x92\u00e9\u00c3\u00c2\u00a9\u00a0\u2019\u201d\u20ac\u0153\u0418\u4e2d",
    *"\ufeff\u200b\u200d\u2060\u0301\ufffd\u212b",
    *("cafe\u0301", "\u00c3\u00a9", "\u00e2\u20ac\u2122", "\u00f0\u0178\u02dc\u20ac"),
    *("a@b.co", "8.8.8.8", "2001:db8::1", "2606:4700:4700::1111"),
    *("share this", "Page 1 of 2", "We use cookies"),
]
TANGLED = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
TEXT = st.text() | TANGLED


def cleaned(text: str, **options: object) -> str:
    return clean(text, CleanConfig.model_validate(options))[0]


def test_nothing_is_on_by_default():
    text = "\ufeffe\u0301\r\n\0a@b.co 8.8.8.8 \u00c3\u00a9 We use cookies"
    assert clean(text, CleanConfig()) == (text, ())


@given(TEXT)
def test_cleaning_a_cleaned_text_changes_nothing(text):
    once, _ = clean(text, EVERYTHING)
    assert clean(once, EVERYTHING) == (once, ())


@given(TEXT)
def test_the_names_of_the_steps_say_whether_the_text_changed(text):
    after, changed = clean(text, EVERYTHING)
    assert bool(changed) or after == text


@pytest.mark.parametrize(
    "text",
    [
        "def f(x: int) -> str:\n\treturn f'{x!r:>10}'  # \u201ccurly\u201d &amp; <b>\n",
        "na\u00efve caf\u00e9, \u4f60\u597d\uff0c\u4e16\u754c\uff01 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u00b5m",
        "\ufb01ne \uff21\uff22 \u2026\u2014 \U0001f469\u200d\U0001f680",
        "\u0646\u0645\u06cc\u200c\u062f\u0627\u0646\u0645 \u0915\u094d\u200d\u0937",
        "10.0.0.1 192.168.1.1 127.0.0.1 ::1 fe80::1 2001:db8::1 1.2.3 v1.2.3.4 a[::2] x[2000::10] 12:30:59",
        "@property\ndef f(self): ...\nuser@localhost a @ b.c git@ @b.co",
    ],
)  # fmt: skip
def test_code_and_ordinary_text_are_left_alone(text):
    assert clean(text, EVERYTHING) == (text, ())


# --- characters ---------------------------------------------------------------------------------------------------


def test_each_step_does_its_own():
    assert cleaned("a\r\nb\rc\n", newlines=True) == "a\nb\nc\n"
    assert cleaned("a\0\x0b\x7f\u0085\u009f\n\t\rb\u00a0", control_characters=True) == "a\n\t\rb\u00a0"
    assert cleaned("\ufeffa\u200bb\u2060c\u200d\u200cd", zero_width=True) == "abc\u200d\u200cd"
    assert cleaned("cafe\u0301 \ufb01", nfc=True) == "caf\u00e9 \ufb01"
    assert cleaned("It\u00e2\u20ac\u2122s a caf\u00c3\u00a9", mojibake=True) == "It\u2019s a caf\u00e9"


@given(TEXT)
def test_a_line_that_needs_no_repair_is_told_from_one_that_does(text):
    assert repair_mojibake(text) == ftfy.fix_text(text, REPAIR)


@given(TEXT, st.sampled_from(["latin-1", "cp1252", "cp1251", "macroman", "cp437"]))
def test_mojibake_is_repaired_as_ftfy_repairs_it(text, encoding):
    broken = text.encode(errors="replace").decode(encoding, errors="replace") + "\n" + text
    assert repair_mojibake(broken) == ftfy.fix_text(broken, REPAIR)


# --- addresses ----------------------------------------------------------------------------------------------------


def test_email_addresses_are_masked():
    assert cleaned("Write to Jane.Doe+x@mail.example-host.co.uk.", emails=True) == "Write to email@example.com."
    assert cleaned("<a@b.co>,c@d.org", emails=True, email_replacement="<hidden>") == "<<hidden>>,<hidden>"
    assert cleaned(f"{'x' * 10**6}@b.co {'y.' * 10**6}@", emails=True).endswith("@")


def test_public_addresses_are_masked_and_no_others():
    assert cleaned("8.8.8.8, 10.1.2.3 (1.1.1.1)", public_ips=True) == "192.0.2.1, 10.1.2.3 (192.0.2.1)"
    assert cleaned("at 2606:4700:4700::1111.", public_ips=True, ip_replacement="<ip>") == "at <ip>."
    for text in (
        "1.2.3",
        "v8.8.8.8",
        "8.8.8.8.8",
        "8.8.8.888",
        "08.8.8.8",
        "1.3.6.1.4.1.311",
        "2024:01:01:10:20",
        "::ffff",
    ):
        assert cleaned(text, public_ips=True) == text


def test_a_replacement_that_would_be_masked_again_is_refused():
    with pytest.raises(ValidationError, match="masked again"):
        CleanConfig(ip_replacement="not 8.8.8.8")
    with pytest.raises(ValidationError, match="masked again"):
        CleanConfig(email_replacement="<a@b.co>")


# --- lines --------------------------------------------------------------------------------------------------------


def test_boilerplate_lines_are_dropped():
    text = "One.\n  SHARE THIS \nPage 2 of 9\nSee page 2 of 9\nRead our Privacy Policy.\nTwo.\n"
    assert cleaned(text, drop_lines=["Share this"]) == text.replace("  SHARE THIS \n", "")
    assert cleaned(text, drop_patterns=[r"^Page \d+ of \d+$"]) == text.replace("Page 2 of 9\n", "")
    assert cleaned(text, policy_lines=True) == text.replace("Read our Privacy Policy.\n", "")
    assert clean(text, EVERYTHING) == ("One.\nSee page 2 of 9\nTwo.\n", ("boilerplate",))
