"""Damage a dataset in random ways and see what becomes of it: run as a process, which a bad read must not kill.

    python tests/corrupt.py DATASET SCRATCH N SEED

Prints one JSON line: how many of N damages verify accepted, and what came out of the reader other than the tokens or
a UserError.
"""

import json
import os
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from data_tools.verify import verify
from megagpt.errors import UserError
from megagpt.shards import open_dataset


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


def main(dataset: Path, scratch: Path, n: int, seed: int) -> None:
    rng = random.Random(seed)
    shutil.copytree(dataset, scratch)
    names = sorted(
        str(path.relative_to(dataset)) for path in dataset.rglob("*") if path.stat().st_size and path.is_file()
    )
    result: Counter[str] = Counter(damages=0, accepted=0)
    while result["damages"] < n:
        name = rng.choice(names)
        original = (dataset / name).read_bytes()
        content = bytearray(original)
        damage = rng.choice(DAMAGES)
        damage(content, rng)
        if content == original:
            continue
        result["damages"] += 1
        (scratch / name).write_bytes(content)
        try:
            verify(scratch)
            result["accepted"] += 1
            result[f"accepted: {damage.__name__} of {name}"] += 1
        except UserError as error:
            if name not in str(error):
                result[f"not named: {damage.__name__} of {name}: {error}"] += 1
        except Exception as error:
            result[f"verify: {type(error).__name__}: {error} ({damage.__name__} of {name})"] += 1
        try:
            read_everything(scratch)
        except UserError:
            pass
        except Exception as error:
            result[f"reader: {type(error).__name__}: {error} ({damage.__name__} of {name})"] += 1
        (scratch / name).write_bytes(original)
    print(json.dumps(result))


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
