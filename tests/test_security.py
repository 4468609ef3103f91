"""The promises of SECURITY.md: nothing that a file or a host name holds is run, and no secret is written."""

import ast
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from corrupt_files import DAMAGES
from deepspeed.runtime.zero.config import ZeroStageEnum
from packaging.requirements import Requirement
from packaging.version import Version
from support import DEBUG_RUN, PROGRAMS, ROOT, debug_run, environment, overrides

from megagpt.atomic_files import sha256_of
from megagpt.checkpoint.commit import COMMIT, _digest, best, committed, damage_of
from megagpt.checkpoint.load import load_model
from megagpt.cli.doctor.agent import Request, report
from megagpt.config.run_file import load_run_config
from megagpt.distributed.hostfile import check_environment, check_hosts, check_settings
from megagpt.engine.safe_pickle import check_pickles, load_checked
from megagpt.errors import UserError
from megagpt.train.trainer import train

SHORT = ["megagpt.schedule.max_steps=2", "megagpt.schedule.warmup_steps=0", "megagpt.data.val_tokens=256"]


class Gadget:
    """Unpickled, it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def sign_again(step_dir: Path) -> None:
    """The hashes of a step as somebody who changed its files would write them."""
    for manifest in step_dir.glob("manifest.*.json"):
        listed = {}
        for name in json.loads(manifest.read_text()):
            listed[name] = {"bytes": (step_dir / name).stat().st_size, "sha256": sha256_of(step_dir / name)}
        manifest.write_text(json.dumps(listed))
    record = json.loads((step_dir / COMMIT).read_text())
    del record["sha256"]
    record["manifests"] = [sha256_of(step_dir / f"manifest.{r}.json") for r in range(len(record["manifests"]))]
    (step_dir / COMMIT).write_text(json.dumps(record | {"sha256": _digest(record)}))


@pytest.fixture(scope="module")
def options(dataset):
    return [*SHORT, "zero_optimization.stage=1"]


@pytest.fixture
def run(dataset, device, tmp_path, options):
    train(debug_run(dataset, tmp_path / "run", *options), device, fresh=False)
    return tmp_path / "run"


# --- checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_program_in_a_checkpoint_is_refused_by_name_and_not_run(run, dataset, device, tmp_path, options, legacy):
    """First as found, then signed again, then in a file that no manifest lists but DeepSpeed would find by its name."""
    step_dir, made = committed(run)[-1], tmp_path / "made"
    file = next(step_dir.glob("*model_states.pt"))
    whole = file.read_bytes()
    content = torch.load(file, weights_only=False)  # which this test itself has just saved
    content["more"] = Gadget(made)
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=rf"{file.name} is damaged"):
        load_model(step_dir, device)
    sign_again(step_dir)
    named = "was not written by this torch" if legacy else r"would call posix\.mkdir"
    with pytest.raises(UserError, match=rf"{file.name} {named}"):
        load_model(step_dir, device)
    further = [*options, "megagpt.schedule.max_steps=3"]
    with pytest.raises(UserError, match=rf"{file.name} {named}"):
        train(debug_run(dataset, run, *further), device, fresh=False)
    file.rename(step_dir / "zero_pp_rank_9_mp_rank_00_optim_states.pt")
    file.write_bytes(whole)
    sign_again(step_dir)
    with pytest.raises(UserError, match=rf"zero_pp_rank_9_mp_rank_00_optim_states.pt {named}"):
        load_model(step_dir, device)
    assert not made.exists()


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (b"cposix\nsystem\n(S'true'\ntR.", "posix.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "STACK_GLOBAL"),
        (b"(S'true'\niposix\nsystem\n.", "INST"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"ctorch.storage\n_load_from_bytes\n.", "torch.storage._load_from_bytes"),  # a pickle in a pickle
        (b"cbuiltins\ngetattr\n.", "builtins.getattr"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"),
        (b"\x80\x02}q\x00", "was not written by this torch"),  # cut off
    ],
)
def test_every_way_a_pickle_can_import_is_seen(tmp_path, program, named):
    file = tmp_path / "a.pt"
    writer = torch._C.PyTorchFileWriter(str(file))
    writer.write_record("data.pkl", program, len(program))
    writer.write_end_of_file()
    with pytest.raises(UserError, match=named):
        load_checked(file)


@pytest.mark.process
@pytest.mark.parametrize("n", [150, pytest.param(2000, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["checkpoints", "tokenizer"])
def test_no_damaged_file_is_taken_for_a_whole_one_and_none_ends_the_process(run, dataset, tmp_path, kind, n):
    """In a process of its own, which a parser's crash would end. test_build.py does it to datasets."""
    whole = run
    if kind == "tokenizer":
        whole = tmp_path / "tokenizer"
        whole.mkdir()
        shutil.copy(dataset / "tokenizer.model", whole)
    else:  # only what a resume reads
        (run / "metrics.jsonl").unlink()
        (run / "run.json").unlink()
    command = [sys.executable, PROGRAMS / "corrupt_files.py", kind, whole, tmp_path / "scratch", n, 1]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"damages": n, "accepted": 0}


def test_a_manifest_and_a_hint_lead_nowhere_else(run, tmp_path):
    step_dir = committed(run)[-1]
    (tmp_path / "secret").write_text("outside")
    listing = step_dir / "manifest.0.json"
    listed = json.loads(listing.read_text())
    link = step_dir / "link"
    link.symlink_to(tmp_path / "secret")
    for name in ("../../../secret", str(tmp_path / "secret"), "link"):
        listing.write_text(json.dumps(listed | {name: {"bytes": 7, "sha256": hashlib.sha256(b"outside").hexdigest()}}))
        sign_again(step_dir)
        assert damage_of(step_dir, 0) == f"{listing} names {name!r}, which leads out of its folder"
    other = tmp_path / "other" / "checkpoints" / step_dir.name
    other.parent.mkdir(parents=True)
    step_dir.rename(other)
    for hint in (f"../../other/checkpoints/{step_dir.name}", str(other), "\udcff"):
        (run / "checkpoints/best").write_bytes(hint.encode(errors="surrogateescape"))
        assert best(run) is None


def test_a_checkpoint_of_an_older_python_is_accepted_too(dataset, device, tmp_path, monkeypatch):
    """Up to 3.11.3 a member of an enum is pickled as a call of getattr."""
    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    train(debug_run(dataset, tmp_path / "run"), device, stop_at=1)
    check_pickles(sorted(committed(tmp_path / "run")[-1].glob("*.pt")))


def test_what_a_checkpoint_in_fp16_holds_is_known(tmp_path):
    """With a static scale and with a dynamic one."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    scalers = [LossScaler(scale=8.0), DynamicLossScaler(2.0**16, 2.0, 1000, 1.0, 2, False, dtype=torch.float16)]
    torch.save({"loss_scaler": scalers}, tmp_path / "a.pt")
    check_pickles([tmp_path / "a.pt"])


def test_our_own_state_is_json(run):
    step_dir = committed(run)[-1]
    ours = {path.name for path in step_dir.iterdir() if path.suffix != ".pt"} - {"tokenizer.model"}
    assert ours == {COMMIT, "manifest.0.json", "rng.0.json", "run.json"}
    for name in ours:
        assert isinstance(json.loads((step_dir / name).read_bytes()), dict)


# --- hosts, secrets, code --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "-oProxyCommand=touch${IFS}x slots=1",
        "a;touch slots=1",
        "$(id) slots=1",
        "node1 slots=x",
        "node1",
        "n1- slots=1",
    ],
)
def test_a_host_that_ssh_or_a_shell_would_run_is_refused(tmp_path, line):
    hosts = tmp_path / "hosts"
    hosts.write_text(f"# ours\nnode1 slots=8\n10.0.0.2 slots=8\n{line}\n")
    with pytest.raises(UserError, match=f"{hosts}, line 4: "):
        check_hosts(hosts)


def test_the_example_of_a_hostfile_is_accepted():
    check_hosts(ROOT / "launch" / "hostfile.example")


@pytest.mark.parametrize(
    ("line", "accepted"),
    [
        ("NCCL_SOCKET_IFNAME=eth0", True),
        ("NCCL_IB_HCA=^mlx5_3:1,mlx5_4", True),
        ("A=$(touch x)", False),
        ("A=1;touch x", False),
        ("A=`id`", False),
        ("no value", False),
        ("HF_TOKEN=hf_abc", False),
        ("WANDB_API_KEY=1", False),
    ],
)
def test_only_plain_settings_are_sent_to_other_hosts(tmp_path, line, accepted):
    file = tmp_path / ".deepspeed_env"
    file.write_text(line + "\n")
    if accepted:
        check_settings(file)
    else:
        with pytest.raises(UserError, match="line 1"):
            check_settings(file)


def test_settings_for_other_hosts_are_taken_from_the_home_folder_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("NCCL_SOCKET_IFNAME=eth0\n")
    check_environment(tmp_path)
    (tmp_path / "work").mkdir()
    check_environment(tmp_path / "work")
    (tmp_path / "work" / ".deepspeed_env").write_text("NCCL_SOCKET_IFNAME=eth0\n")
    with pytest.raises(UserError, match="move the lines that you need to"):
        check_environment(tmp_path / "work")


@pytest.mark.process  # the report asks for the driver of GPUs
def test_a_user_without_a_home_folder_is_no_error(tmp_path, monkeypatch):
    """As in a container that was started with a bare user id: HOME is unset, and no entry says where it would be."""

    def no_entry(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    with pytest.raises(RuntimeError):
        Path.home()
    monkeypatch.chdir(tmp_path)
    check_environment(tmp_path)
    report(Request("h1", [], 1, 0, run_file="", overrides=[], mark=""))
    (tmp_path / ".deepspeed_env").write_text("NCCL_SOCKET_IFNAME=eth0\n")
    with pytest.raises(UserError, match=r"move the lines that you need to ~/\.deepspeed_env"):
        check_environment(tmp_path)


@pytest.mark.process
def test_a_secret_of_the_environment_is_written_nowhere(dataset, tmp_path, options):
    secrets = {name: f"planted-{name}" for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}
    command = [sys.executable, ROOT / "launch/pretrain.py", "--deepspeed_config", DEBUG_RUN]
    command += overrides(dataset, tmp_path / "run", *options)
    env = environment() | secrets
    done = subprocess.run([*map(str, command)], env=env, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    written = [done.stdout, done.stderr, *(path.read_bytes() for path in files)]
    assert not any(b"planted-" in content for content in written)


@pytest.mark.parametrize("section", ["comet", "wandb"])
def test_a_secret_in_a_run_file_is_refused_without_being_repeated(dataset, tmp_path, section):
    with pytest.raises(UserError, match=f"{section.upper()}_API_KEY") as refused:
        debug_run(dataset, tmp_path, f"{section}.api_key=planted")
    assert "planted" not in str(refused.value)


FORBIDDEN = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pickle.load", "pickle.loads"}
FORBIDDEN |= {"marshal.loads", "shelve.open", "joblib.load", "torch.jit.load", "subprocess.getoutput"}
PROJECT = sorted(path for part in ("megagpt", "data_tools", "launch") for path in (ROOT / part).rglob("*.py"))


def unsafe(source: str) -> list[str]:
    """What a file calls that could run a program which somebody else wrote, or listens to everybody."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in ("0.0.0.0", "::"):
            found.append(f"listens on {node.value}")
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in FORBIDDEN or given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
            found.append(name)
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append(name)
    return found


@pytest.mark.parametrize(
    "source",
    ["eval(x)", "os.system(x)", "run(x, shell=True)", "np.load(x, allow_pickle=True)", "torch.load(x)", "f('0.0.0.0')"],
)
def test_unsafe_code_is_found(source):
    assert unsafe(source)


def test_no_file_of_the_project_is_unsafe():
    found = {str(path.relative_to(ROOT)): unsafe(path.read_text()) for path in PROJECT}
    found = {name: calls for name, calls in found.items() if calls}
    assert found == {"megagpt/engine/safe_pickle.py": ["torch.load"]}  # in load_checked


LISTENING = re.compile(
    r"\b(bind|listen|\w+_server|\w+Server|TCPStore|\w+\.init_process_group|LocalCluster|SLURMCluster)$"
)
LISTENERS = {
    ("data_tools/executor/dask_cluster.py", "LocalCluster"): "on 127.0.0.1",
    ("data_tools/executor/dask_cluster.py", "SLURMCluster"): "its workers are batch jobs on other hosts",
    ("megagpt/distributed/process_group.py", "dist.init_process_group"): "ranks on other hosts",
    ("megagpt/cli/doctor/agent.py", "attempt.bind"): "it does not listen",
    ("megagpt/distributed/interfaces.py", "probe.bind"): "it does not listen",
    ("megagpt/cli/spawn_ranks.py", "probe.bind"): "it does not listen",
    ("megagpt/distributed/interfaces.py", "socket.create_server"): "where gloo will listen, until the ranks have met",
    ("megagpt/distributed/meeting.py", "dist.TCPStore"): "ranks on other hosts",
}


def listeners(source: str) -> list[str]:
    called = (ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [name for name in called if LISTENING.search(name)]


@pytest.mark.parametrize("source", ["s.bind(x)", "asyncio.start_server(f)", "HTTPServer(x)", "dist.TCPStore(x)"])
def test_a_call_that_listens_is_found(source):
    assert listeners(source)


def test_nothing_listens_but_what_is_listed():
    found = [(str(path.relative_to(ROOT)), name) for path in PROJECT for name in listeners(path.read_text())]
    assert set(found) == set(LISTENERS)


@pytest.mark.process
def test_a_port_that_is_taken_on_one_address_is_found_without_listening_on_any():
    with socket.create_server(("127.0.0.1", 0)) as server:
        request = Request("h1", [], 1, server.getsockname()[1], run_file="", overrides=[], mark="")
        assert "port" in {finding.check for finding in report(request).findings}
    assert "port" not in {finding.check for finding in report(request).findings}


def test_dependency_floors_lie_at_or_above_the_fixes():
    """Those that SECURITY.md names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    floors = {name: Version(one.version) for name, all_ in needed.items() for one in all_ if one.operator == ">="}
    fixes = re.findall(r"CVE-\d+-\d+ \((\w+) ([\d.]+)\)", (ROOT / "SECURITY.md").read_text())
    assert {name for name, _ in fixes} == {"deepspeed", "pyarrow", "sentencepiece", "torch"}
    assert all(floors[name] >= Version(fixed) for name, fixed in fixes)


@pytest.mark.parametrize("n", [60, pytest.param(2000, marks=pytest.mark.long)])
def test_a_damaged_run_file_is_a_run_file_or_one_message(tmp_path, n):
    """A changed digit may make another valid run file: it carries no hash. Nothing but a UserError may come out."""
    rng, original, file = random.Random(1), DEBUG_RUN.read_bytes(), tmp_path / "run.json"
    refused = 0
    for _ in range(n):
        content = bytearray(original)
        rng.choice(DAMAGES)(content, rng)
        file.write_bytes(content)
        try:
            load_run_config(file)
        except UserError:
            refused += 1
    assert refused > n / 2
