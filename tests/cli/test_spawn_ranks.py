"""Programs started on several ranks: ending the command ends their ranks."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from support import ROOT, environment

LAUNCH = "import sys; from megagpt.cli.spawn_ranks import on_ranks; on_ranks(2, 'waiting_rank', sys.argv[1])"
WAITING_RANK = """
import os, sys, threading
ready = open(sys.argv[1], "w")
ready.write(f"{os.getpid()}\\n")
ready.flush()
threading.Event().wait()
"""


@pytest.mark.process
@pytest.mark.parametrize(
    ("number", "torchrun_is_killed"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)]
)
def test_ending_the_command_ends_its_ranks(tmp_path, number, torchrun_is_killed):
    """Ranks without a torchrun are also what one leaves that is told to end while it still starts them."""
    (tmp_path / "waiting_rank.py").write_text(WAITING_RANK)
    pipe = tmp_path / "ready"
    os.mkfifo(pipe)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    command = subprocess.Popen([sys.executable, "-c", LAUNCH, pipe], env=environment() | {"PYTHONPATH": path})
    # Opening blocks until a rank has opened the pipe too.
    with pipe.open() as ready:
        ranks = [psutil.Process(int(ready.readline())) for _ in range(2)]
    below = psutil.Process(command.pid).children(recursive=True)
    assert set(ranks) <= set(below)
    if torchrun_is_killed:
        [torchrun] = psutil.Process(command.pid).children()
        torchrun.kill()
    command.send_signal(number)
    assert command.wait(60) in (128 + number, -number)
    # One that has ended and whose parent is gone stays a zombie where process 1 of a container reaps none.
    left = [process for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
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
