"""launch/slurm/pretrain.sbatch and `megagpt slurm`: what is passed on, when a job is requeued, what is refused."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from support import DEBUG_RUN, ROOT, environment

from megagpt.__main__ import main
from megagpt.cli.slurm import limit_seconds

SCRIPT = ROOT / "launch" / "slurm" / "pretrain.sbatch"
HOSTILE = 'megagpt.sample.prompts=["$(touch pwned) `touch pwned` ; touch pwned; \'"]'


def run_script(folder: Path, script: str, *arguments: str, code: int = 0, **variables: str) -> tuple[int, str, str]:
    """Run the script with stand-ins for Slurm's commands; return (exit code, their arguments, errors)."""
    calls = folder / "calls"
    calls.unlink(missing_ok=True)
    for name, answer in {
        "srun": f"exit {code}",
        "scontrol": 'case "$1" in show) echo node7; echo node8;; esac',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\nprintf '%s|' {name} \"$@\" >>{calls}\n{answer}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "4321", "SLURM_JOB_NODELIST": "node[7-8]"}
    done = subprocess.run(
        ["bash", "-s", "--", *arguments],
        cwd=folder,
        env=environment() | {"PATH": f"{folder}:{os.environ['PATH']}"} | slurm | variables,
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, calls.read_text() if calls.exists() else "", done.stderr


@pytest.mark.process
@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (2, False)])
def test_a_saved_run_is_requeued(tmp_path, code, requeued):
    ended, calls, _ = run_script(tmp_path, SCRIPT.read_text(), "run.json", "--fresh", "a.b=1", code=code)
    assert ended == code
    assert "|launch/pretrain.py|--deepspeed_config|run.json|--fresh|a.b=1|" in calls
    assert ("scontrol|requeue|4321|" in calls) == requeued


@pytest.mark.process
def test_a_failed_run_is_requeued_three_times_and_a_save_resets_the_count(tmp_path):
    requeued = []
    for code in (1, 137, 75, 1, 1, 1, 1):
        ended, calls, errors = run_script(tmp_path, SCRIPT.read_text(), "run.json", code=code)
        assert ended == code
        requeued.append("scontrol|requeue|4321|" in calls)
    assert requeued == [True] * 6 + [False]
    assert "failed again after three restarts: slurm-4321.failures" in errors
    assert (tmp_path / "slurm-4321.failures").read_text().count("node[7-8]: exit code 1\n") == 4


@pytest.mark.process
def test_a_task_of_an_array_adds_its_line_of_the_sweep(tmp_path):
    lines = ["megagpt.out_dir=a x=1", "megagpt.out_dir=b\tx=2", "x=3"]
    (tmp_path / "sweep").write_text("\n".join(lines))
    arguments = [SCRIPT.read_text(), "run.json", "--sweep", "sweep", "y=0"]
    for task, words in {"1": "megagpt.out_dir=a|x=1", "2": "megagpt.out_dir=b|x=2"}.items():
        ended, calls, _ = run_script(tmp_path, *arguments, SLURM_ARRAY_TASK_ID=task)
        assert ended == 0
        assert f"|run.json|{words}|y=0|" in calls
    for task in ("3", "4"):
        ended, calls, errors = run_script(tmp_path, *arguments, SLURM_ARRAY_TASK_ID=task)
        assert (ended, calls) == (2, "")
        assert f"error: line {task} of sweep sets no megagpt.out_dir of its own" in errors
    assert "--sweep needs an array" in run_script(tmp_path, *arguments)[2]


@pytest.fixture
def slurm(monkeypatch, capsys):
    """`megagpt slurm` of a run file for CPUs: its exit code, output and errors."""
    monkeypatch.chdir(ROOT)

    def command(*arguments: str | Path) -> tuple[int, str, str]:
        code = main(["slurm", str(DEBUG_RUN), "--gpus-per-node", "1", *map(str, arguments)])
        return (code, *capsys.readouterr())

    return command


def test_the_script_is_the_shipped_one_with_the_clusters_options(slurm, tmp_path):
    options = ["--nodes", "2", "--time", "1-12", "--partition", "gpu", "--account", "me", "--sbatch", "qos=high"]
    code, script, _ = slurm(*options, "--dry-run", f"megagpt.out_dir={tmp_path}")
    assert code == 0
    before, after = SCRIPT.read_text().splitlines(), script.splitlines()
    gone = ["gpus-per-node=8", "nodes=1", "ntasks-per-node=8", "time=24:00:00"]
    assert sorted(set(before) - set(after)) == [f"#SBATCH --{option}" for option in gone]
    come = ["account=me", "gpus-per-node=1", "nodes=2", "ntasks-per-node=1", "partition=gpu", "qos=high", "time=1-12"]
    arguments = f'set -- {DEBUG_RUN} megagpt.out_dir={tmp_path} "$@"'
    assert sorted(set(after) - set(before)) == [*(f"#SBATCH --{option}" for option in come), arguments]
    first_command = next(i for i, line in enumerate(after) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in after[first_command:])  # Slurm would not read them


@pytest.mark.process
def test_no_shell_reads_what_is_rendered(slurm, tmp_path):
    container = ["--container", "apptainer exec '$(touch pwned).sif'"]
    _, script, _ = slurm("--dry-run", *container, f"megagpt.out_dir={tmp_path}/a b;touch pwned", HOSTILE)
    _, calls, _ = run_script(tmp_path, script, "more=1")
    words = calls.partition("--wait=60|")[2].split("|")
    assert words[:5] == ["apptainer", "exec", "$(touch pwned).sif", "python", "launch/pretrain.py"]
    assert words[5:10] == [
        *("--deepspeed_config", str(DEBUG_RUN), f"megagpt.out_dir={tmp_path}/a b;touch pwned", HOSTILE, "more=1")
    ]
    assert not list(tmp_path.rglob("pwned"))


def test_the_signal_comes_as_early_as_the_runs_own_saves_need(slurm, tmp_path):
    def signal(*options: str) -> str:
        _, script, _ = slurm("--dry-run", *options, f"megagpt.out_dir={tmp_path}")
        return next(line for line in script.splitlines() if "--signal" in line)

    assert signal() == "#SBATCH --signal=USR1@300"
    assert signal("--time", "8") == "#SBATCH --signal=USR1@120"  # a quarter of it
    # the first two as an older megagpt named them
    rows = [{"step": 1, "seconds/save": 100.0}, {"step": 2, "seconds/eval": 40.4, "seconds/save": 50.0}]
    rows.append({"step": 3, "perf/save_seconds": 60.0, "perf/write_seconds": 150.0})  # written asynchronously
    (tmp_path / "metrics.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"step": 3, "sec']))
    lead = "#SBATCH --signal=USR1@881"  # 2 * (40.4 + 100 + 2 * 150)
    assert signal() == lead
    code, _, errors = slurm("--time", "29", "--dry-run", f"megagpt.out_dir={tmp_path}")
    assert code == 2
    assert f"took 440 s in {tmp_path}" in errors
    assert "give --time 30 (minutes) or more" in errors
    assert signal("--time", "30") == lead


def test_times_are_read_as_sbatch_reads_them():
    times = {"90": 5400, "1:30": 90, "12:00:00": 43200, "2-6": 194400, "2-6:30": 196200, "2-6:30:10": 196210}
    assert {text: limit_seconds(text) for text in times} == times


def test_a_sweep_is_an_array_whose_runs_are_all_checked(slurm, tmp_path):
    sweep = tmp_path / "sweep"
    sweep.write_text("megagpt.out_dir=runs/a optimizer.params.lr=1e-3\nmegagpt.out_dir=runs/b\n")
    _, script, _ = slurm("--dry-run", "--sweep", sweep)
    assert "#SBATCH --array=1-2\n" in script
    assert f'set -- {DEBUG_RUN} --sweep {sweep} "$@"\n' in script
    for lines, complaint in {
        "": "is empty",
        "megagpt.out_dir=runs/a\noptimizer.params.lr=1": "line 2: the same megagpt.out_dir=runs/debug_cpu as the",
        "megagpt.out_dir=runs/a\nmegagpt.out_dir=runs/a": "line 2: the same megagpt.out_dir=runs/a as line 1",
        "megagpt.out_dir=runs/a megagpt.model.n_layers=3": "line 1: ",
    }.items():
        sweep.write_text(lines)
        code, out, errors = slurm("--dry-run", "--sweep", sweep)
        assert (code, out) == (2, "")
        assert complaint in errors


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--partition", "gpu;reboot"], "--partition='gpu;reboot' is no option of sbatch"),
        (["--account", "a\n#SBATCH --uid=0"], "is no option of sbatch in one word"),
        (["--sbatch", "qos"], "--qos='' is no option of sbatch"),
        (["--sbatch", "nodes=3"], "--sbatch nodes=3: megagpt slurm sets nodes=1 by its own options"),
        (["--time", "tomorrow"], "--time tomorrow is none of minutes, M:S"),
        (["--time", "0:30"], "--time 0:30 is less than a minute"),
        (["--nodes", "3"], "set train_batch_size to 12"),
        (["--container", "a 'b"], "No closing quotation"),
        (["--sweep", "nowhere"], "--sweep nowhere cannot be read"),
        (["megagpt.model.n_layers=3"], "did you mean 'megagpt.model.n_layer'?"),
        (["gradient_cliping=1"], "gradient_clipping"),
    ],
)
def test_a_mistake_is_found_before_anything_waits_in_the_queue(slurm, arguments, complaint):
    code, out, errors = slurm("--dry-run", *arguments)
    assert (code, out) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert complaint in errors


@pytest.mark.process
def test_away_from_the_checkout_or_from_slurm_it_says_so(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch here" in slurm()[2]
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    assert "sbatch refused the script: sbatch: error: invalid partition" in slurm("--partition", "none")[2]
    monkeypatch.chdir(tmp_path)
    assert "launch/slurm/pretrain.sbatch is not here; go to the checkout's folder" in slurm()[2]
