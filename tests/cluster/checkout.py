"""What all hosts of a lab see of a checkout, and ways to make one host see it otherwise."""

import json
import os
import re
import shutil
from importlib.metadata import distribution
from pathlib import Path

from hosts import Cluster, Host, Program
from support import ROOT


class Checkout:
    """What all hosts see: launch/, data, a hostfile, and the README's run file, cut to what two cores can train."""

    def __init__(self, folder: Path, dataset: Path, n_hosts: int) -> None:
        self.folder = folder
        (folder / "ds_configs").mkdir(parents=True)
        (folder / "data").mkdir()
        (folder / "launch").symlink_to(ROOT / "launch")
        (folder / "data" / "corpus").symlink_to(dataset)
        self.hosts("".join(f"h{n} slots=1\n" for n in range(1, n_hosts + 1)))
        self.out_dir, self.run_file = folder / "runs" / "gpt2_124m", folder / "ds_configs" / "gpt2_124m.json"
        run = json.loads((ROOT / "ds_configs" / "gpt2_124m.json").read_text())
        run |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": False}}
        run["megagpt"]["model"] = {"n_layer": 2, "n_head": 2, "n_embd": 64, "seq_len": 64}
        run["megagpt"]["data"]["val_tokens"] = 2048
        run["megagpt"]["schedule"] |= {"warmup_steps": 4, "shape": "constant"}
        run["megagpt"]["every"] = {"log": 1, "eval": 0, "save": 2, "sample": 0}
        run["megagpt"]["guards"] = {"hang_timeout": 8}
        self.run = run
        self.until(100_000)

    def hosts(self, text: str) -> None:
        (self.folder / "hosts").write_text(text)

    def until(self, step: int) -> None:
        self.run["megagpt"]["schedule"]["max_steps"] = step
        self.run_file.write_text(json.dumps(self.run))

    def start(self, host: Host) -> Program:
        """The README's command."""
        command = r"^deepspeed --hostfile hosts [^#\n]+"
        [line] = re.findall(command, (ROOT / "README.md").read_text(), re.MULTILINE)
        return host.start(*line.split(), cwd=self.folder)


def settings(cluster: Cluster) -> Path:
    return cluster.folder / "home" / ".deepspeed_env"


def name_that_leads_to_itself(cluster: Cluster, checkout: Checkout, host: str = "h2") -> Path:
    """As Debian's installer writes it; the file that is now the host's /etc/hosts."""
    own, names = cluster[host], (cluster.folder / "hosts").read_text()
    file = checkout.folder / "etc_hosts"
    file.write_text(names.replace(f"{own.address} {host}", f"127.0.1.1 {host}"))
    own.bind(file, Path("/etc/hosts"))
    return file


def other_programs(cluster: Cluster, checkout: Checkout) -> None:
    """h2 has a line more in its code, and another sentencepiece."""
    code = Path(shutil.copytree(ROOT / "megagpt", checkout.folder / "other_code"))
    with (code / "model" / "loss.py").open("r+") as file:  # which must be there
        file.seek(0, os.SEEK_END)
        file.write("# a line more\n")
    cluster["h2"].bind(code, ROOT / "megagpt")
    files = distribution("sentencepiece").files
    assert files is not None
    metadata = Path(str(next(file.locate() for file in files if file.name == "METADATA")))
    other = checkout.folder / "METADATA"
    other.write_text(re.sub(r"^Version: .*$", "Version: 0.1.99", metadata.read_text(), flags=re.MULTILINE))
    cluster["h2"].bind(other, metadata)


def other_run_file(cluster: Cluster, checkout: Checkout, host: str = "h2") -> None:
    other = checkout.folder / "other.json"
    other.write_text(checkout.run_file.read_text().replace("100000", "100001"))
    cluster[host].bind(other, checkout.run_file)


def taken_port(cluster: Cluster, checkout: Checkout) -> None:
    code = "import socket; s = socket.create_server(('', 29500)); print('taken', flush=True)\nwhile True: s.accept()"
    cluster["h1"].start("python", "-c", code).until("taken")
