"""`megagpt doctor`: it finds what is wrong with which host, and nothing where nothing is."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from checkout import Checkout, name_that_leads_to_itself, other_programs, other_run_file, settings, taken_port
from hosts import Cluster, Host

from megagpt.__main__ import main

SECONDS = 30.0  # for four hosts

PLANTED = [  # (hosts, check, what is said): of five hosts, of which two do not answer
    ("", "pdsh", r"not found here, .*; apt-get install pdsh"),
    ("", ".deepspeed_env", r"pastes this file.* move the lines that you need to"),
    ("", "environment", r"NCCL_DEBUG=INFO set only here: .* --write-env"),
    ("h1", "port", r"port 29500, where ranks would meet, is taken by python, process \d+; end it"),
    ("h1, h2", "disk", r"100002 checkpoints of .* are free; make room"),
    ("h1, h2, h3, h4, h5", "ssh", r"for hours .* write `ServerAliveInterval 15` into ~/.ssh/config"),
    ("h2", "clock", r"its clock is 7,\d\d\d s behind this machine's; run an NTP service"),
    ("h2", "slots", r"slots=4000 in the hostfile, but it has \d+ cores; set slots="),
    ("", "programs", r"sentencepiece is \S+ on h1, but 0.1.99 on h2; use the same"),
    ("", "programs", r"megagpt's code \(hash\) is \w+ on h1, but \w+ on h2; use the same"),
    ("", "data", r"data/corpus \(fingerprint\) is \w+ on h1, but \w+ on h2; let all hosts see the same"),
    ("", "run", r"megagpt.schedule.max_steps is 100000 on h1, but 100001 on h3; let all hosts see one run file"),
    ("", "machine", r"compiler is \S.* on h1, but none on h3; install the same"),
    ("h3", "compiler", r"no c\+\+, .* apt-get install g\+\+"),
    ("h3", "compile lock", r"fused_adam/lock is \d+.\d h old: .* rm /\S+lock$"),
    ("h3", "out_dir", r"runs/gpt2_124m is not shared"),
    ("h3", "interface", r"gloo would take 127.0.1.1, which no other host reaches; write GLOO_SOCKET_IFNAME=eth0"),
    ("h3", "names", r"the name h5 does not resolve"),
    ("h4", "ssh", r"ssh: connect to host h4 .* `ssh h4 true` must work"),
    ("h5", "ssh", r"Permission denied .* `ssh h5 true` must work"),
]


def doctor(host: Host, checkout: Checkout, *more: str, env: dict[str, str] | None = None) -> dict:
    command = ["python", "-m", "megagpt", "doctor", "--hostfile", "hosts", "--json", "ds_configs/gpt2_124m.json", *more]
    began = time.monotonic()
    done = host.run(*command, cwd=checkout.folder, env=env, check=False)
    took = time.monotonic() - began
    assert took < SECONDS, f"{took:.0f} s:\n{done.stdout}{done.stderr}"
    assert done.returncode in (0, 2), done.stderr
    found = json.loads(done.stdout)
    assert done.returncode == (2 if found["findings"] else 0)
    return found


def mkdir(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def test_nothing_is_said_of_a_healthy_cluster_and_every_planted_fault_is_found_with_its_host(
    raise_cluster, dataset, tmp_path
):
    cluster: Cluster = raise_cluster(5)
    checkout = Checkout(tmp_path / "five", dataset, 4)
    healthy = doctor(cluster["h1"], checkout, "--write-env")
    assert healthy["findings"] == []
    assert set(healthy["hosts"]) == {"h1", "h2", "h3", "h4"}
    assert healthy["all_reduce_gb_per_s"] > 0.01
    assert {"GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0"} < set(settings(cluster).read_text().splitlines())
    assert not cluster.rest(5)
    assert not list(checkout.folder.glob("**/.megagpt*"))

    lines = [line for line in settings(cluster).read_text().splitlines() if "IFNAME" not in line]
    settings(cluster).write_text("\n".join([*lines, ""]))
    plant(cluster, checkout)
    found = doctor(cluster["h1"], checkout, "megagpt.keep.last=100000", env={"NCCL_DEBUG": "INFO"})
    said = [(finding["host"], finding["check"], finding["text"]) for finding in found["findings"]]
    for host, check, text in PLANTED:
        assert [one for one in said if one[:2] == (host, check) and re.search(text, one[2])], f"{text}, of:\n{said}"
    assert len(said) == len(PLANTED) >= 15, said
    assert found["all_reduce_gb_per_s"] is None


def plant(cluster: Cluster, checkout: Checkout) -> None:
    h1, h2, h3, h4, h5 = cluster
    checkout.hosts("h1 slots=1\nh2 slots=4000\nh3 slots=1\nh4 slots=1\nh5 slots=1\n")
    h1.bind(Path("/dev/null"), Path(shutil.which("pdsh")).resolve())
    (checkout.folder / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    impatient = (cluster.folder / "ssh_config").read_text().replace("ServerAliveInterval 3", "")
    (checkout.folder / "ssh_config").write_text(impatient)
    h1.bind(checkout.folder / "ssh_config", Path("/etc/ssh/ssh_config"))
    taken_port(cluster, checkout)

    cluster.clocks["h2"] = "-2h"
    h2.power_off()
    cluster.power_on(2)
    other_programs(cluster, checkout)
    cluster["h2"].bind(dataset_of(checkout).parent / "noise", dataset_of(checkout))

    other_run_file(cluster, checkout, "h3")
    h3.bind(Path("/dev/null"), Path(shutil.which("c++")).resolve())
    lock = mkdir(checkout.folder / "extensions" / "fused_adam") / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 9000, time.time() - 9000))
    h3.bind(checkout.folder / "extensions", Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    mkdir(checkout.folder / "runs")
    h3.tmpfs(checkout.folder / "runs")
    names = name_that_leads_to_itself(cluster, checkout, "h3")
    names.write_text(names.read_text().replace("10.99.0.5 h5\n", ""))

    h4.power_off()
    (checkout.folder / "no_keys").touch()
    h5.bind(checkout.folder / "no_keys", cluster.folder / "user_key.pub")


def dataset_of(checkout: Checkout) -> Path:
    return (checkout.folder / "data" / "corpus").resolve()


@pytest.mark.long
def test_a_slow_network_is_found(raise_cluster, dataset, tmp_path):
    cluster = raise_cluster(2)
    checkout = Checkout(tmp_path / "two", dataset, 2)
    limit = ["tbf", "rate", "20mbit", "burst", "32kbit", "latency", "400ms"]
    cluster["h2"].run("tc", "qdisc", "add", "dev", "eth0", "root", *limit)
    found = doctor(cluster["h1"], checkout, "--write-env")
    [finding] = found["findings"]
    assert finding["check"] == "all-reduce"
    assert re.fullmatch(r"only 0.00\d\d GB/s from each host; look for a slow link, .*", finding["text"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "the hostfile hosts cannot be read"),
        ("h1 slots=1\nh2 slot=1\n", "hosts, line 2: 'h2 slot=1' is not `NAME slots=N`"),
        ("h1 slots=1\nh1 slots=1\n", "hosts, line 2: 'h1 slots=1' names a host again"),
        ("h1 slots=0\n", "hosts, line 1: 'h1 slots=0' is not `NAME slots=N`"),
        ("# none yet\n", "the hostfile hosts names no host"),
    ],
)
def test_a_wrong_hostfile_is_one_line_before_any_host_is_asked(tmp_path, monkeypatch, capsys, text, complaint):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("hosts").write_text(text)
    assert main(["doctor", "--hostfile", "hosts"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {complaint}")
    assert printed.count("\n") == 1
