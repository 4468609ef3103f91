"""The documentation site: it is built without a warning, all its links lead somewhere, its reference is complete."""

import argparse
from pathlib import Path

import pytest

from docs_site import links
from docs_site.links import Page
from docs_site.markdown import plain
from megagpt.__main__ import COMMANDS
from megagpt.cli.arguments import command_line
from megagpt.config.deepspeed import DeepSpeedConfig
from megagpt.config.deepspeed_keys import DEEPSPEED_KEYS
from megagpt.config.schema import MegaGPTConfig
from megagpt.config.schema_keys import typed_keys


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site, which no warning of mkdocs or mkdocstrings has ended."""
    pytest.importorskip("mkdocs", reason="the site needs the extra docs")
    from docs_site.build import build_site

    folder = tmp_path_factory.mktemp("site")
    wrong, _ = build_site(folder)
    assert wrong == []
    return folder / "html"


@pytest.mark.process  # mkdocstrings asks git where the sources are
def test_the_reference_has_every_key_of_a_run_file(site):
    ids = Page((site / "reference" / "run_file.html").read_text()).ids
    typed = {f"megagpt.{key}" for key in typed_keys(MegaGPTConfig)} | typed_keys(DeepSpeedConfig)
    sections = {key.rpartition(".")[0] for key in typed}
    assert sorted((typed | DEEPSPEED_KEYS) - sections - ids) == []
    assert len(typed - sections) > 100


@pytest.mark.process
def test_the_reference_says_type_limits_and_default_of_a_key(site):
    text = (site.parent / "pages" / "reference" / "run_file.md").read_text()
    for key, facts in {
        "megagpt.schedule.max_steps": "whole number above 0 up to 1e+12 · **required**",
        "megagpt.ema.decay": "number above 0 below 1 or null · default `null`",
        "megagpt.schedule.weight_decay_shape": 'one of `constant`, `linear`, `lr` · default `"constant"`',
        "optimizer.params.betas": "number from 0 below 1 and number from 0 below 1 · default `[0.9, 0.95]`",
    }.items():
        assert f"`{key}`\n:   {facts}\n" in text


@pytest.mark.process
def test_the_reference_has_every_command_and_option(site):
    page = (site.parent / "pages" / "reference" / "commands.md").read_text()
    (commands,) = (action for action in command_line()._actions if isinstance(action, argparse._SubParsersAction))
    assert commands.choices.keys() == {"data", *COMMANDS}
    for name, parser in commands.choices.items():
        _, _, section = page.partition(f"\n### megagpt {name}\n")
        section = section.partition("\n### ")[0]
        assert section, name
        shown = [action for action in parser._actions if action.help != argparse.SUPPRESS and action.dest != "help"]
        assert [action.dest for action in shown if not _stands_in(section, action)] == [], name


def _stands_in(section: str, action: argparse.Action) -> bool:
    name = action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest.upper())
    return f"\n`{name}" in section


def test_a_dead_link_a_dead_anchor_and_a_foreign_script_are_found(tmp_path):
    (tmp_path / "other.html").write_text('<h1 id="here">x</h1>')
    (tmp_path / "page.html").write_text(
        '<a href="other.html#here">good</a><a href="https://json5.org">elsewhere</a><a href="gone.html">dead</a>'
        '<a href="other.html#there">dead</a><a href="#top">dead</a><script src="//cdn.example/x.js"></script>'
    )
    (tmp_path / "font.css").write_text("@font-face { src: url(https://fonts.example/x.woff) }")
    wrong, elsewhere = links.check(tmp_path)
    assert wrong == [
        "page.html: loads //cdn.example/x.js from another server",
        "page.html: gone.html leads to no file",
        "page.html: other.html#there leads to no place in other.html",
        "page.html: #top leads to no place in page.html",
        "font.css: loads from another server",
    ]
    assert "https://json5.org" in elsewhere


def test_markdown_that_is_generated_shows_what_was_written():
    markdown = pytest.importorskip("markdown")
    text = r"peak * sqrt(a / b) * 2, <unk>, [x](y), _z_, \n, {#id}, 1 | 2"
    shown = markdown.markdown(plain(text)).removeprefix("<p>").removesuffix("</p>")
    assert shown.replace("&lt;", "<").replace("&gt;", ">") == text
    assert markdown.markdown(plain("`a * b` is * code")) == "<p><code>a * b</code> is * code</p>"
