"""Real launchers of MPI: their processes are ranks of one run or are told how to be, and never runs of their own."""

import os
import shutil
import subprocess
import sys

import pytest
from support import DEBUG_RUN, ROOT, environment, free_port, overrides

OPEN_MPI, MPICH = "mpirun.openmpi", "mpiexec.hydra"
AS_ROOT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}


def needs(program: str) -> pytest.MarkDecorator:
    absent = shutil.which(program) is None
    reason = f"{program} not found: apt-get install openmpi-bin mpich"
    if absent and os.environ.get("MEGAGPT_LAB") == "required":
        raise RuntimeError(reason)
    return pytest.mark.skipif(absent, reason=reason)


def two_processes(dataset, out_dir, *launcher: str, **variables: str) -> subprocess.CompletedProcess[str]:
    run = ["--deepspeed_config", DEBUG_RUN, *overrides(dataset, out_dir, "megagpt.schedule.max_steps=4")]
    command = [*launcher, "-n", "2", sys.executable, ROOT / "launch" / "pretrain.py", *run]
    # Open MPI itself ends by a segmentation fault for a user who has neither HOME nor an entry in /etc/passwd.
    home = {"HOME": os.environ.get("HOME", str(out_dir.parent))}
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env=environment() | home | AS_ROOT | variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.process
@pytest.mark.parametrize(
    ("launcher", "way_out"),
    [
        pytest.param(OPEN_MPI, "mpirun -x MASTER_ADDR=127.0.0.1 -x MASTER_PORT=29500 ...", marks=needs(OPEN_MPI)),
        pytest.param(MPICH, "mpiexec -genv MASTER_ADDR 127.0.0.1 -genv MASTER_PORT 29500 ...", marks=needs(MPICH)),
    ],
)
def test_processes_of_mpi_without_an_address_are_refused_once_with_the_command(dataset, tmp_path, launcher, way_out):
    done = two_processes(dataset, tmp_path / "run", launcher)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert (
        f"started 2 ranks without MASTER_ADDR and MASTER_PORT, where they are to meet; start `{way_out}`" in done.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.process
@needs(OPEN_MPI)
def test_processes_of_mpirun_with_an_address_are_ranks_of_one_run(dataset, tmp_path):
    address = ["-x", "MASTER_ADDR=127.0.0.1", "-x", f"MASTER_PORT={free_port()}"]
    done = two_processes(dataset, tmp_path / "run", OPEN_MPI, *address)
    assert done.returncode == 0, done.stderr
    assert "accumulation 1 x 2 ranks" in done.stdout
    assert done.stdout.count("finished at step 4") == 1
