"""Find the text of a record: a field by its name or path, or a chat, written out by a template."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from data_tools.config import ChatTemplate, SourceConfig
from data_tools.formatting import listed
from data_tools.readers.document_pieces import Pieces, SkippedRecord, pieces_of
from data_tools.readers.input_file import UnreadableFile
from megagpt.terminal import typed

MISSING = object()
TEMPLATES: dict[ChatTemplate, str] = {
    "chatml": "<|im_start|>{role}\n{content}<|im_end|>\n",
    "llama3": "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
    "plain": "{role}: {content}\n\n",
}
# names under which published datasets have their text
USUAL = (
    *("text", "content", "raw_content", "page_content", "body", "document", "article", "code"),
    *("messages", "conversations"),  # of chats
)
CHAT_VERSION = 2  # raise it when a chat is written out in another way
NOT_WRITTEN = ("tool_calls", "function_call", "refusal", "audio")  # what a message may have beside its content
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names


def read_record(record: dict[str, Any], source: SourceConfig, position: int, where: Callable[[], str]) -> Pieces:
    """Yield the pieces of a record's text, or why it has none.

    Raises UnreadableFile for the first record of a file without it: most likely the options are wrong.
    """
    field, template = source.text_field, source.chat_template
    value = field_at(record, field)
    if value is MISSING:
        reason, way_out = f"no field {field!r}", f"it has {listed(_paths(record))}; {_set_field(_paths(record), field)}"
    elif _is_chat(value) and not template:
        reason = f"a list of chat messages as {field!r}"
        way_out = f"set chat_template=NAME; known are {', '.join(TEMPLATES)}"
    elif template and value and not _is_chat(value):
        reason, way_out = f"no list of chat messages as {field!r}", "leave out chat_template, or set text_field=NAME"
    elif template and value and (value := _written_out(value, template)) is None:
        yield SkippedRecord("a chat message without text, or with more than text (a call of a tool, an image)", where)
        return
    else:
        yield from pieces_of(value or "" if template else value, position, where, field)
        return
    if position == 0:
        raise UnreadableFile(f"{where()} has {reason}; {way_out}")
    yield SkippedRecord(reason, where)


def field_at(record: Any, path: str) -> Any:
    """Return the value at a path such as `data.text` or `choices.0.text`, or MISSING.

    A field whose own name has dots comes first.
    """
    if isinstance(record, list):
        head, _, rest = path.partition(".")
        if not head.isdecimal() or int(head) >= len(record):
            return MISSING
        return field_at(record[int(head)], rest) if rest else record[int(head)]
    if not isinstance(record, dict):
        return MISSING
    if path in record:
        return record[path]
    for head, rest in splits_of(path):
        if head in record and (value := field_at(record[head], rest)) is not MISSING:
            return value
    return MISSING


def check_column(path: str, columns: Sequence[str], field: str) -> None:
    """Raise UnreadableFile unless a table has exactly one column of this name."""
    if (n := columns.count(field)) > 1:
        raise UnreadableFile(f"{path} has {n} columns {field!r}; rename all but one")
    if not n:
        raise UnreadableFile(f"{path} has no column {field!r}; it has {listed(columns)}; {_set_field(columns, field)}")


def _set_field(names: Sequence[str], field: str) -> str:
    """Return the option to give, with the name that is likely meant, if there is one."""
    likely = [name for usual in (field.casefold(), *USUAL) for name in names if name.casefold() == usual]
    found = next(iter(likely or (names if len(names) == 1 and len(names[0]) < 40 else [])), "")
    return f"set {typed(f'text_field={found}')}" if found else "set text_field=NAME, one of these"


def splits_of(path: str) -> Iterator[tuple[str, str]]:
    """Yield (head, rest) of a path at each of its dots, the shortest head first."""
    keys = path.split(".")
    return ((".".join(keys[:i]), ".".join(keys[i:])) for i in range(1, len(keys)))


def _paths(record: dict[str, Any], depth: int = 3) -> list[str]:
    """Return the names of a record's fields, and the paths in nested ones."""
    paths = []
    for name, value in sorted(record.items()):
        inner = _paths(value, depth - 1) if isinstance(value, dict) and depth else []
        paths += [f"{name}.{path}" for path in inner] or [name]
    return paths


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(message, dict) for message in value)


def _written_out(messages: Iterable[dict[str, Any]], template: ChatTemplate) -> str | None:
    """Return a chat as text, or None if one of its messages has none, or what no template writes."""
    parts = []
    for message in messages:
        role = message.get("role") or message.get("from")
        # a table has every key in every message
        content = message.get("value") if message.get("content") is None else message["content"]
        texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in _as_list(content)]
        is_text = all(isinstance(text, str) for text in texts) and not any(map(message.get, NOT_WRITTEN))
        if not isinstance(role, str) or not is_text:
            return None
        parts.append(TEMPLATES[template].format(role=ROLES.get(role, role), content="".join(texts)))
    return "".join(parts)


def _as_list(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]
