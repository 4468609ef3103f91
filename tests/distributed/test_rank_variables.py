"""Which rank a process is, from the variables that each launcher really sets, and those that are left over."""

import os

import pytest

from megagpt.distributed.rank_variables import Place, join_launch, read_place, unused_tasks, without_launcher
from megagpt.errors import OwnRankError, UserError

# What `env` printed under Slurm 22.05, Open MPI 4.1 and MPICH 4.0, as rank 1 of 2 where there are two.
SLURM = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
SRUN = SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"}
TWO_HOSTS = SRUN | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
SALLOC = {"SLURM_NTASKS": "2", "SLURM_TASKS_PER_NODE": "2"}
BATCH_SCRIPT = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
INTERACTIVE_STEP = BATCH_SCRIPT | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PMI2_OF_SRUN = {"PMI_RANK": "1", "PMI_SIZE": "2"}  # Slurm's plugin mpi/pmi2 sets no local rank
PMI2_OF_A_SHELL = {"PMI_RANK": "0", "PMI_SIZE": "1"}
DAEMON_BY_SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}
ADDRESS = {"MASTER_ADDR": "h1", "MASTER_PORT": "29500"}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", **ADDRESS}
KUBEFLOW = BY_HAND | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "1"}
TORCHRUN = BY_HAND | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
DEEPSPEED = BY_HAND | {"LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place()),
        ({"WORLD_SIZE": "1"}, Place()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
        ({"RANK": "", "WORLD_SIZE": " "}, Place()),  # `export RANK=`
        ({"LOCAL_RANK": "3", **ADDRESS}, Place()),
        (BY_HAND, Place(1, 2)),
        (KUBEFLOW, Place(1, 2)),
        (TORCHRUN, Place(1, 2, 1, 2, "torchrun")),
        (DEEPSPEED, Place(1, 2, 1, 2, "deepspeed")),
        (SRUN, Place(1, 2, 1, 2, "srun")),
        (TWO_HOSTS, Place(1, 2, 0, 1, "srun")),
        (SRUN | PMI2_OF_SRUN, Place(1, 2, 1, 2, "srun")),
        (SRUN | PMI2_OF_SRUN | BY_HAND, Place(1, 2, 1, 2, "srun")),
        (TWO_HOSTS | PMI2_OF_SRUN | TORCHRUN, Place(1, 2, 1, 2, "torchrun")),
        (PMI2_OF_SRUN | TORCHRUN, Place(1, 2, 1, 2, "torchrun")),
        (SRUN | PMI2_OF_A_SHELL, Place(1, 2, 1, 2, "srun")),
        (INTERACTIVE_STEP | PMI2_OF_A_SHELL, Place()),
        (PMI2_OF_A_SHELL, Place()),
        (PMI2_OF_SRUN | {"LOCAL_RANK": "1"}, Place(1, 2, 1, 1, "mpiexec")),
        (PMI2_OF_SRUN | BY_HAND, Place(1, 2, 0, 1, "mpiexec")),
        (SRUN | MPICH | {"PMI_SIZE": "4"}, Place(1, 4, 1, 2, "mpiexec")),
        (SALLOC, Place()),
        (BATCH_SCRIPT, Place()),
        (INTERACTIVE_STEP, Place()),
        (OPEN_MPI, Place(1, 2, 1, 2, "mpirun")),
        (OPEN_MPI | DAEMON_BY_SRUN, Place(1, 2, 1, 2, "mpirun")),
        (MPICH, Place(1, 2, 1, 2, "mpiexec")),
        (SRUN | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, Place(1, 2, 1, 2, "srun")),
        (SRUN | TORCHRUN | {"RANK": "5", "WORLD_SIZE": "8"}, Place(5, 8, 1, 2, "torchrun")),
    ],
)
def test_each_launcher_tells_a_process_its_place(environment, place):
    assert read_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is not; `unset RANK WORLD_SIZE` trains on one rank"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is set, but RANK is not"),
        ({"RANK": "0"}, "RANK=0 is set, but WORLD_SIZE is not"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is not a whole number from 0 up"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a whole number from 0 up"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0' is not a whole number from 1 up"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "is not a whole number from 1 up"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        (BY_HAND | {"LOCAL_RANK": "1.0"}, "LOCAL_RANK='1.0' is not a whole number"),
        (OPEN_MPI | {"RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE=1, but mpirun started this process as rank 1 of 2"),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 WORLD_SIZE=2, but srun started this process as rank 1 of 2"),
        ({"PMIX_RANK": "1"}, "PMIX_RANK=1: a launcher started this process that does not tell how many"),
        (MPICH | {"MPI_LOCALRANKID": "x"}, "MPI_LOCALRANKID='x' is not a whole number"),
        (PMI2_OF_SRUN, "PMI_RANK=1 PMI_SIZE=2 are set without MPI_LOCALRANKID; set LOCAL_RANK to this"),
        ({"PET_NNODES": "2"}, "PET_NNODES=2 is for torchrun, which did not start this process"),
        (KUBEFLOW | {"PET_NPROC_PER_NODE": "8"}, "PET_NPROC_PER_NODE=8 is for torchrun"),
    ],
)
def test_variables_that_are_half_set_or_contradict_each_other_are_refused_by_name(environment, complaint):
    with pytest.raises(OwnRankError) as refused:
        read_place(environment)
    assert complaint in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("environment", "complaint", "everywhere"),
    [
        (OPEN_MPI, "start `mpirun -x MASTER_ADDR=127.0.0.1 -x MASTER_PORT=29500 ...`", True),
        (MPICH, "start `mpiexec -genv MASTER_ADDR 127.0.0.1 -genv MASTER_PORT 29500 ...`", True),
        (SRUN, "start `MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 srun ...`", True),
        (SRUN | {"MASTER_ADDR": "h1"}, "srun started 2 ranks without MASTER_PORT", True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 WORLD_SIZE=2 is set without MASTER_ADDR and MASTER_PORT", False),
        (BY_HAND | {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a whole number from 1 to 65535", False),
        (BY_HAND | {"MASTER_PORT": "0"}, "MASTER_PORT='0' is not", False),
        (BY_HAND | {"MASTER_PORT": "70000"}, "MASTER_PORT='70000' is not", False),
    ],
)
def test_ranks_that_cannot_meet_are_refused_with_the_command_that_lets_them(
    monkeypatch, environment, complaint, everywhere
):
    """What every rank of a launcher lacks, rank 0 reports for all, so RANK is known by then."""
    monkeypatch.setattr("os.environ", dict(environment))
    with pytest.raises(UserError) as refused:
        join_launch()
    assert complaint in str(refused.value)
    assert isinstance(refused.value, OwnRankError) != everywhere
    assert os.environ["RANK"] == "1"


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH, SRUN])
def test_the_way_out_of_a_launcher_is_one_rank(environment):
    names = {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"}
    assert read_place({name: value for name, value in environment.items() if name not in names}) == Place()


def test_a_place_that_was_joined_is_read_again_as_the_same(monkeypatch):
    for environment in ({}, BY_HAND, TORCHRUN, SRUN | ADDRESS, OPEN_MPI | ADDRESS, MPICH | ADDRESS, INTERACTIVE_STEP):
        monkeypatch.setattr("os.environ", dict(environment))
        assert join_launch() == join_launch()


@pytest.mark.parametrize("environment", [OPEN_MPI, MPICH, SRUN, TORCHRUN, DEEPSPEED, KUBEFLOW, {"PET_NNODES": "2"}])
def test_what_a_launcher_set_is_taken_out_of_an_environment(environment):
    kept = without_launcher(environment | {"SLURM_CONF": "/etc/slurm.conf"})
    assert read_place(kept) == Place()
    assert kept["SLURM_CONF"] == "/etc/slurm.conf"


def test_tasks_that_slurm_allocated_and_nobody_started_are_noted():
    for environment in (SALLOC, BATCH_SCRIPT, INTERACTIVE_STEP):
        assert unused_tasks(environment).startswith("SLURM_NTASKS=2, but srun did not start this process")
    for environment in ({}, SRUN, {"SLURM_NTASKS": "1"}):
        assert unused_tasks(environment) == ""
