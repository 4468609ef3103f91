"""A SentencePiece model from a seeded sample of the input; its decode(encode(text)) == text for any text."""

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import sentencepiece

from data_tools.config import ReadConfig, TokenizerConfig
from data_tools.read import Skipped, Unit, find_files, plan_units, read_unit, size_of
from data_tools.workers import RunAll, start_workers
from megagpt.errors import UserError
from megagpt.files import write_atomically
from megagpt.tokenizer import META_SPACE, Tokenizer

CHUNK = 2**14  # characters: long documents are sampled in parts, so that one book cannot fill the sample
LINE = 1000  # characters: SentencePiece drops lines of more than 4192 bytes, so longer ones are cut
UNUSABLE = str.maketrans("", "", "\0\u2585")  # it drops every line that holds one of these; encoding knows them
THREADS = 16  # a constant, as the model's bytes depend on it


@dataclass(frozen=True)
class Trained:
    tokenizer: Tokenizer
    sample_sha256: str | None  # None: it was given, not trained


def train_tokenizer(
    inputs: Sequence[Path], out: Path, config: TokenizerConfig, scheduler: str | None = None
) -> Trained:
    """The `train-tokenizer` command."""
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    units = plan_units(find_files(inputs, config))
    total_bytes = sum(map(size_of, units))
    with (
        TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch,
        start_workers(config.workers, scheduler, Path(scratch), total_bytes=total_bytes) as run_all,
    ):
        trained = train_on(units, Path(scratch), config, run_all)
    write_atomically(out, trained.tokenizer.model_bytes)
    return trained


def train_on(units: Sequence[Unit], scratch: Path, config: TokenizerConfig, run_all: RunAll) -> Trained:
    sample = draw_sample(units, scratch, config, run_all)
    digest = hashlib.sha256("\n".join(sample).encode()).hexdigest()
    tokenizer = Tokenizer.from_bytes(train_sample(sample, config))
    if tokenizer.decode(tokenizer.encode(" ")) != " ":  # as bytes, a space would come back as U+2581
        raise UserError(f"vocab_size={config.vocab_size} leaves no piece for the space; set a larger one")
    return Trained(tokenizer, digest)


def draw_sample(units: Sequence[Unit], scratch: Path, config: TokenizerConfig, run_all: RunAll) -> list[str]:
    """The chunks with the smallest keyed hashes, up to sample_bytes: a uniform draw that no order changes."""
    share = 2 * config.sample_bytes / max(1, sum(map(size_of, units)))  # twice, as chunks vary in size
    files = [scratch / f"sample-{number:06d}.jsonl" for number in range(len(units))]
    tasks = [(unit, file, config, share) for unit, file in zip(units, files, strict=True)]
    skipped = run_all(_sample_unit, tasks, "sampling")
    drawn = sorted((key, text) for file in files for key, text in _read_chunks(file))
    sample, room = [], config.sample_bytes
    for _, text in drawn:
        if room <= 0:
            break
        sample.append(text)
        room -= len(text.encode())
    if not sample:
        why = next((f"; skipped: {reason}" for reason in skipped if reason), "")
        raise UserError(f"there is no text to train a tokenizer on{why}; give more input")
    return sample


def _sample_unit(unit: Unit, out: Path, config: ReadConfig, share: float) -> str | None:
    """Write the unit's share of the sample; returns the first thing that could not be read."""
    skipped = None
    limit = int(min(1.0, share) * 2**64)
    with out.open("w", encoding="utf-8") as file:
        for document in read_unit(unit, config):
            if isinstance(document, Skipped):
                skipped = skipped or f"{document.reason} ({document.where()})"
                continue
            for at in range(0, len(document.text), CHUNK):
                key = keyed_hash(f"{document.position}:{at}".encode(), config.seed)
                if key < limit:
                    file.write(json.dumps([key, document.text[at : at + CHUNK]]) + "\n")
    return skipped


def _read_chunks(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            key, text = json.loads(line)
            yield key, text


def keyed_hash(data: bytes, seed: int) -> int:
    """64 bits that look random, and are the same everywhere."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest(), "big")


def train_sample(sample: Sequence[str], config: TokenizerConfig) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(sample),
            model_writer=model,
            model_type=config.tokenizer_type,
            vocab_size=config.vocab_size,
            # nothing is lost: no normalization, spaces as they are, bytes for what has no piece
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            required_chars=META_SPACE,
            character_coverage=1.0 if config.tokenizer_type == "char" else 0.9995,
            user_defined_symbols=["\n", "\t"],  # the trainer sees single lines and would never learn them
            allow_whitespace_only_pieces=True,  # indentation: 1.6 times fewer tokens for source code
            num_threads=THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(str(error), config) from error
    return model.getvalue()


def _lines(sample: Sequence[str]) -> Iterator[str]:
    for text in sample:
        for line in text.translate(UNUSABLE).split("\n"):
            for at in range(0, len(line), LINE):
                yield line[at : at + LINE]


def _explain(message: str, config: TokenizerConfig) -> UserError:
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return UserError(
            f"vocab_size={config.vocab_size} is more pieces than this text supports; "
            f"set vocab_size={most[1]} or less, or give more text or a larger sample_bytes"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size={config.vocab_size} is too small for the 256 bytes, the special pieces and the "
            f"characters of this text; set vocab_size={least[1]} or more"
        )
    if re.search(r"empty\(\)|\(sum\) > \(0\)", message):
        return UserError("there is no text to train a tokenizer on; give more input")
    return UserError(f"SentencePiece could not train a tokenizer: {message}")
