"""The other side of build.py: builders made of the same parts in other ways; started by it.

build_others.py convert MODEL MODEL.json            a SentencePiece unigram model for Hugging Face's tokenizers
build_others.py compare MODEL MODEL.json CORPUS     how many documents get other ids from it
build_others.py pool MODEL CORPUS OUT               a pool of two processes, one writer
build_others.py tokenizers MODEL.json CORPUS OUT    Hugging Face's tokenizers in one process
"""

import json
import multiprocessing
import struct
import sys
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece

BATCH = 1000  # documents for each call of Hugging Face's encode_batch
CHUNK = 32  # lines for each message to the pool, as Megatron-LM has it


def convert(model: Path, out: Path) -> None:
    import tokenizers

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, unk_id=sp.unk_id(), byte_fallback=True))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    controls = [sp.id_to_piece(i) for i in range(len(vocab)) if sp.is_control(i)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in controls])
    own = [piece for piece in ("\n", "\t") if sp.piece_to_id(piece) != sp.unk_id()]  # what data_tools keeps whole
    tokenizer.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in own])
    tokenizer.save(str(out))


def compare(model: Path, converted: Path, corpus: Path) -> None:
    import tokenizers

    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = tokenizers.Tokenizer.from_file(str(converted))
    documents = list(islice(texts(corpus), 2000))
    differ = [sp.encode(text) != tokenizer.encode(text, add_special_tokens=False).ids for text in documents]
    print(f"tokenizers gives other ids than SentencePiece for {sum(differ)} of the first {len(documents)} documents")


def texts(corpus: Path) -> Iterator[str]:
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


# --- Megatron-LM's structure ----------------------------------------------------------------------------------


@cache
def processor(model: str) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=model)


MODEL = ""  # of the workers, which are forked from this process


def encode(line: str) -> tuple[list[int], int]:
    """(ids, characters read): what preprocess_data.py's Encoder.encode hands back."""
    sp = processor(MODEL)
    ids = sp.encode(json.loads(line)["text"])
    return [*ids, sp.eos_id()], len(line)


def pool(model: Path, corpus: Path, out: Path) -> None:
    global MODEL
    MODEL = str(model)
    lengths: list[int] = []
    with (
        corpus.open(encoding="utf-8") as lines,
        out.open("wb") as binary,
        multiprocessing.get_context("fork").Pool(2) as workers,
    ):
        for ids, _ in workers.imap(encode, lines, CHUNK):
            binary.write(np.array(ids, np.uint16).tobytes())
            lengths.append(len(ids))
        workers.close()
        workers.join()  # so that their time is counted
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    out.with_suffix(".idx").write_bytes(np.array(lengths, np.int32).tobytes() + offsets.tobytes())


# --- Hugging Face's tokenizers --------------------------------------------------------------------------------


def hugging_face(converted: Path, corpus: Path, out: Path) -> None:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(converted))
    eod = tokenizer.token_to_id("</s>")
    documents = texts(corpus)
    with out.open("wb") as binary:
        while batch := list(islice(documents, BATCH)):
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                ids = [*encoding.ids, eod]
                binary.write(struct.pack(f"<{len(ids)}H", *ids))


COMMANDS = {"convert": convert, "compare": compare, "pool": pool, "tokenizers": hugging_face}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*map(Path, sys.argv[2:]))
