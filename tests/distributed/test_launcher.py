import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megagpt.distributed.launcher import ancestors, hosts_of_ranks, launcher_watch

PRINT_PARENT = (
    "import sys; from megagpt.distributed.launcher import ancestors; arguments, folder = next(ancestors());"
    "print(arguments == sys.argv[1:], folder, 'torch' in sys.modules)"
)


@pytest.mark.process
def test_a_process_reads_its_parents_command_line_and_folder_without_torch():
    parent = psutil.Process().cmdline()
    child = subprocess.run([sys.executable, "-c", PRINT_PARENT, *parent], capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["True", str(Path.cwd()), "False"]


def test_processes_that_may_not_be_read_are_no_error(monkeypatch):
    def hidden(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    for name in ("cmdline", "cwd", "ppid"):
        monkeypatch.setattr(psutil.Process, name, hidden)
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert list(ancestors()) == []
    assert hosts_of_ranks() == []


def test_a_launcher_is_watched_and_a_persons_shell_is_not(monkeypatch):
    monkeypatch.setenv("CROSS_SIZE", "1")
    alive = launcher_watch()
    assert alive()
    monkeypatch.setattr(psutil.Process, "ppid", lambda process: 1)  # as of an orphan
    assert not alive()
    monkeypatch.delenv("CROSS_SIZE")
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert launcher_watch()()
