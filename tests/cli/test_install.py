"""The wheel, installed without a checkout: every package is in it, and it builds a dataset and trains."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import processes
import pytest
from support import DEBUG_RUN, ROOT, environment, free_port, write_corpus

from megagpt.checkpoint.commit import committed


@pytest.fixture(scope="module")
@processes.start_here
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    source = folder / "source"  # setuptools writes build/ and *.egg-info beside pyproject.toml
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*pip, source], check=True, env=environment() | {"PIP_NO_INDEX": "1"})
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
@processes.start_here
def installed(wheel, tmp_path_factory) -> Path:
    """The bin folder of an environment that has this wheel, and the packages of this environment but for megagpt."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    paths = {"base": str(folder), "platbase": str(folder)}
    site_packages = Path(sysconfig.get_path("purelib", "venv", paths))
    # a .pth inside of a folder that is added is not read, so an editable install there stays invisible
    packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(packages) + "\n")
    install = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--no-index", "--ignore-installed", wheel], check=True, env=environment())
    return folder / "bin"


def run(folder: Path, *command: str | Path) -> str:
    """Outside of the checkout, with nothing of it on the path."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and key in environment()}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_has_every_source_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.endswith(".py")}
        assert {"megagpt/py.typed", "data_tools/py.typed"} <= set(archive.namelist())
    files = {str(p.relative_to(ROOT)) for part in ("megagpt", "data_tools") for p in (ROOT / part).rglob("*.py")}
    assert packed == files


def test_without_a_checkout_it_builds_a_dataset_and_trains_three_ways_alike(installed, tmp_path):
    python = installed / "python"
    where = run(tmp_path, python, "-c", "import megagpt; print(megagpt.__file__)").strip()
    assert Path(where).is_relative_to(installed.parent)
    assert "train" in run(tmp_path, installed / "megagpt", "--help")
    corpus = write_corpus(tmp_path / "corpus.jsonl", 400)
    build = [python, "-m", "data_tools", "build", "--input", corpus, "--out", "data", "tokenizer_type=char"]
    run(tmp_path, *build, "vocab_size=300", "val_fraction=0.2", "workers=1")
    (tmp_path / "run.json").write_bytes(DEBUG_RUN.read_bytes())
    options = ["megagpt.data.train.0.path=data", "megagpt.data.val=data", "megagpt.schedule.max_steps=4"]
    launch = [python, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--master_port", free_port()]
    ways = {
        "train": [installed / "megagpt", "train", "run.json"],
        "module": [python, "-m", "megagpt.train", "--deepspeed_config", "run.json"],
        "deepspeed": [*launch, "--module", "megagpt.train", "--deepspeed_config", "run.json"],
    }
    metrics = {}
    for name, command in ways.items():
        run(tmp_path, *command, *options, f"megagpt.out_dir={name}")
        assert [step.name for step in committed(tmp_path / name)] == ["step_00000004"]
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        metrics[name] = [json.loads(line)["train/loss"] for line in rows if '"train/loss"' in line]
    assert len(metrics["train"]) == 4
    assert metrics["train"] == metrics["module"] == metrics["deepspeed"]
