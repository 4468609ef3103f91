"""Phrase what is wrong with an option that a command does not have: a misspelt one, or a key of the run file."""

import argparse
from collections.abc import Sequence
from difflib import get_close_matches

from megagpt.config.deepspeed_keys import DEEPSPEED_KEYS
from megagpt.config.mistakes import as_written, meant_keys, shortened
from megagpt.config.other_trainers import NOTES, OUR_KEY, WITHOUT_KEY
from megagpt.config.run_file import KEYS, SECTION

# Options of other programs that generate text -> ours.
OUR_OPTION = {
    **dict.fromkeys(("start", "p", "text", "input"), "--prompt"),
    **dict.fromkeys(("num_samples", "num_return_sequences", "n"), "--batch"),
    **dict.fromkeys(("max_new_tokens", "max_length", "length"), "--max-tokens"),
    **dict.fromkeys(("stop_string", "stop_strings", "stop_sequence", "stop_sequences", "until"), "--stop"),
    **dict.fromkeys(("repeat_penalty", "rep_penalty", "rep_pen"), "--repetition-penalty"),
    **dict.fromkeys(("prompt_file", "prompts_file", "input_file", "file"), "--prompts"),
    **dict.fromkeys(("chat", "i"), "--interactive"),
}
OFF = ("false", "0", "no", "off")
# What a parsed command line holds besides options.
NO_OPTIONS = {"command", "run_file", "overrides", "checkpoint", "run_dir", "local_rank"}


def no_option(args: argparse.Namespace, rest: Sequence[str], program: str) -> str:
    """Return a message about the first of the words that a command's parser left over, if that is an option.

    Keys of a run file are typed without dashes, other than in most trainers.
    """
    at, word = next(((i, word) for i, word in enumerate(rest) if word.startswith("-")), (0, rest[0]))
    if not word.startswith("-"):
        return f"there is nothing to do with {as_written(word)}; see `{program} --help`"
    name, has_value, value = word.lstrip("-").partition("=")
    said = f"there is no option {shortened(word.partition('=')[0])}"
    if ours := OUR_OPTION.get(name.replace("-", "_")):
        return f"{said}; did you mean {ours}?" if ours in _options(args) else f"{said}; see `{program} --help`"
    if near := get_close_matches(f"--{name}", sorted(_options(args)), n=1, cutoff=0.8):
        return f"{said}; did you mean {near[0]}?"
    name = name.replace("-", "_")
    if "overrides" not in args or not (name in WITHOUT_KEY or _keys(name)):
        return f"{said}; see `{program} --help`"
    if name in WITHOUT_KEY:
        return f"{said}: {WITHOUT_KEY[name]}"
    if not has_value:
        following = [*rest[at + 1 :], *args.overrides]
        value = next((other for other in following if "=" not in other and not other.startswith("-")), "VALUE")
    note = NOTES.get(name, NOTES.get(_keys(name)[0])) if name in OUR_KEY else None
    typed = " or ".join(_as_typed(key, "VALUE" if note else shortened(value)) for key in _keys(name))
    return f"{said}; keys of the run file are typed without dashes: {typed}{f'. {note}' if note else ''}"


def _as_typed(key: str, value: str) -> str:
    """Return the word that sets a key; one that switches a section on or off, or sets a key in it, for a section."""
    if f"{key}.enabled" in KEYS:
        return f"{key}.enabled={'false' if value.lower() in OFF else 'true'}"
    return f"{key}.KEY={value}" if any(other.startswith(f"{key}.") for other in KEYS) else f"{key}={value}"


def _options(args: argparse.Namespace) -> list[str]:
    found = [f"--{option.replace('_', '-')}" for option in vars(args).keys() - NO_OPTIONS]
    return found if "command" in args else [*found, "--deepspeed_config"]


def _keys(name: str) -> list[str]:
    """Return the keys of a run file that this name may stand for."""
    return [name] if name in KEYS else meant_keys(name, DEEPSPEED_KEYS | {SECTION}, KEYS)
