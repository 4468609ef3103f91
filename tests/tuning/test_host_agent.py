"""The agent that runs a trial on a host of a hostfile: the trial ends with the tuner, and as it would end here."""

import subprocess
import sys
import time

import psutil
import pytest

from megagpt.tuning import host_agent

pytestmark = pytest.mark.process
# Tells its number once it listens, and ends with 75 at SIGTERM, as a trial that has saved.
TRIAL = (
    "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); "
    "print(os.getpid(), flush=True); signal.pause()"
)


def agent(log, *command):
    words = [sys.executable, "-m", "megagpt.tuning.host_agent", str(log), *command]
    return subprocess.Popen(words, stdin=subprocess.PIPE, bufsize=0)


def trial_of(log, started):
    while not (log.exists() and log.read_text().endswith("\n")):
        assert started.poll() is None
        time.sleep(0.01)  # a file that another process writes
    return psutil.Process(int(log.read_text()))


def test_a_trial_saves_and_ends_when_the_tuner_is_gone(tmp_path):
    log = tmp_path / "0000.log"
    with agent(log, sys.executable, "-c", TRIAL) as started:
        started.stdin.write(b".")
        trial = trial_of(log, started)
        started.stdin.close()  # as the kernel and sshd do for a tuner that was killed
        assert started.wait(30) == 75
    assert not trial.is_running()


def test_a_killed_agent_leaves_no_trial(tmp_path):
    log = tmp_path / "0000.log"
    with agent(log, sys.executable, "-c", TRIAL) as started:
        trial = trial_of(log, started)
        started.kill()
        psutil.wait_procs([trial], timeout=30)
        assert not trial.is_running()


def test_a_silent_tuner_counts_as_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(host_agent, "SILENCE", 0.1)
    with subprocess.Popen(["sleep", "infinity"], stdout=subprocess.PIPE) as silent:
        monkeypatch.setattr(sys, "stdin", silent.stdout)
        try:
            assert host_agent.main([str(tmp_path / "log"), "sleep", "infinity"]) == 128 + 15
        finally:
            silent.kill()


def test_a_trial_that_ends_by_itself_has_its_own_code(tmp_path):
    for command, code in (("exit 2", 2), ("kill -9 $$", 137)):
        with agent(tmp_path / "log", "sh", "-c", f"echo said; {command}") as started:
            assert started.wait(30) == code
    assert (tmp_path / "log").read_text() == "said\nsaid\n"
