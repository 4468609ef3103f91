"""Write the page of files and formats: what other pages say of folders, and the columns and keys from the code."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import BaseModel

from data_tools.stages.shuffle import PROVENANCE_COLUMNS
from docs_site.markdown import code, page, plain
from docs_site.run_file_page import type_in_words
from megagpt.data.manifest import Manifest
from megagpt.data.shard_format import INDEX_SCHEMA, ShardHeader, document_schema
from megagpt.errors import UserError

ROOT = Path(__file__).parents[1]
# The page stands in docs/, as two of these do, so that their links hold.
SECTIONS = {
    "The folder of a run": ("README.md", "What a run folder contains"),
    "The folder of a dataset": ("docs/data.md", "What a dataset folder contains"),
    "What is where, and when it counts": ("docs/architecture.md", "On disk"),
}


def files_page() -> str:
    """Return the page."""
    parts = ["Every file that a build or a run leaves, and what is in it."]
    for title, (source, heading) in SECTIONS.items():
        parts += [f"## {title}", _section(ROOT / source, heading)]
    rows = "A row is a document, or one part of a long one. With a vocabulary above 65,536 the ids are uint32."
    parts += ["## Columns of a shard", rows, _columns(SHARD)]
    parts += ["The metadata of a shard's schema has one key, `megagpt`, with this JSON:", *_keys(ShardHeader)]
    parts += ["## Columns of index.arrow", "A row is one record batch of a shard.", _columns(INDEX_SCHEMA)]
    parts += ["## Columns of provenance", "A row for each row of the shard of the same name.", _columns(PROVENANCE)]
    parts += ["## Keys of a dataset's manifest.json", *_keys(Manifest)]
    return page("Files and formats", parts)


SHARD = document_schema("uint16")
PROVENANCE = pa.schema(PROVENANCE_COLUMNS)


def _section(path: Path, heading: str) -> str:
    """Return what stands below a heading of the second level."""
    _, found, rest = path.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    if not found:
        raise UserError(
            f"{path} has no section {heading!r}; write its new name into SECTIONS of docs_site/files_page.py"
        )
    return rest.partition("\n## ")[0].strip()


def _columns(schema: pa.Schema) -> str:
    return _table({field.name: code(str(field.type)) for field in schema})


def _keys(model: type[BaseModel]) -> Iterator[str]:
    """Yield a table of a model's keys, then one for each model in it, by the key that holds it."""
    schema = model.model_json_schema()
    yield _table({name: plain(type_in_words(facts)) for name, facts in schema["properties"].items()})
    for name, inner in schema.get("$defs", {}).items():
        yield f"`{name}`:"
        yield _table({key: plain(type_in_words(facts)) for key, facts in inner["properties"].items()})


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| name | type |", "|---|---|", *(f"| {code(name)} | {kind} |" for name, kind in rows.items())])
