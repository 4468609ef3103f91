"""Messages name keys as they are typed: whoever copies a key out of an error gets one that works."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from support import GOOD

from data_tools.config import BuildConfig
from megagpt.config.run_file import parse_run
from megagpt.config.schema import MegaGPTConfig
from megagpt.config.schema_keys import typed_keys
from megagpt.errors import UserError

ROOT = Path(__file__).parents[1]
KEYS = {"megagpt": typed_keys(MegaGPTConfig, "megagpt"), "data_tools": typed_keys(BuildConfig)}
FILES = sorted(path for side in KEYS for path in (ROOT / side).rglob("*.py"))
RULES = {"gopher_quality", "gopher_repetition"}  # names that reports have, too


@cache
def endings(keys: frozenset[str]) -> set[str]:
    """What is left of a key without its first sections, if nobody could take that for a word of English."""
    cut = {".".join(key.split(".")[i:]) for key in keys for i in range(1, key.count(".") + 1)}
    return {key for key in cut - keys - RULES if "." in key or "_" in key}


def texts(path: Path) -> list[tuple[int, str]]:
    """Each string of a file that has a blank and is no docstring; an f-string with its values as `{}`."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    skipped: set[int] = set()
    for node in nodes:
        if isinstance(node, ast.Expr):  # a docstring, of a constant too
            skipped.add(id(node.value))
        elif isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
    found = []
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        else:
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
        if " " in text.strip():
            found.append((node.lineno, text))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_message_names_a_key_with_its_whole_path(path):
    side = path.relative_to(ROOT).parts[0]
    cut = sorted(map(re.escape, endings(KEYS[side])), key=len, reverse=True)
    bare = re.compile(rf"(?<![\w.-])(?:{'|'.join(cut)})(?![\w(])(?!\.\w)")
    assert [(line, text) for line, text in texts(path) if bare.search(text)] == []


def test_a_bare_key_in_a_message_would_be_found(tmp_path):
    path = tmp_path / "code.py"
    path.write_text('"""Says that val_tokens is fine here."""\nraise ValueError(f"too few; set val_tokens to {64}")\n')
    assert texts(path) == [(2, "too few; set val_tokens to {}")]
    assert "val_tokens" in endings(KEYS["megagpt"])
    assert "seed" not in endings(KEYS["megagpt"])


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("data.val_tokens=64", "megagpt.data.val_tokens"),
        ("val_tokens=64", "megagpt.data.val_tokens"),
        ("lr=1e-3", "optimizer.params.lr"),
        ("optimizer.lr=1e-3", "optimizer.params.lr"),
        ("megagpt.optimizer.params.lr=1e-3", "optimizer.params.lr"),
        ("megagpt.augmnt.fim.rate=0.5", "megagpt.augment.fim.rate"),
        ("megagpt.train_batch_size=8", "train_batch_size"),
        ("megagpt.model.dropout=0.1", "megagpt.regularization.dropout"),
        ("megagpt.seq_len=64", "megagpt.data.seq_len' or 'megagpt.model.seq_len"),
        ("max_step=3", "megagpt.schedule.max_steps"),
        ('model={"n_layer": 2, "n_head": 2}', "megagpt.model"),
        ("stage=2", "zero_optimization.stage"),
        ("batch_size=8", "train_batch_size"),
    ],
)
def test_a_key_without_its_section_or_under_another_is_named_in_full(typed, meant):
    with pytest.raises(UserError, match=re.escape(f"did you mean '{meant}'?")):
        parse_run(GOOD, [typed])


def test_a_message_that_quotes_a_long_value_is_short():
    for override in (
        f"megagpt.out_dirs={'x' * 10**6}",
        f"{'k' * 10**6}=1",
        f"megagpt.sample.prompts={'x' * 10**6}",
        "x" * 10**6,
    ):
        with pytest.raises(UserError) as caught:
            parse_run(GOOD, [override])
        assert len(str(caught.value)) < 1500
