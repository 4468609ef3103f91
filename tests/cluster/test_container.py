"""As in a bare container, and in a checkout whose path has a blank and an apostrophe: every way to start works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_support import write_texts
from hosts import SBIN
from support import DEBUG_RUN, ROOT, free_port, metric, overrides

# No name that resolves, no network but the loopback, 1 MB of /dev/shm, a user whom no file names. What is under /root,
# where this Python may be, is hidden from such a user, except for this Python.
ENTER = """
mount -t tmpfs none /media && mkdir /media/python && mount --bind "$1" /media/python
case "$1" in /root/*) mount -t tmpfs -o mode=755 none /root && mkdir -p "$1" && mount --bind /media/python "$1";; esac
mount --bind "$2" /mnt && chown -R 12345:12345 /mnt
mount -t tmpfs -o size=1m,mode=1777 none /dev/shm
ip link set lo up && hostname no-such-host
cd "/mnt/$3" && shift 3
exec setpriv --reuid=12345 --regid=12345 --clear-groups env -i "$@"
"""
CHECKOUT = "my user's/mega gpt"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the container's checkout. It has no HOME, and a TMPDIR that does not exist."""
    alone = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    path = f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}"
    variables = [path, f"PYTHONPATH=/mnt/{CHECKOUT}", "OMP_NUM_THREADS=1", "TMPDIR=/missing", "DS_ACCELERATOR=cpu"]
    enter = ["sh", "-ec", ENTER, "sh", sys.base_prefix, str(folder), CHECKOUT, *variables]
    return subprocess.run([*alone, *enter, *command], capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def container(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("container")
    checkout = folder / CHECKOUT
    checkout.mkdir(parents=True)
    if (tried := run(folder, "python", "-c", "import torch")).returncode:
        pytest.skip(f"another user cannot use this Python: {tried.stderr[-200:]}")
    for name in ("launch", "megagpt", "data_tools"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(DEBUG_RUN, checkout / "my run.json")
    write_texts(checkout / "my texts", 100)
    build = ["python", "-m", "data_tools", "build", "--input", "my texts", "--out", "my data"]
    done = run(folder, *build, "vocab_size=300", "val_fraction=0.4")
    assert done.returncode == 0, done.stderr
    return folder


def few_steps(out_dir: str) -> list[str]:
    every = ["megagpt.every.save=2", "megagpt.every.eval=4", "megagpt.every.sample=4"]
    return overrides(
        Path("my data"), Path(out_dir), "megagpt.schedule.max_steps=4", "megagpt.data.val_tokens=512", *every
    )


PRETRAIN = ["launch/pretrain.py", "--deepspeed_config", "my run.json"]
LAUNCHED = [
    pytest.param(["python", "-m", "megagpt", "train", "my run.json"], id="megagpt train"),
    pytest.param(["deepspeed", "--num_gpus", "1", "--master_port", str(free_port()), *PRETRAIN], id="deepspeed"),
    pytest.param(
        ["torchrun", "--standalone", "--local-addr=localhost", "--nproc-per-node", "1", *PRETRAIN],
        id="torchrun",
        marks=pytest.mark.long,
    ),
    pytest.param(
        ["python", "-m", "megagpt", "train", "my run.json", "megagpt.compile=true"],
        id="compiled",
        marks=pytest.mark.long,
    ),
]


@pytest.mark.process
@pytest.mark.parametrize("launch", LAUNCHED)
def test_every_launcher_trains_there(container, launch, request):
    out_dir = f"its runs/{request.node.callspec.id}'s"
    done = run(container, *launch, *few_steps(out_dir))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert list(metric(container / CHECKOUT / out_dir, "train/loss")) == [1, 2, 3, 4]


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["doctor"], id="doctor"),
        pytest.param(["verify-resume"], id="verify-resume", marks=pytest.mark.long),
        pytest.param(["plan", "--probe", "--ranks", "2"], id="plan", marks=pytest.mark.long),
    ],
)
def test_every_command_that_starts_others_works_there(container, command):
    done = run(container, "python", "-m", "megagpt", *command, "my run.json", *few_steps("its runs/a"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
