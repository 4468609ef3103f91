"""Describe how a dataset was built, for its report: options, versions and the command, without the secrets of URLs."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from data_tools.config import BuildConfig, SourceConfig
from megagpt import __version__
from megagpt.config.parsing import leaves

LIBRARIES = ("pyarrow", "sentencepiece")
CREDENTIALS = re.compile(r"(\w+://)[^/@\s]*@")
QUERY = re.compile(r"(\w+://[^?\s'\"]*)\?[^\s'\"]*")


def settings_of(config: BuildConfig, sources: Sequence[SourceConfig], command: str) -> dict[str, Any]:
    """Return when, with what and with which options a dataset is built; the options as they are typed."""
    whole = {key: value for key, value in leaves(config.pipeline(sources)).items() if key != "sources"}
    if config.tokenizer:
        whole = {"tokenizer": str(config.tokenizer)} | whole
    return {
        "at": datetime.now(UTC).isoformat(sep=" ", timespec="seconds"),
        "versions": ", ".join([f"megagpt {__version__}", *(f"{name} {version(name)}" for name in LIBRARIES)]),
        "command": without_secrets(command),
        "options": _that_matter(whole),
    }


def options_of(source: SourceConfig) -> dict[str, str]:
    """Return the options with which a source is read, as they are typed."""
    return _that_matter(leaves(source.model_dump(mode="json", exclude={"name", "paths"})))


# An option that has an effect with another alone -> that one, and the values with which it has none.
NEEDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    **dict.fromkeys(("dedup.bands", "dedup.rows", "dedup.ngram"), ("dedup.method", ("none", "exact"))),
    **dict.fromkeys(("decontamination.ngram", "decontamination.min_hits"), ("decontamination.files", ([],))),
    "rules.clean.email_replacement": ("rules.clean.emails", (False,)),
    "rules.clean.ip_replacement": ("rules.clean.public_ips", (False,)),
}


def _that_matter(options: dict[str, Any]) -> dict[str, str]:
    """Return the options as they are typed, without those that are off or have no effect."""
    shown = {}
    for key, value in options.items():
        other, idle = NEEDS.get(key, (key, ()))
        is_off = value in (None, "", []) or (value is False and key.startswith("rules.clean."))
        if not is_off and options[other] not in idle:
            shown[key] = _as_typed(value)
    return shown


def _as_typed(value: Any) -> str:
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return without_secrets(",".join(value))
    return json.dumps(value)


def without_secrets(text: str) -> str:
    """Return a text without the credentials and the queries of the URLs in it: a report is shown to others."""
    return CREDENTIALS.sub(r"\1", QUERY.sub(r"\1", text))
