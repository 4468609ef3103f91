"""The `compare-tokenizers` command: compare given models, and models trained on one sample, on the same text.

Bytes per token and tokens per word measure how short a tokenizer makes a text. Whether that helps a model is measured
by the bits per byte of a small model, trained on the same number of tokens of each tokenizer. The end-of-document
token is not counted. Bytes that a tokenizer loses count as LOST_BITS each, what a coder that knows nothing spends on
them: else a tokenizer would win that reads all text as one unknown token.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from data_tools.build import finish
from data_tools.config import BuildConfig, SourceConfig
from data_tools.executor.progress import watched
from data_tools.executor.tasks import Tasks
from data_tools.executor.workers import start_workers
from data_tools.readers.document_pieces import PIECE_CHARACTERS
from data_tools.stages.extract import find_units, refuse_unreadable
from data_tools.stages.pipeline import Stages, find_tokenizer, plan_splits, read_and_compare, tokenize_and_shuffle
from data_tools.stages.select import keyed_hash, select, selected_texts
from megagpt.distributed.rank_variables import without_launcher
from megagpt.errors import UserError
from megagpt.tokenizer.tokenizer import Tokenizer

Kind = Literal["unigram", "bpe", "char"]
KINDS: tuple[Kind, ...] = get_args(Kind)
UNUSED_OPTIONS = {  # options of `build` without effect here -> what to give instead
    "tokenizer": "--tokenizer",
    "tokenizer_type": "--types",
    "subword": None,
}
MEASURED_BYTES = 32_000_000  # of each source: from a larger one, documents are drawn by a keyed hash
LOST_BITS = 8
VAL_BYTES = 1_000_000  # of the validation split: the same text for every tokenizer
DEBUG_RUN: dict[str, Any] = {  # takes seconds on a CPU
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
}
DEBUG_MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 64, "seq_len": 64}
STEP_TOKENS = DEBUG_RUN["train_batch_size"] * DEBUG_MODEL["seq_len"]


@dataclass(frozen=True)
class Counts:
    """Token and byte counts of one tokenizer on some text."""

    bytes: int
    words: int  # separated by white space
    tokens: int
    fallback: int  # tokens of single bytes, for characters without a piece, and unknown tokens
    lost: int  # bytes that the tokens do not decode to
    seconds: float  # process time of encoding

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def ratios(self) -> dict[str, float | None]:
        return {
            "bytes_per_token": _ratio(self.bytes, self.tokens),
            "tokens_per_word": _ratio(self.tokens, self.words),
            "fallback_share": _ratio(self.fallback, self.tokens),
            "lost_share": _ratio(self.lost, self.bytes),
            "mb_per_second": _ratio(self.bytes / 1e6, self.seconds),
        }


NOTHING = Counts(0, 0, 0, 0, 0, 0.0)


def compare_tokenizers(
    inputs: Sequence[str],
    config: BuildConfig,
    *,
    models: Sequence[Path],
    kinds: Sequence[str],
    steps: int,
    val: Sequence[str] = (),
    test: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return a row of JSON types for each tokenizer: its ratios on all text and per source, and its bits per byte.

    The best comes first; without bits per byte, those that lose no text.

    `models` are given, `kinds` are trained; `steps` are those of the small model, 0 for none. Raises UserError.
    """
    _check(config, kinds, steps)
    candidates: list[tuple[str, Tokenizer | None, BuildConfig]] = [
        (str(path), _load(path), config.model_copy(update={"tokenizer": path})) for path in models
    ]
    candidates += [(kind, None, config.model_copy(update={"tokenizer_type": kind})) for kind in dict.fromkeys(kinds)]
    sources = config.with_inputs(list(inputs), val=val, test=test)
    with watched("looking at the first record of each file"):
        units = find_units(sources, strict=config.strict)
    splits = plan_splits(units, sources, config)
    if not splits.trains(len(units)):
        raise UserError("all is held out, which leaves nothing to train on; give --input, or smaller fractions")
    if steps and splits.shares["val"] == 0 and splits.given[0] == splits.given[1]:
        raise UserError("val_fraction=0 leaves no text to measure bits per byte on; set a larger one, or --steps 0")
    rows = []
    with (
        TemporaryDirectory(prefix="compare-tokenizers.") as folder,
        start_workers(config.workers, None, Path(folder), total_bytes=sum(unit.size for unit in units)) as run_all,
    ):
        tasks = Tasks(Path(folder), run_all)
        common = read_and_compare(units, sources, splits, config, tasks)
        refuse_unreadable(common.extracted)
        for number, (name, given, options) in enumerate(tqdm(candidates, desc="tokenizers", disable=None, leave=False)):
            stages = replace(common, variants=[], shards=[])
            # trained on the same sample each time, because drawing it is a task, which is not run twice
            find_tokenizer(stages, options, given, tasks)
            tokenizer = Tokenizer.load(stages.model)
            row: dict[str, Any] = {"tokenizer": name, "type": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
            with watched(f"measuring {name}"):
                row |= _measure_all(stages, sources, tokenizer, tasks.folder, config.seed)
            if steps:
                tokenize_and_shuffle(stages, sources, options, tasks)
                run = Path(folder, f"run-{number}")
                with watched(f"training a small model with {name}"):
                    known = _bits_per_byte(name, run, stages, sources, options, steps)
                row["bits_per_byte"] = known + LOST_BITS * (row["lost_share"] or 0.0)
            rows.append(row | {"sample_sha256": stages.sample_sha256})
    return sorted(rows, key=lambda row: (row.get("bits_per_byte", 0.0), bool(row["lost_share"])))


def table_of(rows: Sequence[dict[str, Any]], steps: int) -> str:
    """Return the rows of compare_tokenizers as a table for the terminal."""
    head = ["tokenizer", "type", "vocabulary", "bytes/token", "tokens/word", "fallback", "lost", "MB/s", "bits/byte"]
    cells = [
        [
            row["tokenizer"],
            row["type"],
            f"{row['vocab_size']:,}",
            _shown(row["bytes_per_token"], ".3f"),
            _shown(row["tokens_per_word"], ".3f"),
            _shown(row["fallback_share"], ".3%"),
            _shown(row["lost_share"], ".3%"),
            _shown(row["mb_per_second"], ".1f"),
            _shown(row.get("bits_per_byte"), ".4f"),
        ]
        for row in rows
    ]
    lines = _aligned([head, *cells], names=2)
    if steps:
        lines.append(
            f"bits/byte: on held-out text, of a model of {DEBUG_MODEL['n_layer']} layers of width "
            f"{DEBUG_MODEL['n_embd']} after {steps} steps of {STEP_TOKENS} tokens"
        )
    if any(row["lost_share"] for row in rows):
        lost = "lost: share of the text's bytes that the tokens do not decode to"
        lines.append(f"{lost}; bits/byte has {LOST_BITS} bits for each" if steps else lost)
    if len(rows[0]["sources"]) > 1:
        per_source = [
            [name, *(_shown(row["sources"][name]["tokens_per_word"], ".3f") for row in rows)]
            for name in rows[0]["sources"]
        ]
        lines += ["", *_aligned([["tokens/word", *(row["tokenizer"] for row in rows)], *per_source], names=1)]
    return "\n".join(lines)


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Counts:
    """Encode the texts and count."""
    is_fallback = np.ones(tokenizer.vocab_size, bool)
    is_fallback[[token for token, _ in tokenizer.pieces().values()]] = False
    total = NOTHING
    for batch in _batches(texts):
        start = time.process_time()
        encoded = tokenizer.encode_batch(batch)
        seconds = time.process_time() - start
        ids = np.concatenate(encoded)
        n_bytes, n_words = sum(len(text.encode()) for text in batch), sum(len(text.split()) for text in batch)
        n_lost = 0 if tokenizer.is_lossless else sum(tokenizer.lost(text).total() for text in batch)
        total += Counts(n_bytes, n_words, len(ids), int(is_fallback[ids].sum()), n_lost, seconds)
    return total


def _check(config: BuildConfig, kinds: Sequence[str], steps: int) -> None:
    for option in sorted(UNUSED_OPTIONS.keys() & config.model_fields_set):
        way_out = f"give {UNUSED_OPTIONS[option]}" if UNUSED_OPTIONS[option] else "remove it"
        raise UserError(f"{option} has no effect on compare-tokenizers; {way_out}")
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--types {kind} is not a type of tokenizer; give some of {','.join(KINDS)}")


def _load(path: Path) -> Tokenizer:
    if "=" in path.name and not path.exists():
        raise UserError(f"the tokenizer {path} does not exist; key=value options go before --tokenizer")
    return Tokenizer.load(path)


def _measure_all(
    stages: Stages, sources: Sequence[SourceConfig], tokenizer: Tokenizer, scratch: Path, seed: int
) -> dict[str, Any]:
    by_source = {
        source.name: measure(tokenizer, _drawn_texts(stages, number, scratch, seed))
        for number, source in enumerate(sources)
    }
    total = sum(by_source.values(), NOTHING)
    return total.ratios() | {"sources": {name: counts.ratios() for name, counts in by_source.items()}}


def _drawn_texts(stages: Stages, source: int, scratch: Path, seed: int) -> Iterator[str]:
    """Yield pieces of a source's documents, of all splits, limited to about MEASURED_BYTES."""
    mine = [
        (unit, done) for unit, done in zip(stages.unit_inputs, stages.extracted, strict=True) if unit.source == source
    ]
    size = sum(done.result["kept"][1] for _, done in mine)
    limit = int(min(1.0, MEASURED_BYTES / max(size, 1)) * 2**64)
    for unit, _ in mine:
        whole = unit.model_copy(update={"parts": None})  # no document is cut to be measured
        selection = select(whole, scratch, stages.clusters, stages.splits)
        # not the plain hash, by which documents are split: the drawn ones would all be of one split
        drawn = [keyed_hash(document.doc + b"measured", seed) < limit for document in selection.documents]
        yield from (text for row, text in selected_texts(scratch / unit.texts, selection) if drawn[row])


def _bits_per_byte(
    name: str, run: Path, stages: Stages, sources: Sequence[SourceConfig], config: BuildConfig, steps: int
) -> float:
    """Train the small model on the dataset that the stages wrote, in a process of its own, which imports torch."""
    data = run / "data"
    data.mkdir(parents=True)
    val = finish(data, stages, sources, config)["splits"]["val"]
    if not val["documents"]:
        raise UserError("the validation split is empty; give more documents, a larger val_fraction, or --steps 0")
    val_tokens = round(val["tokens"] * min(1.0, VAL_BYTES / val["bytes"]))
    megagpt = {
        "out_dir": str(run / "out"),
        "seed": config.seed,
        "model": DEBUG_MODEL,
        "data": {"train": [{"path": str(data)}], "val": str(data), "val_tokens": val_tokens, "seed": config.seed},
        "schedule": {"max_steps": steps, "warmup_steps": steps // 10},
        "every": {"log": steps, "eval": 0, "save": 0},
    }
    file = run / "run.json"
    file.write_text(json.dumps(DEBUG_RUN | {"megagpt": megagpt}))
    command = [sys.executable, "-m", "megagpt.train", "--deepspeed_config", str(file)]
    done = subprocess.run(
        command, env=without_launcher(os.environ), capture_output=True, text=True, errors="replace", check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("error: ")
        raise UserError(f"the small model could not be trained with {name}: {why}; give --steps 0 to skip this")
    measured = [json.loads(line) for line in (run / "out" / "metrics.jsonl").read_text().splitlines()]
    return float([row["val/bits_per_byte"] for row in measured if "val/bits_per_byte" in row][-1])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts by a million characters, because each encoder call has a fixed cost."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= PIECE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _ratio(number: float, by: float) -> float | None:
    return number / by if by else None


def _shown(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


def _aligned(rows: Sequence[Sequence[str]], names: int) -> list[str]:
    """Return the lines of a table, with the first `names` columns aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
