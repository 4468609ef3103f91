"""manifest.json of a dataset: its contents and their hashes; written last, so that without it a build is unfinished."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from megagpt.atomic_files import leads_out, write_atomically
from megagpt.config.parsing import Strict
from megagpt.errors import UserError
from megagpt.terminal import builder_command, typed
from megagpt.user_paths import similar_path

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
FORMAT: Literal["megagpt-arrow"] = "megagpt-arrow"
VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
BUILD_DIR = ".build"  # temporary files of an unfinished build
NOT_IN_FINGERPRINT = {"created", "tool", "report_sha256", "other_files", "fingerprint", "sha256"}


class ShardInfo(Strict):
    path: str  # relative to the dataset's folder, with "/"
    bytes: int  # of the file
    documents: int
    tokens: int
    batches: int
    sha256: str


class Variant(Strict):
    """One tokenization of a split's documents; epochs of training take the variants in turn."""

    id: int
    kind: Literal["canonical", "unigram-sampling", "bpe-dropout"]
    tokens: int
    shards: tuple[ShardInfo, ...]


class SplitInfo(Strict):
    documents: int
    bytes: int  # of UTF-8 text: what bits per byte divides by
    variants: tuple[Variant, ...]

    @property
    def tokens(self) -> int:
        """The tokens of the canonical variant, end-of-document tokens included."""
        return self.variants[0].tokens


class TokenizerInfo(Strict):
    file: str
    sha256: str
    type: str
    vocab_size: int
    eod_id: int
    normalizer: str
    sample_sha256: str | None  # of the text it was trained on, if this build trained it


class SourceInfo(Strict):
    name: str
    files: int
    documents: int
    bytes: int


class Manifest(Strict):
    format: Literal["megagpt-arrow"] = FORMAT
    version: Literal[1] = VERSION
    build_id: str
    created: str
    tool: str
    tokenizer: TokenizerInfo
    dtype: Literal["uint16", "uint32"]
    splits: dict[Split, SplitInfo]
    index_sha256: str
    report_sha256: str
    other_files: dict[str, str]  # path -> sha256: provenance, rejected documents, the report's page
    sources: tuple[SourceInfo, ...]
    input_sha256: str
    pipeline: dict[str, Any]  # the build's configuration, every option resolved
    # documents of which parts are in several splits, as there were too few for the fractions
    cut_documents: int = Field(default=0, exclude_if=lambda number: number == 0)
    fingerprint: str = ""  # of everything that decides what training sees
    sha256: str = ""  # of this manifest without this key, as canonical JSON


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a finished dataset. Raises UserError if there is none, or it was edited or damaged."""
    file = path / MANIFEST
    build = f"{builder_command()} build --input"
    how = f"`{build} PATH --out {typed(path)}`"
    if not path.is_dir():
        raise UserError(f"there is no dataset folder {path}; {_near(path)}make it with {how}")
    if not file.is_file():
        unfinished = (path / BUILD_DIR).is_dir()
        if unfinished:
            raise UserError(f"{path} is an unfinished build: it has no {MANIFEST}; run again {how}")
        if any(path.iterdir()):  # which no build writes to: it may be the text
            how = f"`{build} {typed(path)} --out {typed(_next_to(path))}`"
        raise UserError(f"{path} is not a dataset: it has no {MANIFEST}; make one with {how}")
    try:
        content = file.read_bytes()
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error}); restore it or build the dataset again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{file} is not the manifest of a megagpt dataset; give another folder")
    if raw.get("version") != VERSION:
        raise UserError(f"{file} has format version {raw.get('version')}, and this megagpt reads {VERSION}")
    # Compare the bytes too: a key given twice, for one, would leave the parsed manifest and its hash as they were.
    if raw.get("sha256") != _digest(raw, without={"sha256"}) or content != _as_written(raw):
        raise UserError(f"{file} was edited or damaged: its sha256 is not its own; restore it or build again")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{file} is not a manifest that this megagpt can read: {error}") from error


def _next_to(path: Path) -> Path:
    """Name a folder for the dataset of the text in a folder."""
    return path / ".." / "dataset" if path.name in ("", "..") else path.with_name(f"{path.name}_dataset")


def _near(path: Path) -> str:
    """Name the dataset next to a path that there is none at, if its name is nearly the same."""
    near = similar_path(path, lambda other: (other / MANIFEST).is_file())
    return f"did you mean {near}? Else " if near else ""


def confined(folder: Path, relative: str) -> Path:
    """Return the path of a file that a manifest names. Raises UserError if it leads out of the folder."""
    if leads_out(folder, relative):
        raise UserError(f"{folder / MANIFEST} names {relative!r}, which leads out of its folder; do not use it")
    return folder / relative


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash and write the manifest, after all other files: it makes the dataset a finished one."""
    raw = manifest.model_dump(mode="json")
    raw["fingerprint"] = _digest(raw, without=NOT_IN_FINGERPRINT)
    raw["sha256"] = _digest(raw, without={"sha256"})
    write_atomically(folder / MANIFEST, _as_written(raw))
    return Manifest.model_validate(raw)


def _as_written(raw: dict[str, Any]) -> bytes:
    return json.dumps(raw, indent=1).encode() + b"\n"


def _digest(raw: dict[str, Any], *, without: set[str]) -> str:
    kept = {key: value for key, value in raw.items() if key not in without}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
