"""Repair and mask text. Every step is off by default, and none changes source code or ordinary Unicode text.

The steps are repeated until they change nothing, so cleaning a cleaned text changes nothing.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import ftfy
from ftfy.badness import MOJIBAKE_CATEGORIES
from pydantic import Field, field_validator

from data_tools.filters.quality import POLICY
from data_tools.option_types import Lines
from megagpt.config.parsing import Strict
from megagpt.errors import UserError


class CleanConfig(Strict):
    """The steps, each switched on by itself."""

    newlines: bool = Field(default=False, description="CRLF and lone CR become a newline")
    mojibake: bool = Field(default=False, description="repair text decoded with the wrong encoding (ftfy)")
    control_characters: bool = Field(default=False, description="remove them, except newline, tab and CR")
    zero_width: bool = Field(default=False, description="remove byte order marks, zero-width spaces, word joiners")
    nfc: bool = Field(default=False, description="compose Unicode characters (NFC)")
    emails: bool = Field(default=False, description="mask e-mail addresses")
    email_replacement: str = Field(default="email@example.com", description="the text that replaces them")
    public_ips: bool = Field(default=False, description="mask public IP addresses, v4 and v6, but not private ones")
    ip_replacement: str = Field(default="192.0.2.1", description="the text that replaces them")
    policy_lines: bool = Field(default=False, description="drop lines about cookies, privacy, terms of use (C4's list)")
    drop_lines: Lines = Field(
        default=(), description="drop lines with exactly this text, except for case and surrounding white space"
    )
    drop_patterns: Lines = Field(
        default=(), description="drop lines in which one of these regular expressions is found"
    )

    @field_validator("email_replacement", "ip_replacement")
    @classmethod
    def _stands_for_itself(cls, value: str) -> str:
        if _masked_ips(_masked_emails(value, "x"), "x") not in (value, "x"):
            raise ValueError("contains an address, which would be masked again; give an address alone or none")
        return value


# `clean: true` switches these on: they need no list and lose nothing that a person has written
ALL_REPAIRS = ("newlines", "mojibake", "control_characters", "zero_width", "nfc")

Step = Callable[[str], str]
MOST_PASSES = 10  # usually two; the limit is for steps that would undo each other


def clean(text: str, cfg: CleanConfig) -> tuple[str, tuple[str, ...]]:
    """Clean a text; returns (the cleaned text, names of the steps that changed it)."""
    changed: dict[str, None] = {}
    for _ in range(MOST_PASSES):
        before = text
        for name, step in _steps(cfg):
            after = step(text)
            if after != text:
                changed[name] = None
                text = after
        if text == before:
            break
    return text, tuple(changed)


@lru_cache(maxsize=64)
def _steps(cfg: CleanConfig) -> tuple[tuple[str, Step], ...]:
    """Return (name, function) of the steps that are on, in the order in which they run."""
    drop_lines = line_dropper(cfg)
    steps: list[tuple[str, bool, Step]] = [
        ("newlines", cfg.newlines, lambda text: text.replace("\r\n", "\n").replace("\r", "\n")),
        ("mojibake", cfg.mojibake, repair_mojibake),
        ("control_characters", cfg.control_characters, _without_control_characters),
        ("zero_width", cfg.zero_width, _without_zero_width),
        ("nfc", cfg.nfc, lambda text: unicodedata.normalize("NFC", text)),  # quick for a text that is in NFC
        ("emails", cfg.emails, lambda text: _masked_emails(text, cfg.email_replacement)),
        ("public_ips", cfg.public_ips, lambda text: _masked_ips(text, cfg.ip_replacement)),
    ]
    if drop_lines:
        steps.append(("boilerplate", True, drop_lines))
    return tuple((name, step) for name, is_on, step in steps if is_on)


# --- characters ---------------------------------------------------------------------------------------------------

# Encoding repair only: HTML entities, quotes, ligatures, full-width letters and terminal escapes may be intended.
REPAIR = ftfy.TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_encoding=True,
    restore_byte_a0=True,
    replace_lossy_sequences=True,
    decode_inconsistent_utf8=True,
    fix_c1_controls=True,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=True,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)

# ftfy changes a line only if its heuristic (ftfy.badness) matches. Each of its patterns needs one of the characters in
# _ALONE, or a character in _BEHIND after one that is not ASCII. So lines without these need not be given to ftfy.
_ALONE = "\x80-\x9fÂÃŒœЂ\ud800-\udfff"
_BEHIND = "".join(chars for name, chars in MOJIBAKE_CATEGORIES.items() if name not in ("lower_common", "upper_common"))
SUSPICIOUS = re.compile(f"[^\0-\x7f](?:(?<=[{_ALONE}])|[{_BEHIND}])")


def repair_mojibake(text: str) -> str:
    """Repair mojibake with ftfy, only on the lines that may need it."""
    if text.isascii():
        return text
    parts, end = [], 0
    while found := SUSPICIOUS.search(text, end):
        start = text.rfind("\n", end, found.start() + 1) + 1 or end
        parts.append(text[end:start])
        end = text.find("\n", found.start()) + 1 or len(text)  # with its newline, as ftfy cuts lines
        parts.append(ftfy.fix_text(text[start:end], REPAIR))
    return "".join([*parts, text[end:]]) if parts else text


_C0 = bytes(code for code in (*range(32), 127) if chr(code) not in "\n\t\r")
_C1 = re.compile(rb"\xc2[\x80-\x9f]")  # U+0080 to U+009F in UTF-8


def _without_control_characters(text: str) -> str:
    # on bytes, where deleting is ten times as fast
    data = text.encode(errors="surrogatepass")
    kept = data.translate(None, _C0)
    if not text.isascii():
        kept = _C1.sub(b"", kept)
    return text if len(kept) == len(data) else kept.decode(errors="surrogatepass")


# without the joiners U+200C and U+200D, which Persian, Indic scripts and emoji need
ZERO_WIDTH = ("\ufeff", "\u200b", "\u2060")


def _without_zero_width(text: str) -> str:
    for character in ZERO_WIDTH:
        text = text.replace(character, "")
    return text


# --- addresses ----------------------------------------------------------------------------------------------------

_LOCAL = ".ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+/=?^_`{|}~-"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
EMAIL = re.compile(rf"\b{_ATOM}(?:\.{_ATOM})*@(?:{_LABEL}\.)+{_LABEL}")  # datatrove's, without IP addresses as domain
LONGEST_LOCAL, LONGEST_DOMAIN = 64, 255
MAYBE_EMAIL = re.compile(r"@(?<=[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]@)[A-Za-z0-9][A-Za-z0-9-]{0,62}\.")
# not part of a longer dotted number (an object identifier) or of a name (v1.2.3.4)
IPV4 = re.compile(r"(?<![\w.])\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}(?!\w|\.\w)", re.ASCII)
MAYBE_IPV4 = re.compile(r"\.(?<=\d\.)\d{1,3}\.\d{1,3}\.\d", re.ASCII)
# global unicast (2000::/3) in at least three groups, so that a slice or a time does not match
IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){3,7}(?![\w:])")
MAYBE_IPV6 = re.compile(r":(?<=[23][0-9A-Fa-f]{3}:)[0-9A-Fa-f:]+:")


def _masked_emails(text: str, replacement: str) -> str:
    """Return the same as EMAIL.sub, but searching only around each @, within the lengths that RFC 5321 allows."""
    parts, end = [], 0
    for at in MAYBE_EMAIL.finditer(text):
        before = text[max(end, at.start() - LONGEST_LOCAL) : at.start()]
        start = at.start() - len(before) + len(before.rstrip(_LOCAL))
        found = EMAIL.search(text, start, at.end() + LONGEST_DOMAIN)
        if found and found.start() < at.start():
            parts += [text[end : found.start()], replacement]
            end = found.end()
    return "".join([*parts, text[end:]]) if parts else text


def _masked_ips(text: str, replacement: str) -> str:
    """Replace public IP addresses. The MAYBE patterns rule out most texts in a fraction of the time."""

    def masked(found: re.Match[str]) -> str:
        return replacement if _is_public(found[0]) else found[0]

    if MAYBE_IPV4.search(text):
        text = IPV4.sub(masked, text)
    if MAYBE_IPV6.search(text):
        text = IPV6.sub(masked, text)
    return text


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


# --- lines --------------------------------------------------------------------------------------------------------


def line_dropper(cfg: CleanConfig) -> Step | None:
    """Return a step that drops boilerplate lines, or None if the options name none.

    Raises UserError for a bad pattern.
    """
    exact = {line.strip().casefold() for line in cfg.drop_lines}
    patterns = [*_compiled(cfg.drop_patterns)]
    phrases = POLICY if cfg.policy_lines else ()
    if not (exact or patterns or phrases):
        return None

    def drops(line: str) -> bool:
        folded = line.strip().casefold()
        return (
            folded in exact
            or any(phrase in folded for phrase in phrases)
            or any(pattern.search(line) for pattern in patterns)
        )

    def drop(text: str) -> str:
        if not (exact or patterns):  # with phrases only, most texts need not be looked at line by line
            folded = text.casefold()
            if not any(phrase in folded for phrase in phrases):
                return text
        return "\n".join([line for line in text.split("\n") if not drops(line)])

    return drop


def _compiled(patterns: tuple[str, ...]) -> Iterator[re.Pattern[str]]:
    for pattern in patterns:
        try:
            yield re.compile(pattern)
        except re.error as error:
            raise UserError(f"rules.clean.drop_patterns: {pattern!r} is not a regular expression: {error}") from error


def switch_repairs(value: Any) -> Any:
    """Return the value of `clean`: true is all repairs of characters, false and null are none."""
    if isinstance(value, bool) or value is None:
        return dict.fromkeys(ALL_REPAIRS, True) if value else {}
    return value
