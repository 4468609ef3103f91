"""Write the parts of generated pages: text that Markdown shows as it is, and lists of terms with their meanings."""

import re
from collections.abc import Iterable

SPECIAL = re.compile(r"[\\*_\[\]{}#`]")


def plain(text: str) -> str:
    """Return Markdown that shows a text as it is; what stands between backticks remains code."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return SPECIAL.sub(r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;"))


def code(text: str) -> str:
    """Return a text as inline code."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def block(text: str, language: str = "text") -> str:
    """Return a text as a block of code."""
    return f"```{language}\n{text.strip(chr(10))}\n```"


def term(name: str, facts: str, meaning: str, *, anchor: str = "") -> str:
    """Return a term as an entry of a definition list, which a narrow screen shows as well as a wide one.

    `anchor` is the part of a link after #; `facts` is a line of its own above the meaning.
    """
    target = f'<span id="{anchor}"></span>' if anchor else ""
    lines = [f"{target}{code(name)}", f":   {facts}" if facts else f":   {meaning}"]
    if facts and meaning:
        lines += ["", f"    {meaning}"]
    return "\n".join(lines)


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page that says that it is generated."""
    return "\n\n".join([f"# {title}", *parts]) + "\n"
