"""The programs as people start them: real processes, real signals, exit codes, and what they print."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from support import DEBUG_RUN, PROGRAMS, ROOT, debug_run, environment, free_port, metric, overrides, torchrun

from megagpt.__main__ import main
from megagpt.checkpoint.commit import committed
from megagpt.checkpoint.run_samples import open_run
from megagpt.cli.pretrain import pretrain
from megagpt.data.dataset import open_dataset
from megagpt.distributed import launcher
from megagpt.train.trainer import train

PRETRAIN = ROOT / "launch" / "pretrain.py"
ORPHANED = PROGRAMS / "orphaned_rank.py"


def arguments(dataset, out_dir, *more):
    return ["--deepspeed_config", str(DEBUG_RUN), *overrides(dataset, out_dir, *more)]


def start(command, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment() | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75_and_the_same_command_finishes(dataset, tmp_path, number):
    command = [sys.executable, PRETRAIN, *arguments(dataset, tmp_path / "run", "megagpt.every.save=0")]
    process = start([*command, "megagpt.schedule.max_steps=100000"])
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert f"({number.name}) and saved" in out
    assert err.count("Ctrl-C: stopping at the next step") == (number == signal.SIGINT)
    [step_dir] = committed(tmp_path / "run")
    stopped_at = int(step_dir.name.removeprefix("step_"))

    process = start([*command, f"megagpt.schedule.max_steps={stopped_at + 2}"])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"resuming from {step_dir}" in out
    assert list(metric(tmp_path / "run", "train/loss"))[-1] == stopped_at + 2


@pytest.mark.process
def test_a_run_whose_reader_is_gone_trains_to_its_end(dataset, tmp_path):
    """Such a reader is pdsh, or the terminal of a closed ssh session."""
    process = start([sys.executable, PRETRAIN, *arguments(dataset, tmp_path / "run")])
    assert process.stdout is not None
    assert process.stderr is not None
    assert any(line.startswith("step") for line in process.stdout)
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(120) == 0, errors
    assert list(metric(tmp_path / "run", "train/loss"))[-1] == 20


def killed_launcher(program: list, dataset, out_dir, until: str) -> str:
    """Kill torchrun at the first line that begins with `until`; the rank must end. Returns what it wrote to stderr."""
    options = ["megagpt.schedule.max_steps=100000", "megagpt.every.save=0", "megagpt.guards.hang_timeout=0"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    launcher = start([*torchrun, *program, *arguments(dataset, out_dir, *options)])
    assert launcher.stdout is not None
    for line in launcher.stdout:
        if line.startswith(until):
            break
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for rank in alive:
        rank.kill()
    assert not alive
    return launcher.communicate()[1]


@pytest.mark.process
def test_ranks_whose_launcher_was_killed_save_and_end(dataset, tmp_path):
    killed_launcher([PRETRAIN], dataset, tmp_path / "run", "step")
    assert committed(tmp_path / "run")


@pytest.mark.process
@pytest.mark.parametrize("what", ["the first step", "evaluating"])
def test_a_rank_that_reaches_no_boundary_ends_soon_after_its_launcher(dataset, tmp_path, what):
    """The timeout for hangs does not apply there."""
    errors = killed_launcher([ORPHANED, what], dataset, tmp_path / "run", "waiting")
    assert "s after its launcher died and is stopped" in errors
    assert "orphaned_rank.py" in (tmp_path / "run/stacks.0.txt").read_text()
    assert not committed(tmp_path / "run")


@pytest.mark.process
def test_a_save_that_a_dead_launcher_led_to_is_not_cut_short(dataset, tmp_path):
    """It takes several times as long as a rank may otherwise outlive its launcher."""
    errors = killed_launcher([ORPHANED, "the last save"], dataset, tmp_path / "run", "step")
    assert "is stopped" not in errors
    assert committed(tmp_path / "run"), errors


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_ranks_whose_deepspeed_command_was_ended_save_and_end(dataset, tmp_path, number):
    """`deepspeed` dies and its lower half, launch.py, lives on with the ranks; Ctrl-C reaches all of them at once."""
    # No evaluation: the step after it may be the best so far, and saved, before the command is ended.
    options = ["megagpt.schedule.max_steps=100000", "megagpt.every.save=0", "megagpt.every.eval=0"]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    launch = [deepspeed, "--num_gpus", "1", "--master_port", free_port(), PRETRAIN]
    command = start([*launch, *arguments(dataset, tmp_path / "run", *options)])
    assert command.stdout is not None
    for line in command.stdout:
        if line.startswith("step"):
            break
    below = psutil.Process(command.pid).children(recursive=True)
    for process in (psutil.Process(command.pid), *(below if number == signal.SIGINT else ())):
        process.send_signal(number)
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive
    assert len(committed(tmp_path / "run")) == 1
    command.communicate()


@pytest.mark.process
def test_a_run_that_a_person_started_outlives_its_shell(dataset, tmp_path):
    """The shell ends when it has seen the first step; the run continues to its end."""
    out, steps = tmp_path / "out", "megagpt.schedule.max_steps=400"
    train = shlex.join(map(str, [sys.executable, PRETRAIN, *arguments(dataset, tmp_path / "run", steps)]))
    shell = start(["bash", "-c", f"touch {out}; {train} >{out} 2>&1 & echo $!; tail -f {out} | grep -q -m 1 ^step"])
    pid, _ = shell.communicate(timeout=120)
    assert "finished" not in out.read_text()
    psutil.wait_procs([psutil.Process(int(pid))], timeout=120)
    assert "finished at step 400" in out.read_text()


def test_a_stop_waits_for_the_write_in_flight_and_for_its_own(monkeypatch):
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert launcher.grace_warning(2.0, 14.0) == launcher.grace_warning(30.0, 0.0) == ""
    for waited, wrote in ((2.0, 14.5), (31.0, 0.0)):
        warning = launcher.grace_warning(waited, wrote)
        assert warning.startswith("a save takes up to 31 s at a stop, and a launcher that is told to stop kills its ")


@pytest.mark.parametrize("save_async", ["false", "true"])
def test_a_save_that_outlasts_a_launchers_patience_is_announced_once(
    dataset, device, tmp_path, monkeypatch, capsys, save_async
):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.0)
    often = ["megagpt.schedule.max_steps=6", "megagpt.every.save=2", f"megagpt.save_async={save_async}"]
    assert pretrain(arguments(dataset, tmp_path / "alone", *often)) == 0
    assert "a save takes" not in capsys.readouterr().out
    monkeypatch.setenv("CROSS_SIZE", "1")
    assert pretrain(arguments(dataset, tmp_path / "run", *often)) == 0
    assert capsys.readouterr().out.count("kills its ranks after 0 s: the run would fall back") == 1


def test_a_time_limit_saves_and_exits_75(dataset, device, tmp_path, capsys):
    limits = ["megagpt.schedule.max_steps=100000", "megagpt.time_limit_minutes=0.01"]
    assert pretrain(arguments(dataset, tmp_path / "run", *limits)) == 75
    assert "(time limit) and saved" in capsys.readouterr().out
    assert committed(tmp_path / "run")


@pytest.mark.process
def test_the_deepspeed_launcher_trains_on_two_ranks(dataset, tmp_path):
    deepspeed = Path(sys.executable).with_name("deepspeed")
    launch = [deepspeed, "--num_gpus", "2", "--master_port", free_port(), PRETRAIN]
    done = start([*launch, *arguments(dataset, tmp_path / "run")])
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    assert "accumulation 1 x 2 ranks" in out
    assert "finished at step 20" in out
    assert out.count("step 20/20 | train/loss") == 1
    assert not list(Path(os.environ["TORCH_EXTENSIONS_DIR"]).iterdir())  # nothing was compiled on the way


@pytest.mark.process
def test_a_terminal_that_lacks_a_bars_letter_gets_another(dataset, tmp_path):
    """The bars of the validation curve, on a terminal that shows ASCII alone."""
    command = [sys.executable, PRETRAIN, *arguments(dataset, tmp_path / "run", "megagpt.schedule.max_steps=5")]
    command += ["megagpt.every.eval=2"]
    process = start(command, PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert re.search(r"\d #+\n", out.partition("step val/loss")[2])


@pytest.mark.process
def test_a_hostfile_is_utf_8_whatever_the_locale(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_bytes("# Knoten f\u00fcr sp\u00e4ter\nnode1 slots=8\n".encode())
    process = start([sys.executable, "-m", "megagpt", "check-hosts", hosts], LC_ALL="C", PYTHONUTF8="0")  # ASCII
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


@pytest.mark.process
def test_a_hostfile_that_does_not_exist_is_no_silent_single_node_run(dataset, tmp_path):
    deepspeed = Path(sys.executable).with_name("deepspeed")
    launch = [deepspeed, "--hostfile", tmp_path / "hosts", "--master_port", free_port(), PRETRAIN]
    process = start([*launch, *arguments(dataset, tmp_path / "run")])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert err.count(f"error: --hostfile {tmp_path / 'hosts'} does not exist") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_srun_starts_ranks_by_slurms_variables(dataset, tmp_path):
    port = str(free_port())
    ranks = [
        start(
            [sys.executable, PRETRAIN, *arguments(dataset, tmp_path / "run", "megagpt.schedule.max_steps=4")],
            SLURM_PROCID=str(r),
            SLURM_STEP_NUM_TASKS="2",
            SLURM_LOCALID=str(r),
            SLURM_STEP_TASKS_PER_NODE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for r in range(2)
    ]
    results = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], results
    assert "x 2 ranks" in results[0][0]
    assert "step" not in results[1][0]


@pytest.mark.process
def test_a_mistake_is_printed_once_for_all_ranks_without_a_traceback(dataset, tmp_path):
    done = torchrun(2, PRETRAIN, *arguments(dataset, tmp_path / "run", "megagpt.model.n_layers=3"))
    assert done.returncode != 0
    # torchrun adds a report of its own about its child.
    ours = done.stderr.split("torch/distributed/elastic")[0]
    assert ours.count("error: ") == 1
    assert "Traceback" not in ours
    assert "did you mean 'megagpt.model.n_layer'?" in ours
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_every_rank_ends_with_2_and_none_is_aborted_by_a_thread_of_its_process_group(dataset, tmp_path):
    """With Debian 12's Python 3.11.2 one rank in two was, when the process group was not left before the end."""
    command = [sys.executable, PRETRAIN, *arguments(dataset, tmp_path / "run", "megagpt.data.val=nowhere")]
    ranks = []
    for _ in range(3):
        port = str(free_port())
        meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks += [start(command, RANK=str(n), LOCAL_RANK=str(n), **meeting) for n in range(2)]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2] * 6, said


@pytest.mark.parametrize(
    ("mistakes", "complaint"),
    [
        (["megagpt.data.val=nowhere"], "nowhere"),
        (["gradient_cliping=1"], "did you mean 'gradient_clipping'?"),
        (["train_batch_size=7"], "set train_batch_size to 8"),
        (["megagpt.model.seq_len=1000000"], "lower megagpt.model.seq_len to"),
        (["megagpt.data.val_tokens=100000000"], "too little validation data"),
        (
            ["zero_optimization.overlap_com=true"],
            "did you mean 'zero_optimization.overlap_comm'?",
        ),
        (["fp16.enabled=true"], "fp16 is not supported on your device"),
        (["bf16.enabled=true", "fp16.enabled=true"], "fp16.enabled=true with bf16.enabled=true; choose one"),
        (["activation_checkpointing.cpu_checkpointing=true"], "has no effect without"),
    ],
)
def test_a_mistake_ends_with_2_and_one_line_and_leaves_nothing(
    dataset, device, supports_fp16, tmp_path, capsys, mistakes, complaint
):
    supports_fp16(False)  # one of the mistakes is to ask for it
    assert pretrain(arguments(dataset, tmp_path / "run", *mistakes)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert complaint in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_where_the_device_supports_fp16_training_and_a_resume_are_those_of_fp32(
    dataset, device, supports_fp16, tmp_path, stage
):
    """Within the 10 bits that fp16 keeps of losses around 5: 2^-8 in each; some processors compute it in fp32."""
    supports_fp16(True)
    for dtype, name in (("fp16", "cut"), ("fp16", "straight"), ("fp32", "fp32")):
        options = [f"zero_optimization.stage={stage}", f"fp16.enabled={json.dumps(dtype == 'fp16')}"]
        options += ["megagpt.every.eval=0", "megagpt.every.save=3", "megagpt.schedule.max_steps=6"]
        run = debug_run(dataset, tmp_path / name, *options)
        if name == "cut":
            train(run, device, stop_at=3)
        assert pretrain(arguments(dataset, tmp_path / name, *options)) == 0
    cut, straight, exact = (metric(tmp_path / name, "train/loss") for name in ("cut", "straight", "fp32"))
    assert cut == straight
    assert straight == pytest.approx(exact, abs=2**-8)
    assert straight[6] < straight[1] - 0.5


@pytest.mark.process
def test_a_sample_report_says_what_training_would_draw_and_starts_nothing(dataset, device, tmp_path, capsys):
    report = arguments(dataset, tmp_path / "run", "--sample-report", "100")
    assert pretrain(report) == 0
    out = capsys.readouterr().out
    assert "starts at step 0; its next 100 samples are 0 to 99, 12.5 steps, 6,400 tokens in samples of 64:" in out
    assert not (tmp_path / "run").exists()

    assert pretrain(arguments(dataset, tmp_path / "run", "megagpt.schedule.max_steps=5")) == 0
    capsys.readouterr()
    assert pretrain(report) == 0
    out = capsys.readouterr().out
    assert "step_00000005; its next 100 samples are 40 to 139" in out
    n_windows = (open_dataset(dataset).stream("train").n_tokens - 1) // 64 - 1
    [row] = [line.split() for line in out.splitlines() if line.endswith(f" {dataset}")]
    assert row == ["100", "6,400", "100.00%", f"{40 / n_windows:.4f}", "to", f"{140 / n_windows:.4f}", str(dataset)]
    first = open_run(tmp_path / "run").spans(40)[0]
    assert f"sample 40: {dataset} variant 0, epoch 0, tokens {first.start:,} to {first.start + 63:,}" in out
    assert pretrain([*report, "--fresh"]) == 0
    assert "samples are 0 to 99" in capsys.readouterr().out

    for mistake, complaint in (
        ("train.0.path=nowhere", "nowhere"),
        ("seed=5", "with megagpt.data.seed=1234, and this run has 5"),
    ):
        assert pretrain([*report, f"megagpt.data.{mistake}"]) == 2
        assert complaint in capsys.readouterr().err


@pytest.mark.process
def test_a_tool_sees_a_steps_samples_without_torch(trained):
    code = (
        "import sys; from pathlib import Path; from megagpt.checkpoint.run_samples import open_run\n"
        "data = open_run(Path(sys.argv[1]))\n"
        "print(sum(len(p.tokens) for s in data.mixture.samples_of(20) for p in data.spans(s)), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, trained], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [str(8 * 64), "False"]


def test_flags_and_overrides_come_in_any_order(dataset, device, tmp_path, capsys):
    first, *rest = overrides(dataset, tmp_path / "run", "megagpt.schedule.max_steps=4")
    assert pretrain([first, "--deepspeed_config", str(DEBUG_RUN), rest[0], "--fresh", "--local-rank=0", *rest[1:]]) == 0


@pytest.fixture(scope="module")
def trained(dataset, device, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("launch") / "run"
    assert pretrain(arguments(dataset, out_dir)) == 0
    return out_dir


def test_generate_prints_texts_that_begin_with_the_prompt(trained, capsys):
    command = ["generate", str(trained), "--prompt", r"a\nb", "--max-tokens", "5", "--batch", "2", "--seed", "1"]
    capsys.readouterr()
    assert main(command) == 0
    first = capsys.readouterr().out
    texts = first.removesuffix("\n").split("\n---\n")
    assert len(texts) == 2
    assert all(text.startswith("a\nb") for text in texts)
    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == first
    head = f"{committed(trained)[-1]} on cpu: at most 5 tokens, temperature 0.8, top-k 50, top-p 1, seed 1\n"
    assert again.err == head  # not among the texts, which may be piped


def test_evaluate_agrees_with_the_run(trained, dataset, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(trained), "--data", str(dataset), "--tokens", "2048"]) == 0
    out = capsys.readouterr().out
    assert main(["evaluate", str(trained), "--tokens", "2048"]) == 0  # the run's own data
    assert capsys.readouterr().out == out
    printed = float(re.search(r"loss (\d+\.\d+) nats", out)[1])
    assert printed == pytest.approx(metric(trained, "val/loss")[20], abs=1e-4)
    entropy = float(re.search(r"would give (\d+\.\d+) nats", out)[1])
    assert 2.0 < entropy < 3.0  # 16 letters, space, newline and full stop


@pytest.mark.parametrize("left_over", [{"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "x"}, {"PET_NNODES": "2"}])
def test_a_command_that_reads_ignores_what_a_launcher_left_over(trained, dataset, capsys, monkeypatch, left_over):
    evaluate, lint = ["evaluate", str(trained), "--data", str(dataset), "--tokens", "2048"], ["lint", str(DEBUG_RUN)]
    capsys.readouterr()
    assert [main(command) for command in (evaluate, lint)] == [0, 0]
    alone = capsys.readouterr().out
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    assert [main(command) for command in (evaluate, lint)] == [0, 0]
    assert capsys.readouterr().out == alone


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["generate", "nowhere"], "nowhere does not exist; give a run's folder"),
        (["generate", "RUN", "--temperature", "-1"], "--temperature=-1.0"),
        (["generate", "RUN", "--top-p", "2"], "--top-p=2.0"),
        (["evaluate", "RUN", "--data", "nowhere"], "nowhere"),
        (["evaluate", "RUN", "--data", "NOISE"], "was made with another tokenizer"),
    ],
)
def test_a_mistake_after_training_is_one_line_too(trained, dataset, capsys, command, complaint):
    names = {"RUN": str(trained), "NOISE": str(dataset.parent / "noise")}
    capsys.readouterr()
    assert main([names.get(part, part) for part in command]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert complaint in printed


@pytest.mark.process
@pytest.mark.parametrize(
    "command", ["import megagpt", "import sys; sys.argv[1:] = ['--help']; import megagpt.__main__ as m; m.main()"]
)
def test_help_and_import_wait_for_nothing_heavy(command):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", command], capture_output=True, text=True, check=True, cwd=ROOT
    )
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert not imported & {"deepspeed", "torch", "numpy", "pyarrow", "pydantic"}


@pytest.mark.parametrize("command", [[], ["generate"], ["evaluate"]])
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    assert ("example: megagpt" in capsys.readouterr().out) == bool(command)
