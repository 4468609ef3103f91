"""Damage files in random ways and see what becomes of them: run as a process, which a bad read must not kill.

    python tests/programs/corrupt_files.py KIND FOLDER SCRATCH N SEED

KIND: dataset, checkpoints (a run's folder), tokenizer.

Prints one JSON line: how many of N damages were accepted, and what came out other than what was written or a UserError.
"""

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_tools.verify import verify
from megagpt.atomic_files import sha256_of
from megagpt.checkpoint.commit import best, committed, damage_of, newest_record
from megagpt.cli.checkpoints import checkpoint_table
from megagpt.data.dataset import open_dataset
from megagpt.errors import UserError
from megagpt.tokenizer.tokenizer import Tokenizer


def flip(content: bytearray, rng: random.Random) -> None:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def overwrite(content: bytearray, rng: random.Random) -> None:
    at, n = rng.randrange(len(content)), rng.randint(1, 64)
    content[at : at + n] = rng.randbytes(len(content[at : at + n]))


def zero(content: bytearray, rng: random.Random) -> None:
    at, n = rng.randrange(len(content)), rng.randint(1, 4096)
    content[at : at + n] = bytes(len(content[at : at + n]))


def truncate(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def delete(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content))
    del content[at : at + rng.randint(1, 64)]


def insert(content: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(content) + 1)
    content[at:at] = rng.randbytes(rng.randint(1, 64))


def swap(content: bytearray, rng: random.Random) -> None:
    n = rng.randint(1, max(1, len(content) // 4))
    a, b = sorted(rng.randrange(len(content) - n + 1) for _ in range(2))
    if b - a >= n:
        content[a : a + n], content[b : b + n] = content[b : b + n], content[a : a + n]


DAMAGES = [flip, flip, flip, overwrite, zero, truncate, delete, insert, swap]


def read_everything(folder: Path) -> None:
    dataset = open_dataset(folder)
    for split, content in dataset.manifest.splits.items():
        for variant in content.variants if content.documents else ():
            stream = dataset.stream(split, variant.id)
            stream.copy(0, np.zeros(stream.n_tokens, np.int64))
            for _ in stream.documents():
                pass


def of_dataset(scratch: Path, name: str) -> Iterator[str]:
    try:
        verify(scratch)
        yield "accepted"
    except UserError as error:
        if name not in str(error):
            yield f"not named: {error}"
    with suppress(UserError):
        read_everything(scratch)


def of_checkpoints(scratch: Path, name: str) -> Iterator[str]:
    """A step's file is missed by name; a hint that rotted leads to a step or nowhere."""
    import torch  # and DeepSpeed, which the other kinds need not wait for

    from megagpt.checkpoint.load import load_model

    step_dir = (scratch / name).parent
    if step_dir.name.startswith("step_"):
        complaints = [damage_of(step_dir, r) or "" for r in range(2)]
        if not any(Path(name).name in complaint for complaint in complaints):
            yield "accepted" if not any(complaints) else f"not named: {complaints}"
        with suppress(UserError):
            load_model(step_dir, torch.device("cpu"))
            yield "loaded"
    if best(scratch) not in (None, *committed(scratch)):
        yield "hint"
    newest_record(scratch)
    checkpoint_table(scratch, hashes=False)


def of_tokenizer(scratch: Path, name: str) -> Iterator[str]:
    """One that is not known by its hash is the user's own: it works or is refused."""
    with suppress(UserError):
        Tokenizer.load(scratch / name, sha256=sha256_of(scratch.with_name(f"{scratch.name}.whole") / name))
        yield "accepted"
    with suppress(UserError):
        tokenizer = Tokenizer.load(scratch / name)
        tokenizer.decode(tokenizer.encode("a word\n\tand \u2581 another"))
        tokenizer.token_bytes()


KINDS = {"dataset": of_dataset, "checkpoints": of_checkpoints, "tokenizer": of_tokenizer}


def main(kind: str, whole: Path, scratch: Path, n: int, seed: int) -> None:
    rng = random.Random(seed)
    shutil.copytree(whole, scratch)
    scratch.with_name(f"{scratch.name}.whole").symlink_to(whole)
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file() and path.stat().st_size)
    result: Counter[str] = Counter(damages=0, accepted=0)
    while result["damages"] < n:
        name = rng.choice(names)
        original = (whole / name).read_bytes()
        content = bytearray(original)
        damage = rng.choice(DAMAGES)
        damage(content, rng)
        if content == original:
            continue
        result["damages"] += 1
        (scratch / name).write_bytes(content)
        try:
            for complaint in KINDS[kind](scratch, name):
                result["accepted"] += complaint == "accepted"
                result[f"{complaint}: {damage.__name__} of {name}"] += 1
        except Exception as error:
            result[f"{type(error).__name__}: {error} ({damage.__name__} of {name})"] += 1
        (scratch / name).write_bytes(original)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
