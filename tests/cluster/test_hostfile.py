"""Training over the machines of a hostfile, by the README's own command: it ends everywhere, and goes on."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from checkout import Checkout, name_that_leads_to_itself, other_programs, other_run_file, settings, taken_port
from hosts import Cluster
from support import build_dataset, metric

from megagpt.checkpoint.commit import committed
from megagpt.cli.pretrain import pretrain
from megagpt.guards.restarts import last_logged

KILL, TERM, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1
RANK, LAUNCH, DEEPSPEED = "--local_rank=0", "deepspeed.launcher.launch --world_info", "bin/deepspeed --hostfile"
PDSH = "pdsh -S"


def send(number: signal.Signals, host: str, part: str) -> Callable[[Cluster], None]:
    """To the process on that host that has this in its command line; of a chain of shells, the last."""

    def fail(cluster: Cluster) -> None:
        cluster[host].processes(part)[-1].send_signal(number)

    return fail


def both(number: signal.Signals) -> Callable[[Cluster], None]:
    """To the ranks of both hosts."""

    def fail(cluster: Cluster) -> None:
        for host in cluster:
            host.rank().send_signal(number)

    return fail


# what is done to a run on two hosts -> the exit code of `deepspeed`, if it lives to give one that is promised
FAILURES: dict[str, tuple[Callable[[Cluster], None], int | None]] = {
    "SIGTERM to h2's rank": (send(TERM, "h2", RANK), 75),
    "kill -9 of h1's rank": (send(KILL, "h1", RANK), None),
    "kill -9 of deepspeed": (send(KILL, "h1", DEEPSPEED), None),
    "SIGTERM to h1's rank": (send(TERM, "h1", RANK), 75),
    "SIGUSR1 to h2's rank": (send(USR1, "h2", RANK), 75),
    "kill -9 of h2's rank": (send(KILL, "h2", RANK), None),
    "a crash of h2's rank": (send(signal.SIGSEGV, "h2", RANK), None),
    "kill -9 of h1's launch.py": (send(KILL, "h1", LAUNCH), None),
    "kill -9 of h2's launch.py": (send(KILL, "h2", LAUNCH), None),
    "SIGTERM to h1's launch.py": (send(TERM, "h1", LAUNCH), None),
    "SIGTERM to h2's launch.py": (send(TERM, "h2", LAUNCH), None),
    "SIGTERM to deepspeed": (send(TERM, "h1", DEEPSPEED), None),
    "SIGINT to deepspeed": (send(signal.SIGINT, "h1", DEEPSPEED), None),
    "SIGHUP to deepspeed": (send(signal.SIGHUP, "h1", DEEPSPEED), None),
    "SIGUSR1 to h1's rank": (send(USR1, "h1", RANK), 75),
    "kill -9 of pdsh": (send(KILL, "h1", PDSH), None),
    "SIGTERM to pdsh": (send(TERM, "h1", PDSH), None),
    "kill -9 of the ssh to h2": (send(KILL, "h1", " -x h2 "), None),
    "kill -9 of h2's sshd session": (send(KILL, "h2", "sshd: "), None),
    "SIGTERM to both ranks": (both(TERM), 75),
    "kill -9 of both ranks": (both(KILL), None),
}
SAVED = [name for name in FAILURES if name.startswith(("SIG", "kill -9 of deepspeed"))]
EACH = [pytest.param(name, marks=[pytest.mark.long] * (i > 2)) for i, name in enumerate(FAILURES)]


@pytest.fixture(scope="module")
def cluster(raise_cluster) -> Cluster:
    return raise_cluster(2)


@pytest.fixture(scope="module")
def checkout(dataset, tmp_path_factory) -> Checkout:
    """One run for the tests of each failure: a start continues where the failure before it ended the run."""
    return Checkout(tmp_path_factory.mktemp("failures") / "two", dataset, 2)


@pytest.mark.parametrize("failure", EACH)
def test_after_a_failure_nothing_is_left_on_any_host(cluster, checkout, failure):
    fail, code = FAILURES[failure]
    program = checkout.start(cluster["h1"])
    program.until("| train/loss")
    fail(cluster)
    ended_with = program.end(60)
    assert not cluster.rest(60), program.output[-3000:]
    assert code in (None, ended_with), program.output[-3000:]
    assert cluster["h1"].run("python", "-c", "import socket; socket.create_server(('', 29500))")
    if failure in SAVED:
        assert newest(checkout.out_dir) == last_logged(checkout.out_dir / "metrics.jsonl"), program.output[-3000:]


def test_a_run_that_failed_again_and_again_ends_as_one_host_would(cluster, checkout, dataset, device, tmp_path):
    """fp32, the same global batch: sums are taken in another order, so losses may differ in their last digits."""
    before = newest(checkout.out_dir)
    steps = max(50, before + 5)
    checkout.until(steps)
    program = checkout.start(cluster["h1"])
    assert program.end() == 0, program.output
    assert ("resuming from runs/gpt2_124m/checkpoints/step_" in program.output) == (before > 0)
    alone = [f"megagpt.out_dir={tmp_path / 'one'}", f"megagpt.data.train.0.path={dataset}"]
    assert pretrain(["--deepspeed_config", str(checkout.run_file), *alone, f"megagpt.data.val={dataset}"]) == 0
    one, two = (metric(folder, "train/loss") for folder in (tmp_path / "one", checkout.out_dir))
    assert list(two) == list(range(1, steps + 1))
    compared = range(1, 51)
    assert [two[step] for step in compared] == pytest.approx([one[step] for step in compared], abs=1e-4)


@pytest.mark.long
def test_four_hosts_stop_early_together(raise_cluster, dataset, tmp_path):
    cluster = raise_cluster(4)
    checkout = Checkout(tmp_path / "four", dataset, 4)
    checkout.run["megagpt"]["every"]["eval"] = 5
    checkout.run["megagpt"]["early_stopping"] = {"patience": 2, "min_delta": 100.0}  # which no loss improves by
    checkout.until(1000)
    program = checkout.start(cluster["h1"])
    assert program.end() == 0, program.output
    assert newest(checkout.out_dir) == 15  # the first evaluation is the best, and two more were waited for
    assert not cluster.rest()


def newest(out_dir: Path) -> int:
    return max((int(folder.name.removeprefix("step_")) for folder in committed(out_dir)), default=0)


# --- what ranks find before they train ---------------------------------------------------------------------------


def host_that_is_down(cluster: Cluster, checkout: Checkout) -> None:
    cluster["h2"].power_off()


def name_with_a_typo(cluster: Cluster, checkout: Checkout) -> None:
    checkout.hosts("h1 slots=1\nhh2 slots=1\n")


def wrong_interface(cluster: Cluster, checkout: Checkout) -> None:
    """One that all hosts have, but that leads nowhere, as docker0 does."""
    settings(cluster).write_text(settings(cluster).read_text() + "GLOO_SOCKET_IFNAME=docker0\n")
    for host in cluster:
        host.run("ip", "link", "add", "docker0", "type", "veth", "peer", "name", "inside")
        host.run("ip", "addr", "add", f"172.17.{host.number}.1/24", "dev", "docker0")
        host.run("ip", "link", "set", "docker0", "up")


def missing_interface(cluster: Cluster, checkout: Checkout) -> None:
    settings(cluster).write_text(settings(cluster).read_text() + "GLOO_SOCKET_IFNAME=ib0\n")


def no_shared_files(cluster: Cluster, checkout: Checkout) -> None:
    (checkout.folder / "runs").mkdir()
    cluster["h2"].tmpfs(checkout.folder / "runs")


def other_data(cluster: Cluster, checkout: Checkout) -> None:
    other = build_dataset(checkout.folder / "other", seed=1)
    cluster["h2"].bind(other, (checkout.folder / "data" / "corpus").resolve())


def no_data(cluster: Cluster, checkout: Checkout) -> None:
    cluster["h2"].tmpfs((checkout.folder / "data" / "corpus").resolve())


def settings_in_the_working_folder(cluster: Cluster, checkout: Checkout) -> None:
    (checkout.folder / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")


FAULTS: list[tuple[Callable[[Cluster, Checkout], None], str]] = [
    (
        other_programs,
        r"sentencepiece is \S+ on h1, but 0.1.99 on h2; megagpt's code \(hash\) is \w+ on h1, but \w+ on h2",
    ),
    (host_that_is_down, r"rank 1 of h2 did not arrive within 15 s"),
    (name_with_a_typo, r"rank 1 of hh2 did not arrive within 15 s"),
    (
        name_that_leads_to_itself,
        r"cannot reach h2 at 127.0.1.1, .* write GLOO_SOCKET_IFNAME=eth0 and NCCL_SOCKET_IFNAME",
    ),
    (wrong_interface, r"cannot connect to h\d at 172.17.\d.1, where gloo listens .* GLOO_SOCKET_IFNAME=eth0"),
    (missing_interface, r"GLOO_SOCKET_IFNAME=ib0, but h\d has no such interface .* only lo, eth0"),
    (no_shared_files, r"megagpt.out_dir=runs/gpt2_124m is not shared: what h1 writes there is not seen on h2"),
    (other_data, r"data/corpus \(fingerprint\) is \w+ on h1, but \w+ on h2"),
    (no_data, r"data/corpus.* \(on rank 1, host h2\)"),
    (other_run_file, r"megagpt.schedule.max_steps is 100000 on h1, but 100001 on h2"),
    (taken_port, r"h1 cannot listen on port 29500"),
    (settings_in_the_working_folder, r"\.deepspeed_env: deepspeed pastes this file"),
]
MARKED = [
    pytest.param(*fault, id=fault[0].__name__, marks=[pytest.mark.long] * (i > 0)) for i, fault in enumerate(FAULTS)
]


@pytest.mark.parametrize(("plant", "complaint"), MARKED)
def test_what_is_wrong_with_a_host_is_said_once_with_its_name_within_a_minute(
    raise_cluster, dataset, tmp_path, plant, complaint
):
    cluster = raise_cluster(2)
    checkout = Checkout(tmp_path / "two", dataset, 2)
    settings(cluster).write_text("MEGAGPT_MEET_SECONDS=15\n")  # instead of 50
    plant(cluster, checkout)
    program = checkout.start(cluster["h1"])
    assert program.end(60) not in (0, 1), program.output
    errors = re.findall("error: (.*)", program.output)
    assert len(set(errors)) == (2 if plant is taken_port else 1), program.output  # there h2's rank knows no more
    assert re.search(complaint, errors[0])
    assert "Traceback" not in program.output
    assert not checkout.out_dir.exists()
    assert set(cluster.rest(1)) == ({"h1"} if plant is taken_port else set())
