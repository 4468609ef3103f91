"""Tokens per second of generation: ours, and transformers' on the folder that `megagpt export` makes of the weights.

    python tests/benchmarks/generation.py --json generation_cpu.json
    python tests/benchmarks/generation.py --dtypes bf16 --batches 1 --prompts 16 --tokens 32 --rounds 1     a short look

Random weights and prompts; neither side ends a text early. The time is that of one call from the prompts' ids: reading
the prompt, all new tokens, and on our side decoding the text. Weights are packed once, as `megagpt generate` does after
loading; how long that takes is printed. The sides take turns within a round, and each ratio is of medians. With greedy
fp32 the tokens are compared, too. `--cpu-time` counts the processor's seconds instead of the clock's, for a machine
that others use: give OMP_NUM_THREADS=1 with it.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bench_data import wide_tokenizer
from throughput_table import SIZES, commit, hardware
from transformers import AutoModelForCausalLM

from megagpt.config.generation import GenerationConfig
from megagpt.config.model import ModelConfig
from megagpt.config.regularization import NO_DROPOUT
from megagpt.huggingface.weights import DTYPES, config_json, renamed, write_weights
from megagpt.model.generate import complete
from megagpt.model.gpt import GPT
from megagpt.model.packed_weights import packed_weights
from megagpt.options import MANY
from megagpt.tokenizer.tokenizer import Tokenizer, padded_vocab_size

VOCAB_SIZE, POSITIONS = 50_257, 1024
WAYS = {"greedy": {"temperature": 0.0}, "top-k 50": {"temperature": 0.8, "top_k": 50}}


def models(size: str, dtype: str, tokenizer: Tokenizer) -> tuple[GPT, Any]:
    """The same weights on both sides."""
    n_layer, n_head, n_embd = SIZES[size]
    cfg = ModelConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, seq_len=POSITIONS)
    torch.manual_seed(0)
    ours = GPT(cfg, padded_vocab_size(VOCAB_SIZE)).eval()
    with tempfile.TemporaryDirectory() as name:
        write_weights(renamed(ours.state_dict(), cfg, VOCAB_SIZE), Path(name), DTYPES[dtype])
        config = config_json(cfg, VOCAB_SIZE, tokenizer.eod_id, NO_DROPOUT, dtype)
        (Path(name) / "config.json").write_text(json.dumps(config))
        theirs = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype]).eval()
    theirs.generation_config.eos_token_id = None
    return ours.to(DTYPES[dtype]), theirs


def call_theirs(model: Any, rows: list[list[int]], n_tokens: int, way: dict[str, Any]) -> list[list[int]]:
    inputs = torch.tensor(rows)
    draw = {"do_sample": way["temperature"] > 0} | ({} if way["temperature"] == 0 else way)
    with torch.no_grad():
        out = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=n_tokens, pad_token_id=0, **draw
        )
    return out[:, inputs.size(1) :].tolist()


def call_ours(
    model: GPT, tokenizer: Tokenizer, rows: list[list[int]], n_tokens: int, way: dict[str, Any]
) -> list[list[int]]:
    cfg = GenerationConfig(max_tokens=n_tokens, **way)
    return [text.tokens for text in complete(model, tokenizer, rows, cfg, until_ended=False)]


def seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    began = clock()
    call()
    return clock() - began


def measure(args: argparse.Namespace, dtype: str, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    ours, theirs = models(args.model, dtype, tokenizer)
    clock = time.process_time if args.cpu_time else time.perf_counter
    began = clock()
    with packed_weights(ours, steps=MANY):
        print(f"packing {dtype} weights took {clock() - began:.2f} s", file=sys.stderr)
        return list(compared(args, dtype, tokenizer, ours, theirs, clock))


def compared(
    args: argparse.Namespace, dtype: str, tokenizer: Tokenizer, ours: GPT, theirs: Any, clock: Callable[[], float]
) -> Iterator[dict[str, Any]]:
    for n_prompt, batch, (way, options) in product(args.prompts, args.batches, WAYS.items()):
        generator = torch.Generator().manual_seed(n_prompt)
        rows = torch.randint(VOCAB_SIZE, (batch, n_prompt), generator=generator).tolist()
        sides = {
            "megagpt": lambda n, rows=rows, options=options: call_ours(ours, tokenizer, rows, n, options),
            "transformers": lambda n, rows=rows, options=options: call_theirs(theirs, rows, n, options),
        }
        once = [call(8) for call in sides.values()]  # warms both up
        took: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side, call in sides.items():
                took[side].append(seconds(lambda call=call: call(args.tokens), clock))
        rates = {side: batch * args.tokens / statistics.median(times) for side, times in took.items()}
        row = {"dtype": dtype, "prompt": n_prompt, "batch": batch, "way": way, "seconds": took, "tokens_per_sec": rates}
        row["ratio"] = rates["megagpt"] / rates["transformers"]
        row["same_tokens"] = once[0] == once[1] if (way, dtype) == ("greedy", "fp32") else None
        same = "" if row["same_tokens"] is None else f", same tokens: {row['same_tokens']}"
        print(
            f"| {dtype} | {n_prompt} | {batch} | {way} | {rates['megagpt']:.1f} | {rates['transformers']:.1f} "
            f"| {row['ratio']:.2f} |{same}",
            flush=True,
        )
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="124M")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompts", nargs="+", type=int, default=[16, 256], help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="new ones of each text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    tokenizer = wide_tokenizer(VOCAB_SIZE)
    facts = {"date": date.today().isoformat(), "commit": commit(), "hardware": hardware("cpu"), "model": args.model}
    facts["versions"] = {name: version(name) for name in ("torch", "transformers")}
    print(json.dumps(facts, indent=1))
    print(
        "| dtype | prompt | batch | | megagpt tokens/s | transformers tokens/s | ratio |\n|---|---|---|---|---|---|---|"
    )
    found = [row for dtype in args.dtypes for row in measure(args, dtype, tokenizer)]
    if args.json:
        args.json.write_text(
            json.dumps({**facts, "tokens": args.tokens, "cpu_time": args.cpu_time, "rows": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
