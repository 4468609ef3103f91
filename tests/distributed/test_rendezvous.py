"""What ranks compare before they train."""

import shutil
from pathlib import Path

import megagpt
from megagpt.distributed.rendezvous import code_hash


def test_a_byte_changed_in_any_source_file_changes_the_hash_of_our_code(tmp_path):
    package = Path(shutil.copytree(Path(megagpt.__file__).parent, tmp_path / "megagpt"))
    usual = code_hash(package)
    for file in package.rglob("*.py"):
        source = file.read_bytes()
        file.write_bytes(source + b"#")
        assert code_hash(package) != usual, file
        file.write_bytes(source)
    assert code_hash(package) == usual
