"""`megagpt generate CKPT`: generate text from a checkpoint."""

import argparse
import sys

import torch
from pydantic import ValidationError

from megagpt.checkpoint.load import load_model
from megagpt.config.parsing import unescaped
from megagpt.config.schema import GenerationConfig
from megagpt.errors import UserError
from megagpt.model.generate import changed_prompts, complete


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
        wrong = error.errors()[0]
        raise UserError(f"--{str(wrong['loc'][0]).replace('_', '-')}={wrong['input']}: {wrong['msg']}") from None
    for prompt in cfg.prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise UserError(f"--prompt {prompt[:40]!r} holds bytes that are not UTF-8; type it in a UTF-8 terminal")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, *_ = load_model(args.checkpoint, device)
    for line in changed_prompts(tokenizer, cfg.prompts):
        print(f"warning: {line}", file=sys.stderr)
    for text in complete(model, tokenizer, cfg.prompts, cfg, batch=args.batch, seed=args.seed):
        print(text, end="\n---\n")
    return 0
