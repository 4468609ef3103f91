"""atheris targets, one for each parser of files that other people may have written.

    python tests/fuzz/fuzz.py TARGET SEEDS [libFuzzer's options, such as -runs=100000]

SEEDS is a folder of whole files to begin with, and takes what was found. Whatever the bytes, a parser takes them or
raises UserError; anything else ends the process with what brought it about.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["megagpt"]):
    from megagpt.commits import committed, damage_of, newest_record
    from megagpt.data_manifest import read_manifest
    from megagpt.errors import UserError
    from megagpt.launcher import check_hosts, check_settings
    from megagpt.run_file import load_run_config
    from megagpt.shards import open_dataset
    from megagpt.tokenizer import Tokenizer


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


def pickle(file: Path) -> None:
    """The bytes as the program of a file that torch.save made."""
    import torch

    from megagpt.pickles import check_pickles

    inside, program = file.with_name("inside.pt"), file.read_bytes()
    writer = torch._C.PyTorchFileWriter(str(inside))
    writer.write_record("data.pkl", program, len(program))
    writer.write_end_of_file()
    check_pickles([inside, file])


def tokenizer(file: Path) -> None:
    model = Tokenizer.load(file)
    model.decode(model.encode("a word\n and \u2581 another"))
    model.token_bytes()


TARGETS: dict[str, Callable[[Path], object]] = {
    "commit": commit,
    "environment": check_settings,
    "hosts": check_hosts,
    "manifest": manifest,
    "pickle": pickle,
    "run_file": load_run_config,
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
