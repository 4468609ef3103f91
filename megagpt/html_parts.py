"""The parts of an HTML page without external files: sections, figures, tables, examples. Every text is escaped."""

import html
from collections.abc import Iterable, Mapping, Sequence

Cell = str | int | float | None
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 2rem auto; padding: 0 1.5rem }
h1 { margin: 0; overflow-wrap: anywhere } h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid #ccc }
p { max-width: 46rem; overflow-wrap: anywhere }
.note { color: #666; margin: .3rem 0 } .warning { color: #a40000; font-weight: 600 }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2.5rem; margin: 1rem 0 } dt { color: #666 }
dd { margin: 0; font-size: 1.5rem; font-variant-numeric: tabular-nums }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem 2rem }
.plots > * { min-width: 0 }
figure { margin: .5rem 0; break-inside: avoid } figcaption { font-weight: 600; overflow-wrap: anywhere }
svg { max-width: 100%; height: auto } svg text { font-family: system-ui, sans-serif !important }
.scroll { overflow-x: auto } table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .5rem; text-align: right; border-bottom: 1px solid #e5e5e5; white-space: nowrap }
th { vertical-align: bottom; white-space: normal; max-width: 9rem; overflow-wrap: break-word }
tr > .name { text-align: left; white-space: normal; overflow-wrap: anywhere }
tr > .name { min-width: 5rem } tr > .name + .name { min-width: 11rem } tr.total { font-weight: 600 }
details { margin: .3rem 0 } summary { cursor: pointer; overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; border-left: 3px solid #ccc;
  margin: .4rem 0; padding: .4rem .7rem; font-size: 13px; line-height: 1.4 }
@media (max-width: 40rem) { th, td { padding: .15rem .3rem; font-size: 13px } dd { font-size: 1.2rem } }
@media screen and (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd } h2 { border-color: #555 } th, td { border-color: #3a3a3a }
  .note, dt { color: #aaa } .warning { color: #ff8a80 } pre { background: #22252a; border-color: #555 }
  svg { filter: invert(.9) hue-rotate(180deg) } }
@media print { body { margin: 0; font-size: 11px } .scroll { overflow: visible } tr { break-inside: avoid }
  h2 { break-after: avoid } th, td { padding: .1rem .4rem } }
"""
# nothing is loaded, and nothing runs, whatever a text contains
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title: str, parts: Iterable[str], *, generator: str | None = None) -> str:
    """Return an HTML page that needs no other file. `generator` names the program that wrote it."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        + (f'<meta name="generator" content="{text(generator)}">\n' if generator else "")
        + f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}: report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{text(title)}</h1>\n{''.join(parts)}</body>\n</html>\n"
    )


def text(shown: str) -> str:
    return html.escape(printable(shown))


def printable(text: str) -> str:
    """Text with unprintable characters, among them those that change the writing direction, as escape sequences."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def without_middle(text: str, most: int) -> str:
    """Printable text of at most `most` characters; a longer one loses its middle."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most - most // 2) :]}"


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{''.join(parts)}</section>\n"


def note(shown: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{text(shown)}</p>\n'


def facts(named: Mapping[str, str]) -> str:
    return f"<dl>{''.join(f'<div><dt>{name}</dt><dd>{text(fact)}</dd></div>' for name, fact in named.items())}</dl>\n"


def side_by_side(*parts: str) -> str:
    """Return the parts in columns, or below each other where the window is narrow."""
    return f'<div class="plots">{"".join(f"<div>{part}</div>" for part in parts)}</div>\n'


def figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{text(caption)}</figcaption>\n{svg}</figure>\n"


def folded(summary: str, *parts: str, is_open: bool = False) -> str:
    """Return parts that a click unfolds."""
    return f"<details{' open' if is_open else ''}><summary>{text(summary)}</summary>\n{''.join(parts)}</details>\n"


def quotation(where: str, quoted: str) -> str:
    """Return a piece of somebody's text, with its line ends."""
    lines = "\n".join(text(line.expandtabs(4)) for line in quoted.split("\n"))
    return f"{note(where) if where else ''}<pre>{lines}</pre>\n"


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    names: int = 1,
    last_is_name: bool = False,
    total: Sequence[Cell] | None = None,
) -> str:
    """Return an HTML table. The first `names` columns hold names, the others figures; `total` is a last row."""

    def line(tag: str, cells: Sequence[Cell]) -> str:
        is_name = [i < names or (last_is_name and i == len(cells) - 1) for i in range(len(cells))]
        return "".join(
            f"<{tag}{' class=name' if named else ''}>{text(_shown(cell))}</{tag}>"
            for cell, named in zip(cells, is_name, strict=True)
        )

    body = "".join(f"<tr>{line('td', row)}</tr>\n" for row in rows)
    if total is not None:
        body += f'<tr class="total">{line("td", total)}</tr>\n'
    return (
        f'<div class="scroll"><table>\n<thead><tr>{line("th", head)}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return cell if isinstance(cell, str) else f"{cell:,}"
