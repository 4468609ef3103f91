"""The command-line arguments of `launch/pretrain.py` and of each `megagpt` command."""

import argparse
from pathlib import Path
from typing import Any

from megagpt import __version__
from megagpt.cli.checkpoint_arguments import after_a_run
from megagpt.cli.tune_arguments import tune_options
from megagpt.options import MOST_RANKS_HERE, Parser, decimal, whole
from megagpt.user_paths import user_path

MOST_RANKS = 1_000_000


def training_arguments() -> argparse.ArgumentParser:
    """Return the parser of launch/pretrain.py, which launchers start once per rank."""
    parser = Parser(
        prog="launch/pretrain.py",
        allow_abbrev=False,
        description="Train a GPT-2 as a run file describes; resumes by itself when megagpt.out_dir holds a checkpoint.",
        epilog="example: deepspeed --hostfile hosts launch/pretrain.py --deepspeed_config ds_configs/gpt2_124m.json "
        "megagpt.out_dir=runs/mine optimizer.params.lr=3e-4",
    )
    parser.add_argument(
        "--deepspeed_config",
        dest="run_file",
        type=user_path,
        default=Path("ds_configs/gpt2_124m.json"),
        metavar="RUN.json",
        help="the run file; default: %(default)s",
    )
    _add_start(parser)
    _add_local_rank(parser)
    _add_overrides(parser)
    return parser


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the `megagpt` command."""
    parser = Parser(prog="megagpt", description="Plan and check a run, start it, and use its checkpoints.")
    parser.add_argument("--version", action="version", version=f"megagpt {__version__}")
    _add_local_rank(parser)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    # Listed here; its own parser reads what follows.
    commands.add_parser("data", help="build, check and show datasets: the same program as python -m data_tools")
    train = commands.add_parser(
        "train",
        help="train as a run file describes, on every GPU of this machine; resumes by itself",
        epilog="example: megagpt train ds_configs/debug_cpu.json megagpt.out_dir=runs/mine",
    )
    _add_run_file(train)
    train.add_argument(
        "--nproc",
        type=whole(1, MOST_RANKS_HERE),
        metavar="N",
        help="number of ranks, each a process; default: one for each GPU, or one on a machine without any",
    )
    _add_start(train)
    _before_a_run(commands)
    _on_a_cluster(commands)
    after_a_run(commands)
    return parser


def _before_a_run(commands: Any) -> None:
    _add_init(commands)
    _add_plan(commands)
    lint = commands.add_parser(
        "lint",
        help="check every key of a run file: unknown, removed from DeepSpeed, without effect; exit code 2 for an error",
        epilog="example: megagpt lint ds_configs/gpt2_124m.json --ranks 8 zero_optimization.stage=2",
    )
    _add_run_file(lint)
    lint.add_argument(
        "--ranks",
        type=whole(1, MOST_RANKS),
        help="number of GPUs to check the batch arithmetic for; default: this machine's",
    )
    lint.add_argument("--json", action="store_true", help="one JSON object instead of text")
    lint.add_argument("--schedule", action="store_true", help="draw learning rates, weight decay, momentum over steps")
    lint.add_argument("--effective", action="store_true", help="print the run file with all defaults written out")

    _add_tune(commands)
    resume = commands.add_parser(
        "verify-resume",
        help="test whether a stopped and resumed run is equal to an uninterrupted one, bit for bit; exit code 1 if not",
        epilog="example: megagpt verify-resume ds_configs/gpt2_124m.json --ranks 2 megagpt.data.val_tokens=65536",
    )
    _add_run_file(resume)
    resume.add_argument(
        "--ranks", type=whole(1, MOST_RANKS_HERE), default=1, help="number of processes on this machine; default: 1"
    )
    resume.add_argument(
        "--then-ranks",
        type=whole(1, MOST_RANKS_HERE),
        metavar="N",
        help="number of ranks to resume with; default: --ranks",
    )
    resume.add_argument(
        "--then", action="append", default=[], metavar="key.path=value", help="change a key on resuming; default: none"
    )
    resume.add_argument(
        "--steps", type=whole(2), default=4, help="steps of each run; one is stopped half-way; default: 4"
    )


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="search keys of a run file for the lowest validation loss, or its learning rate alone",
        epilog="example: megagpt tune ds_configs/char_cpu.json --space ds_configs/tune_space.json --trials 30 "
        "megagpt.schedule.max_steps=500 megagpt.every.eval=50",
    )
    _add_run_file(tune)
    tune_options(tune)


def _on_a_cluster(commands: Any) -> None:
    slurm = commands.add_parser(
        "slurm",
        help="submit a run to Slurm, with your cluster's names and a signal that leaves time to save",
        epilog="example: megagpt slurm ds_configs/gpt2_124m.json --nodes 4 --time 12:00:00 --partition gpu --dry-run",
    )
    _add_run_file(slurm)
    slurm.add_argument("--nodes", type=whole(1, MOST_RANKS), default=1, metavar="N", help="hosts; default: 1")
    slurm.add_argument(
        "--gpus-per-node", type=whole(1, MOST_RANKS_HERE), default=8, metavar="N", help="one rank each; default: 8"
    )
    slurm.add_argument("--time", default="24:00:00", help="time limit of each start, as for sbatch; default: 24:00:00")
    slurm.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    slurm.add_argument("--account", metavar="NAME", help="default: the user's")
    slurm.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another option of sbatch, such as qos=high; may be given several times; default: none",
    )
    slurm.add_argument(
        "--sweep",
        type=user_path,
        metavar="FILE",
        help="submit an array, one task for each line of overrides; default: one task",
    )
    slurm.add_argument(
        "--container", metavar="WORDS", help='put before python: "apptainer exec --nv image.sif"; default: nothing'
    )
    slurm.add_argument("--fresh", action="store_true", help="start at step 0; an old run in megagpt.out_dir is renamed")
    slurm.add_argument("--dry-run", action="store_true", help="print the script instead of submitting it")

    doctor = commands.add_parser(
        "doctor",
        help="check that the hosts of a hostfile are ready to train; each finding names its fix; exit code 2 if any",
        epilog="example: megagpt doctor --hostfile hosts ds_configs/gpt2_124m.json",
    )
    doctor.add_argument(
        "run_file", type=user_path, nargs="?", metavar="RUN.json", help="check its data and disk space too"
    )
    _add_overrides(doctor)
    doctor.add_argument("--hostfile", type=user_path, help="default: this machine alone")
    doctor.add_argument(
        "--write-env", action="store_true", help="first write the variables that all hosts need to ~/.deepspeed_env"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON object instead of text")
    # doctor starts itself with this flag on every host.
    doctor.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)

    hosts = commands.add_parser(
        "check-hosts",
        help="check a hostfile and .deepspeed_env before deepspeed hands them to ssh and shells",
        epilog="example: megagpt check-hosts hosts && deepspeed --hostfile hosts launch/pretrain.py",
    )
    hosts.add_argument("hostfile", type=user_path)


def _add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Take what deepspeed and `python -m torch.distributed.launch` add; the environment tells the same."""
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _add_init(commands: Any) -> None:
    init = commands.add_parser(
        "init",
        help="write a run file for a dataset and this machine: size, batch and steps, each with its reason",
        epilog="example: megagpt init data/mine --hours 2, then: megagpt train mine.jsonc",
    )
    init.add_argument("data", type=user_path, metavar="DATA", help="a dataset made by data_tools")
    init.add_argument("--out", type=user_path, metavar="RUN.jsonc", help="the file to write; default: DATA's name")
    machine = init.add_mutually_exclusive_group()
    _add_gpu(init, machine, default="this machine's, else its CPU")
    machine.add_argument("--cpu", action="store_true", help="train on the CPU, also where there is a GPU")
    init.add_argument("--hours", type=decimal(0.001, 1e5), default=1.0, metavar="H", help="to train for; default: 1")


def _add_gpu(parser: argparse.ArgumentParser, names: Any, *, default: str) -> None:
    """Add the options that describe a GPU; `names` is the parser, or the group of options that exclude its name."""
    names.add_argument("--gpu", metavar="NAME", help=f"H200, A100 40GB, RTX 4090, T4, ...; default: {default}")
    parser.add_argument(
        "--gpu-memory",
        type=decimal(0.1, 1e5),
        metavar="GIB",
        help="memory of a GPU that --gpu does not know; default: the named one's",
    )
    parser.add_argument(
        "--tflops",
        type=decimal(0.001, 1e6),
        metavar="T",
        help="its dense 16-bit peak in TFLOP/s, without sparsity; default: the named one's",
    )


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="estimate the memory, time and traffic of a run file for every ZeRO stage, before anything is started",
        epilog="example: megagpt plan ds_configs/gpt2_1558m.json --ranks 64 --gpu H100 --network infiniband-ndr",
    )
    _add_run_file(plan)
    plan.add_argument("--ranks", type=whole(1, MOST_RANKS), default=1, help="GPUs in all; default: 1")
    _add_gpu(plan, plan, default="this machine's, else H100")
    plan.add_argument(
        "--network",
        metavar="NAME|GB/s",
        help="between hosts: a name (InfiniBand has a card for each GPU, Ethernet one for a host), GB/s of each GPU "
        "each way, or cards of a host and their speed (4x12.5); several with commas for hosts that differ; default: "
        "none on one host, else infiniband-ndr",
    )
    plan.add_argument(
        "--gpus-per-host",
        type=whole(1, MOST_RANKS),
        metavar="N",
        help="ranks of a host; default: 8, or 1 for up to 8 ranks with --network",
    )
    plan.add_argument(
        "--tokens", type=whole(1), help="number to train on; default: megagpt.schedule.max_steps global batches"
    )
    plan.add_argument(
        "--efficiency",
        type=decimal(0.001, 1.0),
        metavar="SHARE",
        help="FLOP/s that your machine reaches, as a share of the peak (`hfu` of a run's log); default: by the model's "
        "products, attention and bytes",
    )
    plan.add_argument("--json", action="store_true", help="one JSON object instead of text")
    plan.add_argument("--probe", action="store_true", help="find the largest micro-batch by real steps on this machine")
    plan.add_argument(
        "--memory",
        type=decimal(0.001, 1e6),
        metavar="GIB",
        help="with --probe: limit for each rank; default: all memory",
    )


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fresh", action="store_true", help="start at step 0; an old run in megagpt.out_dir is renamed"
    )
    parser.add_argument(
        "--sample-report",
        type=whole(1, 10**15),
        metavar="N",
        help="instead of training, print which data the next N samples would read; default: off",
    )


def _add_run_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_file", type=user_path, metavar="RUN.json")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="change single keys of the run file"
    )
