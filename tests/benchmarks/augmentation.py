"""What augmentation is for: a small text repeated for many epochs, with and without, and what is learned by heart.

A tiny GPT-2 in plain PyTorch trains for some 60 epochs on 30 kB of this machine's own text: as much as one core learns
by heart in half a minute. For each augmentation and seed it prints the validation loss at its best and at the end, and
the exact continuation rate: the share of 32-token prompts out of the training text whose greedy continuation by 32
tokens spells what follows there (Carlini et al. 2023).
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from corpus import jsonl_corpus

from data_tools.build import build
from data_tools.config import BuildConfig
from megagpt.checkpoint.run_samples import open_samples
from megagpt.config.augmentation import AugmentConfig
from megagpt.config.batch import BatchPlan
from megagpt.config.generation import GenerationConfig
from megagpt.config.model import ModelConfig
from megagpt.config.schema import DataConfig, MegaGPTConfig
from megagpt.data.augmentation import batch_transform
from megagpt.data.dataset import TokenStream, open_dataset
from megagpt.data.loader import ValWindows, open_data, prefetched, rank_samples
from megagpt.engine.optimizer import decay_groups
from megagpt.model.generate import complete
from megagpt.model.gpt import GPT
from megagpt.model.loss import kept_share, next_token_loss
from megagpt.tokenizer.tokenizer import Tokenizer, padded_vocab_size
from megagpt.train.evaluate import evaluate

CPU = torch.device("cpu")
MODEL = ModelConfig(n_layer=2, n_head=4, n_embd=128, seq_len=64)
BATCH = 16
PROMPT = CONTINUATION = 32  # tokens
VARIANTS = 15
SETTINGS = {
    "none": AugmentConfig(),
    "variants": AugmentConfig(),  # of the builder: the data has VARIANTS more tokenizations
    "goldfish": AugmentConfig(goldfish={"k": 4}),
    "token_dropout": AugmentConfig(token_dropout={"rate": 0.2}),
    "fim": AugmentConfig(fim={"rate": 0.5}),
    "span_corruption": AugmentConfig(span_corruption={"rate": 0.5}),
}


@dataclass(frozen=True)
class Result:
    best: float  # validation loss, nats per token
    best_step: int
    last: float
    train: float  # mean over the last steps, in the augmented rows
    recited: float  # exact continuation rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kilobytes", type=int, default=40, help="of text, a quarter of it for validation")
    parser.add_argument("--vocab-size", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    args = parser.parse_args()

    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        data, variants = Path(folder, "data"), Path(folder, "variants")
        jsonl_corpus(Path(folder, "text.jsonl"), args.kilobytes * 1000, seed=0)
        options = {"vocab_size": args.vocab_size, "val_fraction": 0.25, "workers": 1}
        build([Path(folder, "text.jsonl")], data, BuildConfig(**options))
        build([Path(folder, "text.jsonl")], variants, BuildConfig(**options, subword={"variants": VARIANTS}))
        dataset = open_dataset(data)
        n_tokens = dataset.manifest.splits["train"].tokens
        per_step = BATCH * MODEL.seq_len
        epochs = args.steps * per_step / n_tokens
        print(f"{n_tokens:,} training tokens, {args.steps} steps of {per_step}: {epochs:.0f} epochs")
        print("augmentation     seed  best val (step)  last val  train  recited  seconds", flush=True)
        for name in args.settings:
            for seed in args.seeds:
                start = time.monotonic()
                folder_of_it = variants if name == "variants" else data
                r = trained(folder_of_it, SETTINGS[name], seed, args.steps, args.lr, args.prompts)
                print(
                    f"{name:15}  {seed:4}  {r.best:8.3f} ({r.best_step:4})  {r.last:8.3f}  {r.train:5.2f}  "
                    f"{r.recited:7.1%}  {time.monotonic() - start:7.0f}",
                    flush=True,
                )
    print(f"{time.monotonic() - began:.0f} seconds in all")


def trained(data: Path, augment: AugmentConfig, seed: int, n_steps: int, lr: float, n_prompts: int) -> Result:
    run = MegaGPTConfig(
        out_dir=data.parent / "run",  # nothing is written there
        model=MODEL,
        data=DataConfig(train=[{"path": data}], val=data, seed=seed),
        schedule={"max_steps": n_steps},
        augment=augment,
    )
    samples = open_samples(run, BATCH, None)
    sets, [dataset] = open_data(run.data, MODEL.seq_len)
    windows = sets[""].windows
    tokenizer = dataset.tokenizer()
    vocab_size = padded_vocab_size(tokenizer.vocab_size)
    transform = batch_transform(augment, run.packing, tokenizer, vocab_size, seed)
    torch.manual_seed(seed)
    model = GPT(MODEL, vocab_size)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.0), lr=lr, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, n_steps, pct_start=0.1)
    firsts = rank_samples(BatchPlan(BATCH, BATCH, 1, 1), 0, (range(n, n + BATCH) for n in count(0, BATCH)))
    batches = prefetched(samples.fill, firsts, (BATCH, MODEL.seq_len + 1), CPU, transform=transform)
    losses: list[float] = []
    validation: dict[int, float] = {}
    every = max(1, n_steps // 10)
    for step in range(1, n_steps + 1):
        batch = next(batches)
        loss = next_token_loss(model(batch.inputs), batch.targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss * kept_share(batch.targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == n_steps:
            validation[step] = validation_loss(model, windows, tokenizer)
    batches.close()
    best_step = min(validation, key=lambda step: validation[step])
    recited = continuation_rate(model, dataset.stream("train"), tokenizer, n_prompts)
    return Result(validation[best_step], best_step, validation[n_steps], float(np.mean(losses[-every:])), recited)


def validation_loss(model: GPT, windows: ValWindows, tokenizer: Tokenizer) -> float:
    return evaluate(model, windows, torch.from_numpy(tokenizer.token_bytes()), micro_batch=BATCH).loss


def continuation_rate(model: GPT, stream: TokenStream, tokenizer: Tokenizer, n_prompts: int) -> float:
    """Of prompts at random places inside the training documents, the same for every model. Another tokenization of
    the text counts as well.
    """
    rng = np.random.default_rng(0)
    texts = []
    while len(texts) < n_prompts:
        text = np.empty(PROMPT + 2 * CONTINUATION, dtype=np.int64)
        stream.copy(int(rng.integers(stream.n_tokens - len(text))), text)
        if tokenizer.eod_id not in text:
            texts.append(text)
    wanted = np.stack(texts)  # (n_prompts, PROMPT + 2 * CONTINUATION)
    greedy = GenerationConfig(max_tokens=CONTINUATION, temperature=0.0)
    said = [text.text for text in complete(model, tokenizer, wanted[:, :PROMPT].tolist(), greedy)]
    follows = [tokenizer.decode(row[PROMPT:]) for row in wanted]
    return sum(own != "" and text.startswith(own) for own, text in zip(said, follows, strict=True)) / n_prompts


if __name__ == "__main__":
    main()
