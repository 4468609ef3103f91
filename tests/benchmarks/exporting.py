"""What `megagpt export` costs for a large model: seconds and peak memory, of the command and of its check.

    python tests/benchmarks/exporting.py --model 1558M --json exporting_cpu.json

The checkpoint is what a run in bf16 at ZeRO-1 on one rank saves, 14 bytes for each parameter, with random weights in
place of trained ones: a run of one layer is trained for a step, and its files are written again in the sizes of the
model. Peak memory is the largest resident set of each process (the parent's, and that of transformers' check), as the
kernel counts it; pages of the mapped checkpoint are among it. A first export warms the page cache as far as it fits.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from bench_data import write_zipf
from throughput_table import SIZES, commit, hardware

from megagpt.checkpoint.commit import committed, read_commit, write_commit, write_rank_manifest
from megagpt.config.model import ModelConfig
from megagpt.config.run_file import load_run_config
from megagpt.distributed.process_group import init_process_group
from megagpt.model.gpt import GPT
from megagpt.train.trainer import train

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 50_257


def small_run(folder: Path) -> Path:
    """Train one step of one layer; returns the step's folder."""
    write_zipf(folder / "data", 20_000, VOCAB_SIZE)
    options = [
        'megagpt.model={"n_layer": 1, "n_head": 1, "n_embd": 16, "seq_len": 1024}',
        f"megagpt.data.train.0.path={folder / 'data' / 'train'}",
        f"megagpt.data.val={folder / 'data' / 'val'}",
        f"megagpt.out_dir={folder / 'run'}",
        "megagpt.data.val_tokens=1024",
        "train_batch_size=1",
        "train_micro_batch_size_per_gpu=1",
        "bf16.enabled=true",
        'megagpt.schedule={"max_steps": 1}',
        'megagpt.every={"log": 1, "eval": 0, "save": 0}',
    ]
    train(load_run_config(ROOT / "ds_configs" / "debug_cpu.json", options), init_process_group())
    return committed(folder / "run")[-1]


def enlarge(step_dir: Path, cfg: ModelConfig) -> int:
    """Write a step's files again with the shapes of another model and random weights; returns its parameters."""
    saved = read_commit(step_dir)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(cfg, saved.identity.vocab_size).named_parameters()}
    decayed = [name for name, shape in shapes.items() if len(shape) > 1]
    groups = [{n: s for n, s in shapes.items() if (n in decayed) is chosen} for chosen in (True, False)]
    masters = [torch.randn(sum(shape.numel() for shape in group.values())).mul_(0.02) for group in groups]
    model_file, optimizer_file = (next(step_dir.glob(f"*{kind}_states.pt")) for kind in ("model", "optim"))
    model: dict[str, Any] = torch.load(model_file, weights_only=False)
    model["param_shapes"] = groups
    model["module"] = {}
    for group, flat in zip(groups, masters, strict=True):
        parts = flat.bfloat16().split([shape.numel() for shape in group.values()])
        model["module"] |= {name: part.view(group[name]) for name, part in zip(group, parts, strict=True)}
    model["module"]["lm_head.weight"] = model["module"]["wte.weight"]
    torch.save(model, model_file)
    del model
    optimizer: dict[str, Any] = torch.load(optimizer_file, weights_only=False)
    state = optimizer["optimizer_state_dict"]
    state["param_alignment_paddings"] = [[0] * len(group) for group in groups]
    state["single_partition_of_fp32_groups"] = masters
    for moments, flat in zip(state["base_optimizer_state"]["state"].values(), masters, strict=True):
        moments |= {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
    torch.save(optimizer, optimizer_file)
    (step_dir / "COMMIT").unlink()
    manifests = [write_rank_manifest(step_dir, 0)]
    identity = replace(saved.identity, model=cfg.model_dump())
    write_commit(step_dir, saved.state, saved.mixture, identity, manifests, finite=True)
    return sum(shape.numel() for shape in shapes.values())


def measured(step_dir: Path, out: Path, dtype: str) -> dict[str, float]:
    """Export in a process that reports its own largest resident set, and its child's."""
    program = (
        "import json, resource, sys\nfrom megagpt.__main__ import main\ncode = main(sys.argv[1:])\n"
        "peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
        "print(json.dumps(peaks))\nsys.exit(code)"
    )
    began = time.perf_counter()
    command = [sys.executable, "-c", program, "export", str(step_dir), str(out), "--dtype", dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - began
    own, child = (kib * 1024 / 1e9 for kib in json.loads(done.stdout.splitlines()[-1]))
    written = sum(path.stat().st_size for path in out.iterdir()) / 1e9
    return {"seconds": seconds, "peak_gb": own, "check_peak_gb": child, "written_gb": written}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="124M")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    n_layer, n_head, n_embd = SIZES[args.model]
    cfg = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, seq_len=1024)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step_dir = small_run(folder)
        n_params = enlarge(step_dir, cfg)
        saved_gb = sum(path.stat().st_size for path in step_dir.iterdir()) / 1e9
        rows = {}
        for dtype in args.dtype:
            rows[dtype] = measured(step_dir, folder / dtype, dtype)
            print(
                f"{args.model} ({n_params:,} parameters, checkpoint {saved_gb:.1f} GB) as {dtype}: "
                f"{rows[dtype]['seconds']:.0f} s; peak {rows[dtype]['peak_gb']:.1f} GB, of the check "
                f"{rows[dtype]['check_peak_gb']:.1f} GB; {rows[dtype]['written_gb']:.1f} GB written"
            )
    if args.json:
        facts = {"date": str(date.today()), "commit": commit(), "torch": torch.__version__, **hardware("cpu")}
        args.json.write_text(json.dumps(facts | {"model": args.model, "n_params": n_params, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
