"""Check the links of a built site: each leads to a page and a place on it, and nothing is loaded from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that a browser fetches by itself, and those that a reader follows.
LOADED = {("script", "src"), ("img", "src"), ("source", "src"), ("iframe", "src"), ("link", "href")}
FOLLOWED = {("a", "href")}
NOT_LOADED = {"canonical", "next", "prev", "alternate"}  # what a <link> may name without being fetched
CSS_ADDRESS = re.compile(r"(?:url\(|@import)\s*['\"]?(https?:)?//")


class Page(HTMLParser):
    """The ids of a page, and the addresses in it."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.loaded: list[str] = []
        self.followed: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Collect what one element names."""
        values = {name: value or "" for name, value in attributes}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        for name, value in values.items():
            if (tag, name) in FOLLOWED:
                self.followed.append(value)
            elif (tag, name) in LOADED and values.get("rel") not in NOT_LOADED:
                self.loaded.append(value)


def check(site: Path) -> tuple[list[str], list[str]]:
    """Return what is wrong with a site's links, a line each, and the links to other sites, which are not followed."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    wrong, elsewhere = [], set()
    for path, page in pages.items():
        where = path.relative_to(site)
        wrong += [f"{where}: loads {url} from another server" for url in page.loaded if urlsplit(url).netloc]
        for url in [*page.followed, *page.loaded]:
            if urlsplit(url).scheme or urlsplit(url).netloc:
                elsewhere.add(url)
            elif problem := _problem(url, path, pages, site):
                wrong.append(f"{where}: {url} {problem}")
    for path in sorted(site.rglob("*.css")):
        if CSS_ADDRESS.search(path.read_text(encoding="utf-8")):
            wrong.append(f"{path.relative_to(site)}: loads from another server")
    return wrong, sorted(elsewhere)


def _problem(url: str, path: Path, pages: dict[Path, Page], site: Path) -> str | None:
    """Return what is wrong with a link within the site."""
    parts = urlsplit(url)
    root = site if parts.path.startswith("/") else path.parent
    target = (root / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return "leads to no file"
    known = pages.get(target)
    if parts.fragment and known and unquote(parts.fragment) not in known.ids:
        return f"leads to no place in {target.relative_to(site)}"
    return None
