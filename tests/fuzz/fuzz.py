r"""atheris targets, one for each parser of files that other people may have written.

    pip install -e ".[fuzz]"
    PYTHONPATH=.:tests:tests/programs \
        python tests/fuzz/fuzz.py TARGET SEEDS [libFuzzer's options, such as -max_total_time=3600]

SEEDS is a folder of whole files to begin with, and takes what was found. Whatever the bytes, a parser takes them or
raises UserError; anything else ends the process with what brought it about. What a hash stands before is signed anew,
but for the generators' states: those may end in any exception, so long as the process lives.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["data_tools", "megagpt", "pickletools"]):
    import torch
    from corrupt import read_everything
    from support import build_dataset

    from data_tools.config import BuildConfig, load_config
    from megagpt.atomic_files import sha256_of
    from megagpt.checkpoint.commit import COMMIT, _digest, committed, damage_of, newest_record
    from megagpt.checkpoint.rng import set_rng_state
    from megagpt.config.run_file import load_run_config
    from megagpt.data.dataset import open_dataset
    from megagpt.data.manifest import read_manifest, write_manifest
    from megagpt.data.shard_format import INDEX
    from megagpt.distributed.hostfile import check_hosts, check_settings
    from megagpt.engine.safe_pickle import check_pickles
    from megagpt.errors import UserError
    from megagpt.tokenizer.tokenizer import Tokenizer


def build_config(file: Path) -> None:
    load_config(BuildConfig, file, [])


def commit(file: Path) -> None:
    step_dir = file.parent / "checkpoints" / "step_00000001"
    step_dir.mkdir(parents=True, exist_ok=True)
    (step_dir / "COMMIT").write_bytes(file.read_bytes())
    assert committed(file.parent) == [step_dir]
    assert damage_of(step_dir, 0) is not None  # no manifest lies beside it
    newest_record(file.parent)


def manifest(file: Path) -> None:
    (file.parent / "manifest.json").write_bytes(file.read_bytes())
    read_manifest(file.parent / "manifest.json")
    open_dataset(file.parent)


def files_of_a_rank(file: Path) -> None:
    step_dir = file.parent / "checkpoints" / "step_00000001"
    step_dir.mkdir(parents=True, exist_ok=True)
    (step_dir / "manifest.0.json").write_bytes(file.read_bytes())
    record = {"manifests": [sha256_of(file)], "identity": {"world_size": 1}}
    (step_dir / COMMIT).write_text(json.dumps(record | {"sha256": _digest(record)}))
    damage_of(step_dir, 0)


@cache
def dataset(folder: Path) -> Path:
    return build_dataset(folder / "data", n_documents=20)


def index(file: Path) -> None:
    folder = dataset(file.parent)
    (folder / INDEX).write_bytes(file.read_bytes())
    write_manifest(folder, read_manifest(folder).model_copy(update={"index_sha256": sha256_of(file)}))
    open_dataset(folder)


def shard(file: Path) -> None:
    """As long as the manifest says: its hash is for `verify`."""
    folder = dataset(file.parent)
    (info,) = read_manifest(folder).splits["train"].variants[0].shards
    (folder / info.path).write_bytes(file.read_bytes().ljust(info.bytes, b"\0")[: info.bytes])
    read_everything(folder)


def generators(file: Path) -> None:
    with suppress(Exception):
        set_rng_state(json.loads(file.read_bytes()))


def pickle(file: Path) -> None:
    """The bytes as the program of a file that torch.save made."""
    inside, program = file.with_name("inside.pt"), file.read_bytes()
    writer = torch._C.PyTorchFileWriter(str(inside))
    writer.write_record("data.pkl", program, len(program))
    writer.write_end_of_file()
    check_pickles([inside, file])


def tokenizer(file: Path) -> None:
    model = Tokenizer.load(file)
    model.decode(model.encode("a word\n and \u2581 another"))
    model.token_bytes()
    model.lost("a word\n and \u2581 another")


TARGETS: dict[str, Callable[[Path], object]] = {
    "build_config": build_config,
    "commit": commit,
    "environment": check_settings,
    "files_of_a_rank": files_of_a_rank,
    "generators": generators,
    "hosts": check_hosts,
    "index": index,
    "manifest": manifest,
    "pickle": pickle,
    "run_file": load_run_config,
    "shard": shard,
    "tokenizer": tokenizer,
}


def main() -> None:
    parse, options = TARGETS[sys.argv[1]], sys.argv[2:]
    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
        file = Path(folder) / "input"

        def one(data: bytes) -> None:
            file.write_bytes(data)
            with suppress(UserError):
                parse(file)

        atheris.Setup([sys.argv[0], *options], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
