"""Many files under a low limit of open files: none is held open longer than it is read, and the limit is named."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from data_support import document, open_files_left, run, small_tokenizer, write_dataset
from support import DEBUG_RUN, ROOT, environment

from data_tools.__main__ import COMMANDS
from data_tools.build import build
from data_tools.config import BuildConfig, SourceConfig
from data_tools.readers.find_files import find_files
from data_tools.readers.input_file import InputFile
from data_tools.readers.open_file import open_bytes
from data_tools.readers.work_units import MIN_UNIT_BYTES, cut_into_units
from megagpt import open_files
from megagpt.data import dataset as dataset_module
from megagpt.data.dataset import open_dataset
from megagpt.data.provenance import origins
from megagpt.data.shard_format import map_file
from megagpt.errors import UserError, limit_reached, writing_to
from megagpt.terminal import exit_code_of

NAMED = r"^too many open files: the limit is \d+ \(`ulimit -n`\); run `ulimit -n \d+` and start again$"


def write_inputs(folder: Path, n: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{i}.txt" for i in range(n)]
    for i, path in enumerate(paths):
        path.write_text(document(i, n_words=20))
    return paths


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(small_tokenizer().model_bytes)
    return path


def test_more_inputs_and_shards_than_open_files(tmp_path: Path, model: Path) -> None:
    paths = write_inputs(tmp_path / "in", 40)
    options = BuildConfig(tokenizer=model, val_fraction=0, shard_tokens=50, workers=1)
    warm_up = write_inputs(tmp_path / "first", 1)  # imports open files
    build(warm_up, tmp_path / "first out", options)
    with open_files_left(12):
        build(paths, tmp_path / "out", options)
        stream = open_dataset(tmp_path / "out").stream("train")
        stream.open_all()
        texts = [small_tokenizer().decode(ids) for ids in stream.documents()]
    assert sorted(texts) == sorted(path.read_text() for path in paths)
    assert len(list((tmp_path / "out" / "train" / "v0").iterdir())) > 20


def test_a_mapped_file_is_closed_and_read_without_a_copy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "empty").write_bytes(b"")
    before, allocated = os.listdir("/proc/self/fd"), pa.total_allocated_bytes()
    mapped = map_file(tmp_path / "file")
    assert (bytes(mapped), len(map_file(tmp_path / "empty"))) == (b"content", 0)
    assert (os.listdir("/proc/self/fd"), pa.total_allocated_bytes()) == (before, allocated)
    assert mapped.address in {int(line.split("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines()}


def test_the_shards_mapped_at_a_time_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(3, 300, rng.integers(0, 60)), 2) for _ in range(40)]
    write_dataset(tmp_path / "corpus", documents, n_shards=10)
    flat = np.concatenate(documents)
    monkeypatch.setattr(dataset_module, "MAPPED_SHARDS", 3)
    stream = open_dataset(tmp_path / "corpus").stream("train")
    for start in rng.integers(0, len(flat) - 200, 50).tolist():
        out = np.zeros(200, np.int64)
        stream.copy(start, out)
        np.testing.assert_array_equal(out, flat[start : start + 200])
        maps = Path("/proc/self/maps").read_text()
        assert len({shard for shard in range(10) if f"{tmp_path}/corpus/train/v0/shard-{shard:06d}" in maps}) <= 3
    np.testing.assert_array_equal(np.concatenate(list(stream.documents())), flat)


def test_the_limit_is_named_and_no_file_is_blamed(tmp_path: Path) -> None:
    write_dataset(tmp_path / "corpus", [np.array([5, 2]), np.array([6, 2])])
    dataset = open_dataset(tmp_path / "corpus")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "corpus" / "provenance" / "train" / "v0").mkdir(parents=True)
    (tmp_path / "corpus" / "provenance" / "train" / "v0" / "shard-000000.parquet").write_text("")
    [file] = find_files(SourceConfig(name="a", paths=(str(tmp_path / "a.txt"),)))
    with open_files_left(0):
        with pytest.raises(UserError, match=NAMED):
            dataset.stream("train").open_all()
        with pytest.raises(UserError, match=NAMED):
            next(origins(dataset, "train", [0]))
        with pytest.raises(UserError, match=NAMED), open_bytes(file):
            pass
        with pytest.raises(UserError, match=NAMED), writing_to(tmp_path):
            (tmp_path / "b").write_text("")


def test_a_command_that_meets_the_limit_returns_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*_: object) -> int:
        try:
            with open_files_left(0):
                return len(os.listdir("/"))
        except OSError as error:
            raise RuntimeError("a worker failed to start") from error

    monkeypatch.setitem(COMMANDS, "verify", command)
    for start in (lambda: exit_code_of(command), lambda: run("verify", "corpus")):
        assert start() == 2
        assert capsys.readouterr().err.startswith("error: too many open files: the limit is ")


def test_other_limits_have_names_of_their_own() -> None:
    full = OSError("Memory mapping file failed: Cannot allocate memory")
    most = Path("/proc/sys/vm/max_map_count").read_text().strip()
    assert f"(the sysctl vm.max_map_count is {most})" in str(limit_reached(full))
    assert "fs.file-max" in str(limit_reached(OSError(23, "Too many open files in system")))
    assert limit_reached(OSError(2, "No such file")) is None
    with pytest.raises(RuntimeError) as later:
        raise RuntimeError from OSError(24, "Too many open files")
    assert "ulimit -n" in str(limit_reached(later.value))


def test_programs_raise_the_soft_limit_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(hard, 1000) if hard != resource.RLIM_INFINITY else 1000
    monkeypatch.setattr(open_files, "MOST", most)
    with open_files_left(5):
        open_files.raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, hard)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(open_files, "MOST", 10)
    open_files.raise_limit()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_inputs_of_one_name_get_the_first_free_number() -> None:
    rng = np.random.default_rng(0)
    names = rng.choice(["a", "a-2", "a-3", "b", "b-2", "a-2-2"], 60).tolist()
    expected: list[str] = []
    for name in names:
        choices = (name, *(f"{name}-{number}" for number in range(2, 100)))
        expected.append(next(choice for choice in choices if choice not in expected))
    config = BuildConfig()
    assert [source.name for source in config.with_inputs([f"/{i}/{name}" for i, name in enumerate(names)])] == expected


def test_more_inputs_than_a_shard_can_number_are_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"65,537 inputs are more than the 65,536 sources .*give their folder instead"):
        BuildConfig().with_inputs(["a"] * (2**16 + 1))


def test_units_of_many_small_files_end_where_they_are_full() -> None:
    sizes = np.random.default_rng(0).integers(1, 2**21, 300).tolist()
    files = [InputFile(str(i), "text", "", size, "", False, "utf-8") for i, size in enumerate(sizes)]
    units = cut_into_units([("a", files)])
    assert [slice_.file for unit in units for slice_ in unit.slices] == files
    assert all(unit.size >= MIN_UNIT_BYTES > unit.size - unit.slices[-1].size for unit in units[:-1])


LIMITED = (  # the hard limit as well, so that nothing can raise it
    "import resource, runpy, sys; n = int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_NOFILE, (n, n));"
    "module = sys.argv.pop(1); sys.argv[0] = module; runpy.run_module(module, run_name='__main__')"
)


def limited(n: int, module: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LIMITED, str(n), module, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


@pytest.mark.long
@pytest.mark.process
def test_1500_inputs_and_400_shards_at_256_open_files(tmp_path: Path, model: Path) -> None:
    """Each input is a unit of its own: 300 GB have 1,100."""
    paths = write_inputs(tmp_path / "in", 1500)
    options = [f"tokenizer={model}", "val_fraction=0.1", "shard_tokens=140"]
    done = limited(256, "data_tools", "build", "--input", *paths, "--out", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out" / "train" / "v0").iterdir())) > 400
    for command in (["verify"], ["inspect", "--documents", 1000]):
        done = limited(256, "data_tools", command[0], tmp_path / "out", *command[1:])
        assert done.returncode == 0, done.stderr
    train = ["train", DEBUG_RUN, f"megagpt.data.train.0.path={tmp_path}/out", f"megagpt.data.val={tmp_path}/out"]
    done = limited(256, "megagpt", *train, f"megagpt.out_dir={tmp_path}/run", "megagpt.sample.max_tokens=8")
    assert done.returncode == 0, done.stderr
    assert run("inspect", tmp_path / "run", "--step", "2") == 0
