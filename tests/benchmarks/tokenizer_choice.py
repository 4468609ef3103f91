"""Unigram or BPE? The same model trained for the same number of tokens on both, compared in bits per byte.

Bits per byte, because nats per token compare nothing between tokenizers. The corpus is this machine's Python standard
library; the model is the demo's. Prints one row for each tokenizer and seed.
"""

import argparse
import json
import sysconfig
import tempfile
from pathlib import Path

from data_tools.build import build
from data_tools.config import BuildConfig
from megagpt.distributed import init_process_group
from megagpt.run_file import load_run_config
from megagpt.trainer import train

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()

    device = init_process_group()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("unigram", "bpe"):
            data = Path(folder, kind)
            options = BuildConfig(
                include="*.py",
                tokenizer_type=kind,
                vocab_size=args.vocab_size,
                sample_bytes=4_000_000,
                val_fraction=0.05,
            )
            report = build([Path(sysconfig.get_path("stdlib"))], data, options)
            for seed in args.seeds:
                out_dir = Path(folder, f"{kind}-{seed}")
                overrides = [
                    f"megagpt.data.train.0.path={data}",
                    f"megagpt.data.val={data}",
                    f"megagpt.out_dir={out_dir}",
                    f"megagpt.seed={seed}",
                    f"megagpt.data.seed={seed}",
                    f"megagpt.schedule.max_steps={args.steps}",
                    'megagpt.every={"log": 100, "eval": 0, "save": 0}',
                ]
                train(load_run_config(ROOT / "ds_configs" / "demo.json", overrides), device)
                last = json.loads((out_dir / "metrics.jsonl").read_text().splitlines()[-1])
                rows.append((kind, seed, report["bytes_per_token"], last["loss/val"], last["bits_per_byte"]))
    print(f"vocabulary {args.vocab_size}, {args.steps} steps\ntokenizer  seed  bytes/token  loss/val  bits/byte")
    for kind, seed, bytes_per_token, loss, bits in rows:
        print(f"{kind:9}  {seed:4}  {bytes_per_token:11.3f}  {loss:8.4f}  {bits:9.4f}")


if __name__ == "__main__":
    main()
