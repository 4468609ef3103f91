"""Programs started on several ranks: `megagpt train`, and that ending a command ends its ranks."""

import os
import re
import shlex
import signal
import subprocess
import sys

import psutil
import pytest
from support import DEBUG_RUN, ROOT, environment, overrides

from megagpt.checkpoint.commit import committed
from megagpt.cli.arguments import command_line
from megagpt.cli.pretrain import _check_nproc, _unused
from megagpt.cli.spawn_ranks import LocalRanks, train_on_ranks
from megagpt.distributed.rank_variables import OURS, Place, is_rank
from megagpt.errors import UserError
from megagpt.train.run_log import LOG

LAUNCH = "import sys; from megagpt.cli.spawn_ranks import on_ranks; on_ranks(2, 'waiting_rank', sys.argv[1])"
WAITING_RANK = """
import os, sys, threading
ready = open(sys.argv[1], "w")
ready.write(f"{os.getpid()}\\n")
ready.flush()
threading.Event().wait()
"""
FOREVER = ["megagpt.schedule.max_steps=100000", "megagpt.every.save=0", "megagpt.every.eval=0"]


def started(dataset, out_dir, *more, **variables) -> tuple[subprocess.Popen[str], list[str]]:
    """`megagpt train` on two ranks, and its lines up to the first step, if it comes to one."""
    command = [sys.executable, "-m", "megagpt", "train", DEBUG_RUN, *overrides(dataset, out_dir, *more), "--nproc", "2"]
    command, pipes = list(map(str, command)), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    launch = subprocess.Popen(command, cwd=ROOT, env=environment() | variables, text=True, **pipes)
    lines = []
    for line in launch.stdout:
        lines.append(line)
        if line.startswith("step"):
            break
    return launch, lines


@pytest.mark.process
def test_ctrl_c_saves_once_and_ranks_whose_launcher_is_killed_save_too(dataset, tmp_path):
    """Ctrl-C reaches the launcher, which passes it on, and the ranks."""
    launch, lines = started(dataset, tmp_path / "run", *FOREVER)
    assert "accumulation 1 x 2 ranks" in "".join(lines)
    ranks = psutil.Process(launch.pid).children()
    for process in (launch, *ranks):
        process.send_signal(signal.SIGINT)
    out, err = launch.communicate(timeout=120)
    assert launch.returncode == 75, err
    assert out.count("(SIGINT) and saved; the same command resumes") == 1
    assert err.count("Ctrl-C: stopping at the next step") == 1
    [step_dir] = committed(tmp_path / "run")

    launch, lines = started(dataset, tmp_path / "run", *FOREVER)
    assert f"resuming from {step_dir}" in "".join(lines)
    # the header has what was typed, and not what the ranks were given
    typed = ["megagpt", *map(str, launch.args[3:])]
    headers = [line for line in (tmp_path / "run" / LOG).read_text().splitlines() if line.startswith("--- ")]
    assert [f": {shlex.join(typed)} (megagpt " in line for line in headers] == [True, True]
    ranks = psutil.Process(launch.pid).children()
    launch.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    assert "(launcher has died) and saved" in launch.communicate()[0]
    assert len(committed(tmp_path / "run")) == 2


@pytest.mark.process
def test_a_rank_that_is_killed_ends_the_others_with_one_message_and_its_code(dataset, tmp_path):
    launch, _ = started(dataset, tmp_path / "run", *FOREVER)
    ranks = psutil.Process(launch.pid).children()
    [killed] = [process for process in ranks if process.environ()["RANK"] == "1"]
    killed.kill()
    _, err = launch.communicate(timeout=30)
    assert launch.returncode == 128 + signal.SIGKILL
    assert re.fullmatch(r"error: rank 1 was killed \(SIGKILL\), as by the kernel when memory is full.*\n", err)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ranks)


@pytest.mark.process
def test_a_mistake_is_printed_once_for_all_ranks(dataset, tmp_path):
    launch, _ = started(dataset, tmp_path / "run", "megagpt.data.val=nowhere")
    _, err = launch.communicate(timeout=60)
    assert (launch.returncode, err.count("error: "), err.count("\n")) == (2, 1, 1), err


def test_nproc_is_refused_in_a_launchers_rank():
    """Also where an earlier launch left variables of one rank over, by which it would train on one."""
    args = command_line().parse_args(["train", str(DEBUG_RUN), "--nproc", "3"])
    for place, by in ((Place(1, 2, launcher="srun"), "1 of 2 by srun"), (Place(), "0 of 1 by RANK and WORLD_SIZE")):
        with pytest.raises(UserError, match=f"--nproc=3 starts ranks, but this process is already rank {by}"):
            _check_nproc(args, place)
    _check_nproc(command_line().parse_args(["train", str(DEBUG_RUN), "--nproc", "1"]), Place())


@pytest.mark.process
@pytest.mark.parametrize(
    ("codes", "expected"),
    [("0 0", 0), ("0 75", 75), ("3 wait", 3), ("0 1", 1), ("wait -9", 137), ("2 2", 2)],
)
def test_a_launch_ends_with_the_code_of_the_rank_that_failed(tmp_path, codes, expected):
    """A rank that waits for one that has failed is ended."""
    rank = (
        "import os, sys, threading; code = sys.argv[1].split()[int(os.environ['RANK'])]\n"
        "if code == 'wait': threading.Event().wait()\n"
        "if code[0] == '-': os.kill(os.getpid(), -int(code))\n"
        "sys.exit(int(code))"
    )
    assert train_on_ranks(2, [sys.executable, "-c", rank, codes]) == expected


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_that_comes_while_the_ranks_start_stops_each_of_them(monkeypatch, number):
    """Also one that does not listen yet: Python itself takes longer to start than all before it."""
    rank = (
        "import os, signal, socket, sys; from megagpt.train.preemption import Preemption\n"
        "told, tells = socket.socketpair(); tells.setblocking(False); told.settimeout(20)\n"
        "signal.set_wakeup_fd(tells.fileno()); stop = Preemption(ctrl_c=True)\n"
        "stop.requested or told.recv(1); sys.exit(75 if stop.requested else 1)"
    )

    def signalled(self, rank, port):
        if rank == 1:
            os.kill(os.getpid(), number)
        start(self, rank, port)

    start = LocalRanks._start
    monkeypatch.setattr(LocalRanks, "_start", signalled)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        assert train_on_ranks(2, [sys.executable, "-c", rank]) == 75


def test_a_signal_that_came_before_the_ranks_starts_none():
    assert train_on_ranks(2, ["no such program"], stopped=lambda: True) == 75


@pytest.mark.process
def test_ranks_that_remain_with_their_mistake_are_ended_in_time(monkeypatch):
    """One that found a mistake ends with 2, and the others are given some seconds to find it too."""
    monkeypatch.setattr("megagpt.cli.spawn_ranks.FIND_THE_SAME", 0.2)
    rank = "import os, sys, threading; os.environ['RANK'] == '1' and sys.exit(2); threading.Event().wait()"
    with LocalRanks(2, [sys.executable, "-c", rank]) as ranks:
        assert ranks.wait() == (1, 2)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, False),  # srun --pty bash
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, True),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, True),
        ({OURS: "1"}, False),
    ],
)
def test_only_a_launchers_rank_starts_no_ranks_of_its_own(variables, expected):
    assert is_rank(variables) == expected


@pytest.mark.parametrize(("place", "nproc", "notes"), [(Place(), 0, 1), (Place(), 1, 0), (Place(1, 4), 0, 0)])
def test_gpus_that_a_run_leaves_unused_are_named(monkeypatch, place, nproc, notes):
    """As with `python launch/pretrain.py`, which is one rank."""
    monkeypatch.setattr("megagpt.distributed.process_group.visible_gpus", lambda: 4)
    args = command_line().parse_args(["train", "my run.json", *(["--nproc", str(nproc)] if nproc else [])])
    expected = ["note: this run uses one of 4 GPUs; `megagpt train 'my run.json'` uses all of them"] * notes
    assert _unused(args, place) == expected


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ending_the_command_ends_its_ranks(tmp_path, number):
    (tmp_path / "waiting_rank.py").write_text(WAITING_RANK)
    pipe = tmp_path / "ready"
    os.mkfifo(pipe)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = subprocess.Popen([sys.executable, "-c", LAUNCH, pipe], env=environment() | {"PYTHONPATH": path})
    # Opening blocks until a rank has opened the pipe too.
    with pipe.open() as ready:
        ranks = [psutil.Process(int(ready.readline())) for _ in range(2)]
    assert set(ranks) == set(psutil.Process(command.pid).children(recursive=True))
    command.send_signal(number)
    assert command.wait(60) in (128 + number, -number)
    psutil.wait_procs(ranks, timeout=10)  # killed a moment ago, they may still be running
    # One that has ended and whose parent is gone stays a zombie where process 1 of a container reaps none.
    left = [process for process in ranks if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    assert not left


@pytest.mark.process
def test_ranks_meet_on_a_host_whose_name_does_not_resolve(tmp_path):
    """As in many containers."""
    alone = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces here: unshare, or root, is missing")
    (tmp_path / "meeting_rank.py").write_text(
        "from megagpt.distributed.process_group import init_process_group, leave\ninit_process_group(); leave()\n"
    )
    launch = "from megagpt.cli.spawn_ranks import on_ranks; done = on_ranks(2, 'meeting_rank'); print(done.returncode)"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = [*alone, sys.executable, "-c", launch]
    done = subprocess.run(
        command, env=environment() | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "0\n", done.stderr
