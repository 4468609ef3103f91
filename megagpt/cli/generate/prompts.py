"""Prompts as people give them: on the command line, in a file, or typed one after the other."""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from megagpt.config.parsing import unescaped
from megagpt.errors import UserError
from megagpt.git_pointers import pointer_instead_of
from megagpt.terminal import print_error, show, typed
from megagpt.user_paths import local_path

MOST_BYTES = 2**28  # of a file of prompts, which is read before the first text is generated
JSON_LINES = (".jsonl", ".ndjson")
ONE_OBJECT = 'give JSON lines such as {"prompt": "Once upon a time"}'


def given(prompts: list[str] | None, file: str | None) -> list[str]:
    """Return the prompts of a file, or those typed as --prompt; a new document if there is none. Raises UserError."""
    return from_file(file) if file is not None else [as_typed(prompt, "--prompt") for prompt in prompts or [""]]


def as_typed(text: str, option: str) -> str:
    r"""Replace escapes such as `\n`. Raises UserError for bytes that are no text."""
    text = unescaped(text)
    if not _is_unicode(text):
        raise UserError(f"{option} {text[:40]!r} holds bytes that are not UTF-8; type it in a UTF-8 terminal")
    return text


def from_file(name: str) -> list[str]:
    """Return the prompts of a file, `-` for standard input. Raises UserError."""
    path = Path(local_path(name))
    try:
        content = sys.stdin.buffer.read(MOST_BYTES + 1) if name == "-" else _bytes_of(path)
    except IsADirectoryError:
        wanted = "give a file with a prompt per line, or a .jsonl"
        raise UserError(f"--prompts {typed(name)} is a folder; {wanted}") from None
    except OSError as error:
        raise UserError(
            f"the file of prompts {name} cannot be read: {error.strerror}; give a file with a prompt per line"
        ) from error
    if len(content) > MOST_BYTES:
        raise UserError(f"{name} is larger than {MOST_BYTES // 2**20} MiB; split it, and give a file of prompts alone")
    if message := pointer_instead_of(name, content):
        raise UserError(message)
    text = _decoded(content, name)
    if path.suffix == ".json":
        raise UserError(f"{name} is JSON, of which it is not clear what the prompts are; {ONE_OBJECT} in a .jsonl")
    lines = text.removesuffix("\n").split("\n") if text else []
    lines = [line.removesuffix("\r") for line in lines]
    found = list(_of_json_lines(lines, name)) if path.suffix in JSON_LINES else lines
    if not found:
        raise UserError(f"{name} is empty; give a file with a prompt per line")
    return found


def typed_one_by_one() -> Iterator[str]:
    """Yield each line that is typed, until Ctrl-D. Ctrl-C drops the line. Lines that are no text are told."""
    with suppress(ImportError):
        import_module("readline")  # gives input() line editing and a history
    while True:
        try:
            line = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
            yield as_typed(line, "the prompt")
        except EOFError:
            return
        except KeyboardInterrupt:
            show("")
        except UserError as error:
            print_error(f"error: {error}")
        except UnicodeDecodeError:
            print_error("error: the line holds bytes that are not UTF-8; type it in a UTF-8 terminal")


def _bytes_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


def _decoded(content: bytes, name: str) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{name} is UTF-16; convert it with: iconv -f utf-16 -t utf-8 {typed(name)} > prompts.txt")
    if b"\0" in content:
        raise UserError(f"{name} is binary, with NUL bytes; give UTF-8 text with a prompt per line")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name} is not UTF-8 text: line {line:,} has the byte 0x{content[error.start]:02x}; if it is Latin-1, "
            f"convert it with: iconv -f latin1 -t utf-8 {typed(name)} > prompts.txt"
        ) from None


def _of_json_lines(lines: list[str], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}, line {number:,}: is no JSON ({error}); {ONE_OBJECT}") from None
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str):
            keys = f"; it has {', '.join(map(repr, row))}" if isinstance(row, dict) and row else ""
            raise UserError(f'{name}, line {number:,}: has no text "prompt"{keys}; {ONE_OBJECT}')
        if not _is_unicode(prompt):
            raise UserError(
                f"{name}, line {number:,}: the prompt has half a surrogate pair, which is no text; correct it"
            )
        yield prompt


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
