"""`megagpt generate CKPT`: generate text from a checkpoint.

Standard output has the texts alone; the step and the settings go to standard error.
"""

import argparse

import torch
from pydantic import ValidationError

from megagpt.checkpoint.load import load_model
from megagpt.config.mistakes import mistakes
from megagpt.config.parsing import unescaped
from megagpt.config.schema import GenerationConfig, ModelConfig
from megagpt.data.lost_text import changed_prompts
from megagpt.errors import UserError
from megagpt.guards.out_of_memory import free_memory
from megagpt.model.generate import complete
from megagpt.terminal import print_error, show


def run(args: argparse.Namespace) -> int:
    """Print one or more texts for each prompt. Raises UserError for an option out of range."""
    try:
        cfg = GenerationConfig(
            prompts=tuple(map(unescaped, args.prompt or [""])),
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
        )
    except ValidationError as error:
        key, wrong = next(mistakes(error, GenerationConfig, section=""))
        raise UserError(f"--{key.replace('_', '-')}{wrong.removeprefix(key)}") from None
    for prompt in cfg.prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise UserError(f"--prompt {prompt[:40]!r} holds bytes that are not UTF-8; type it in a UTF-8 terminal")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, step_dir, _ = load_model(args.checkpoint, device)
    _check_memory(args.batch, model.cfg, tokenizer.vocab_size, device)
    for line in changed_prompts(tokenizer, cfg.prompts, model.cfg.seq_len):
        print_error(f"warning: {line}")
    print_error(
        f"{step_dir} on {device.type}: at most {cfg.max_tokens:,} tokens, temperature {cfg.temperature:g}, "
        f"top-k {cfg.top_k}, top-p {cfg.top_p:g}, seed {args.seed}"
    )
    between = ""
    for prompt in cfg.prompts:
        for text in complete(model, tokenizer, [prompt], cfg, batch=args.batch, seed=args.seed):
            show(f"{between}{text}")
            between = "---\n"
    return 0


def _check_memory(batch: int, cfg: ModelConfig, vocab_size: int, device: torch.device) -> None:
    """Raise UserError for more texts than memory holds; Linux would end the process when it writes to the last."""
    # Keys and values in fp32, and the probabilities of the next token with what sorting them takes.
    each = 8 * cfg.n_layer * cfg.seq_len * cfg.n_embd + 32 * vocab_size
    if batch * each > (free := free_memory(device)):
        raise UserError(
            f"--batch {batch} needs {batch * each / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are free; "
            f"give --batch {max(1, free // each)} or less"
        )
