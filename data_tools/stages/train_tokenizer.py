"""Train a SentencePiece model on a seeded sample of the input. decode(encode(text)) == text for any text."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import sentencepiece

from data_tools.config import MOST_PIECES, TRAINING, TokenizerConfig
from data_tools.executor.progress import warn, watched
from data_tools.executor.tasks import Done, Tasks, file_of
from data_tools.executor.workers import start_workers
from data_tools.formatting import format_bytes
from data_tools.stages.extract import (
    describe_units,
    extract_all,
    find_units,
    given_units,
    refuse_unreadable,
    text_bytes,
    why_nothing_is_left,
)
from data_tools.stages.select import SplitConfig, UnitInput, keyed_hash, select
from data_tools.stages.what_is_left import Taken, tell_what_copies_took
from megagpt.atomic_files import write_atomically, written
from megagpt.errors import UserError
from megagpt.tokenizer.sentencepiece_model import META_SPACE
from megagpt.tokenizer.tokenizer import Tokenizer

CHUNK = 2**14  # characters: long documents are sampled in chunks, so that one book cannot fill the sample
LINE = 1000  # characters: SentencePiece drops lines of more than 4192 bytes, so longer ones are cut
# SentencePiece drops every line that contains one of these; the trained model encodes them as bytes
UNUSABLE = str.maketrans("", "", "\0\u2585")
SAMPLE, MODEL = ".jsonl", ".model"
THREADS = 16  # a constant, because the model's bytes depend on it
N_SPECIAL = 5 + 256  # <unk>, <s>, </s>, newline, tab, and the bytes
# Unigram training takes time with the number of different words, and a long one costs as many as it has letters. Where
# few letters make up most of the text, as in DNA, most strings of letters are candidates for a piece, and the time
# grows faster than the text: 8 MB take a quarter of an hour.
LONG_WORD = 32  # characters: more than most words of source code have, fewer than a read of DNA or a line of FASTA
UNSPACED = re.compile(rf"\S{{{LONG_WORD},}}")
FEW_LETTERS = 128  # make up 99 % of the long words: fewer than Chinese or Japanese have
MOST_UNSPACED = 2**20  # characters in long words that are trained on
MUCH_UNSPACED = 0.25  # of all characters: twice what source code has
MOST_OF_MANY_LETTERS = 2**22  # beyond which there is a warning: more than the default sample of Chinese has
WITH_BPE = "tokenizer_type=bpe (--types bpe for compare-tokenizers)"
TOO_SMALL = r"smaller than required_chars|insert_id\(|\(vocab_size\) >= \(0\)"  # in SentencePiece's errors


def train_tokenizer(
    inputs: Sequence[str], out: Path, config: TokenizerConfig, scheduler: str | None = None
) -> Tokenizer:
    """Run the `train-tokenizer` command: write the model to `out`. Raises UserError."""
    if not out.parent.is_dir() or out.is_dir():
        why = "is a folder; name a file" if out.is_dir() else "is in a folder that does not exist; make it first"
        raise UserError(f"--out {out} {why}")
    sources = config.with_inputs(inputs)
    with watched("looking at the first record of each file"):
        units = find_units(sources, strict=config.strict)
    with (
        TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch,
        start_workers(
            config.workers, scheduler, Path(scratch), total_bytes=sum(unit.size for unit in units)
        ) as run_all,
    ):
        tasks = Tasks(Path(scratch).absolute(), run_all)
        extracted = extract_all(units, sources, config.strict, tasks)
        refuse_unreadable(extracted)
        unit_inputs = describe_units(units, sources, extracted, [None] * len(extracted), tasks.folder)
        given = given_units(units, sources)  # what is held out, as by splits=by-name, trains no tokenizer
        whole = SplitConfig(val_fraction=0.0, test_fraction=0.0, duplicates="remove", seed=config.seed, given=given)
        trained = train_on(extracted, unit_inputs, None, whole, config, tasks)
        write_atomically(out, file_of(trained.prefix, MODEL).read_bytes())
    return Tokenizer.load(out)


def train_on(
    extracted: Sequence[Done],
    units: Sequence[UnitInput],
    clusters: Path | None,
    splits: SplitConfig,
    config: TokenizerConfig,
    tasks: Tasks,
) -> Done:
    """Train on a sample of the training split's documents; the result has the hash of the sample."""
    sizes = text_bytes(extracted)
    if not sum(sizes):
        raise UserError(f"there is no text to train a tokenizer on{why_nothing_is_left(extracted)}; give more input")
    # twice what is needed, because chunks vary in size, and enough that even a small sample is never empty
    share = max(2 * config.sample_bytes, 64 * CHUNK) / sum(sizes)
    jobs = [(unit, clusters, splits, min(1.0, share)) for unit in units]
    samples = tasks.run(draw_sample, jobs, "sampling", sizes)
    tell_what_copies_took(samples, extracted)
    drawn = [done.prefix for done in samples]
    options = config.model_dump(include=TRAINING)
    if config.tokenizer_type != "unigram":
        return tasks.run_one(train, drawn, options, config.seed, what="training a tokenizer")
    found = tasks.run_one(find_unspaced, drawn, config.sample_bytes, what="sampling").result
    return tasks.run_one(train, drawn, *_affordable(config, options, found), what="training a tokenizer")


def _affordable(config: TokenizerConfig, options: dict[str, Any], found: dict[str, int]) -> tuple[Any, ...]:
    """Return the arguments of `train` for a unigram model, or for what takes its place where that would take long."""
    unspaced, has_few_letters = found["unspaced"], found["letters"] <= FEW_LETTERS
    most = MOST_UNSPACED if has_few_letters else MOST_OF_MANY_LETTERS
    if unspaced <= max(most, MUCH_UNSPACED * found["characters"]):
        return options, config.seed
    what = (
        f"{unspaced:,} of the {found['characters']:,} characters to train the tokenizer on are in different words of "
        f"{LONG_WORD} or more, of {found['letters']:,} letters (DNA, base64, minified code, scripts without spaces); "
    )
    if has_few_letters and "tokenizer_type" not in config.model_fields_set:
        warn(f"{what}unigram would take minutes or hours, so tokenizer_type is bpe; set tokenizer_type to choose")
        return options | {"tokenizer_type": "bpe"}, config.seed
    if has_few_letters and "sample_bytes" not in config.model_fields_set:
        warn(
            f"{what}unigram would take minutes or hours, so it takes the first {MOST_UNSPACED:,} of them; "
            f"{WITH_BPE} or sample_bytes={config.sample_bytes} takes all"
        )
        return options, config.seed, MOST_UNSPACED
    warn(f"{what}unigram may take minutes or hours; {WITH_BPE} takes seconds")
    return options, config.seed


def draw_sample(
    prefix: Path, unit: UnitInput, clusters: Path | None, splits: SplitConfig, share: float
) -> dict[str, Any]:
    """Run as a task: draw a unit's chunks whose keyed hash is below `share`, whatever their order."""
    scratch = prefix.parents[1]
    selection = select(unit, scratch, clusters, splits)
    limit = int(share * 2**64)
    with written(file_of(prefix, SAMPLE)) as temporary, temporary.open("w", encoding="utf-8") as file:
        for piece, (row, text) in enumerate(selection.pieces(scratch / unit.texts)):
            if row in selection.dropped or selection.splits[row] != "train":
                continue
            for at in range(0, len(text), CHUNK):
                key = keyed_hash(selection.documents[row].doc + f"{piece}:{at}".encode(), splits.seed)
                if key < limit:
                    file.write(json.dumps([key, text[at : at + CHUNK]]) + "\n")
    dropped: Taken = {}
    for row, reason in selection.dropped.items():
        own = dropped.setdefault(reason, [0, 0])
        own[0], own[1] = own[0] + 1, own[1] + selection.documents[row].bytes
    return {"dropped": dropped}


def find_unspaced(prefix: Path, samples: Sequence[Path], sample_bytes: int) -> dict[str, Any]:
    """Run as a task: count a sample's characters, those in different long words, and the letters of 99 % of those."""
    sample, _ = _smallest_keys(samples, sample_bytes)
    long_words = {word for text in sample for word in UNSPACED.findall(text)}
    counts = Counter("".join(long_words))
    unspaced, letters, room = counts.total(), 0, 0.99 * counts.total()
    for _, n in counts.most_common():
        if room <= 0:
            break
        letters, room = letters + 1, room - n
    return {"characters": sum(map(len, sample)), "unspaced": unspaced, "letters": letters}


def train(
    prefix: Path, samples: Sequence[Path], options: dict[str, Any], seed: int, most_unspaced: int | None = None
) -> dict[str, Any]:
    """Run as a task: train a model on options["sample_bytes"] bytes of drawn chunks, those with the smallest keys.

    Of long words, at most `most_unspaced` characters are trained on: the rest of them is left out.
    """
    config = TokenizerConfig(**options, seed=seed)
    sample, is_all = _smallest_keys(samples, config.sample_bytes)
    if not sample:
        raise UserError("there is no text to train a tokenizer on: the training split is empty; give more input")
    if most_unspaced is not None:
        sample = _without_long_words(sample, most_unspaced)
    model_bytes = train_sample(sample, config, is_all=is_all)
    tokenizer = Tokenizer(model_bytes)
    with written(file_of(prefix, MODEL)) as temporary:
        temporary.write_bytes(model_bytes)
    return {"sample_sha256": hashlib.sha256("\n".join(sample).encode()).hexdigest(), "sha256": tokenizer.sha256}


def _smallest_keys(samples: Sequence[Path], n_bytes: int) -> tuple[list[str], bool]:
    """Return the drawn chunks with the smallest keys, n_bytes of them, and whether these are all."""
    drawn = sorted((key, text) for file in samples for key, text in _read_chunks(file_of(file, SAMPLE)))
    sample = []
    for _, text in drawn:
        if n_bytes <= 0:
            break
        sample.append(text)
        n_bytes -= len(text.encode())
    return sample, len(sample) == len(drawn)


def _without_long_words(sample: Sequence[str], most: int) -> list[str]:
    """Return the chunks without their long words, once those before hold `most` characters."""
    kept = []
    for text in sample:
        long_words = UNSPACED.findall(text)
        most -= sum(map(len, long_words))
        kept.append(text if most >= 0 else UNSPACED.sub("", text))
    return kept


def _read_chunks(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            key, text = json.loads(line)
            yield key, text


def train_sample(sample: Sequence[str], config: TokenizerConfig, *, is_all: bool = True) -> bytes:
    """Return the bytes of a model trained on these texts. Raises UserError, with a vocab_size that works.

    `is_all`: there is no more text, so that a larger sample_bytes would not help.
    """
    if not any(line.strip("\t") for line in _lines(sample)):
        raise UserError("there is no text to train a tokenizer on; give more input")
    try:
        model_bytes = _train(sample, config.tokenizer_type, config.vocab_size)
    except RuntimeError as error:
        raise _explain(str(error), sample, config, is_all) from error
    # without a piece of its own, the space is encoded as the bytes of U+2581, and decoded to that character
    if not Tokenizer(model_bytes).round_trips(" "):
        raise _too_small(sample, config)
    return model_bytes


def _train(sample: Sequence[str], kind: str, vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(sample),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        # lossless: no normalization, spaces as they are, bytes for characters without a piece
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        required_chars=META_SPACE,
        character_coverage=1.0 if kind == "char" else 0.9995,
        user_defined_symbols=["\n", "\t"],  # the trainer is fed single lines and would never learn them
        allow_whitespace_only_pieces=True,  # indentation: 1.6 times fewer tokens for source code
        num_threads=THREADS,
        minloglevel=2,
    )
    return model.getvalue()


def _lines(sample: Sequence[str]) -> Iterator[str]:
    """Yield the sample as lines that SentencePiece does not drop."""
    for text in sample:
        for line in text.translate(UNUSABLE).split("\n"):
            for at in range(0, len(line), LINE):
                yield line[at : at + LINE]


def _explain(message: str, sample: Sequence[str], config: TokenizerConfig, is_all: bool) -> UserError:
    """Return SentencePiece's error in terms of our options."""
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        size = format_bytes(sum(len(text.encode()) for text in sample))
        what = "all that there is to train on" if is_all else "the sample to train on"
        return UserError(
            f"vocab_size={config.vocab_size} is more pieces than {size} of text give, {what}; "
            f"set vocab_size={most[1]}, the most for tokenizer_type={config.tokenizer_type} here, or give "
            + ("more text" if is_all else "a larger sample_bytes")
        )
    if re.search(TOO_SMALL, message):
        return _too_small(sample, config)
    return UserError(f"SentencePiece could not train a tokenizer: {message}")


def _too_small(sample: Sequence[str], config: TokenizerConfig) -> UserError:
    return UserError(
        f"vocab_size={config.vocab_size} is too small for the 256 bytes, the special pieces and "
        + ("the space" if config.tokenizer_type == "char" else "the characters of this text")
        + f"; set vocab_size={_least_vocab_size(sample, config.tokenizer_type)}, the least that this text takes"
    )


def _least_vocab_size(sample: Sequence[str], kind: str) -> int:
    if kind == "char":  # its pieces are ordered by frequency: all up to the space are needed
        space = Tokenizer(_train(sample, kind, MOST_PIECES)).piece_id(META_SPACE)
        assert space is not None, "it is one of required_chars"
        return space + 1
    try:
        _train(sample, kind, N_SPECIAL)
    except RuntimeError as error:
        if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            return int(least[1])
        raise
    raise AssertionError(f"{N_SPECIAL} pieces leave none for the space")
