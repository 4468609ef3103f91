"""`megagpt generate CKPT`: generate text from a checkpoint.

Standard output has the texts alone, as they come; the step and the settings go to standard error.
"""

import argparse
import json
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from pydantic import ValidationError

from megagpt.checkpoint.load import load_model
from megagpt.cli.generate.prompts import as_typed, given, typed_one_by_one
from megagpt.config.generation import GenerationConfig
from megagpt.config.mistakes import mistakes
from megagpt.data.lost_text import changed_prompts
from megagpt.errors import UserError
from megagpt.guards.out_of_memory import fits_into_memory, free_memory
from megagpt.html_parts import printable
from megagpt.model.generate import extend, new_texts
from megagpt.model.generated_text import GeneratedText
from megagpt.model.gpt import GPT
from megagpt.model.packed_weights import packed_weights
from megagpt.options import MANY
from megagpt.terminal import print_error, show
from megagpt.tokenizer.tokenizer import Tokenizer

AT_ONCE = 16  # texts of several prompts: more are hardly faster on a CPU, and the first would come later


class Setting(NamedTuple):
    """A model, and how to generate and print."""

    model: GPT
    tokenizer: Tokenizer
    cfg: GenerationConfig
    batch: int
    json: bool


def run(args: argparse.Namespace) -> int:
    """Print one or more texts for each prompt. Raises UserError for an option out of range."""
    _check_together(args)
    cfg = _config(args)
    prompts = [] if args.interactive else given(args.prompt, args.prompts)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer, step_dir, _ = load_model(args.checkpoint, device, ema=args.ema)
    setting = Setting(model, tokenizer, cfg, args.batch, args.json)
    with packed_weights(model, steps=MANY if args.interactive else len(prompts) * cfg.max_tokens):
        at_once = _prompts_at_once(setting, prompts, device)
        _warn(setting, prompts)
        print_error(f"{step_dir} on {device.type}: {_settings(cfg)}, seed {args.seed}")
        if args.interactive:
            return _interactive(setting, args.seed)
        return _one_after_the_other(setting, prompts, at_once, args.seed)


def _one_after_the_other(setting: Setting, prompts: Sequence[str], at_once: int, seed: int) -> int:
    """Print the texts of all prompts, some of which are continued together."""
    for begin in range(0, len(prompts), at_once):
        first = seed + begin * setting.batch
        some = prompts[begin : begin + at_once]
        texts = new_texts(setting.tokenizer, some, setting.cfg, batch=setting.batch, seed=first)
        between = begin > 0 and not setting.json
        if (between and not show("---")) or not print_texts(setting, texts):
            break  # `... | head` has read enough
    return 0


def print_texts(setting: Setting, texts: Sequence[GeneratedText]) -> bool:
    """Generate texts together and print them in order, the first as it comes. Return whether anybody still reads."""
    pieces = _json_lines(setting, texts) if setting.json else _pieces(setting, texts)
    # Others may have taken memory since it was found free.
    with closing(pieces), fits_into_memory("--batch", setting.batch, ", or give fewer --max-tokens"):
        return all(show(piece, end="") for piece in pieces)


def _pieces(setting: Setting, texts: Sequence[GeneratedText]) -> Generator[str]:
    """Yield what to print: of the first text that has not ended what is new, then the next."""
    yield _visible(texts[0].prompt_as_read)
    shown = 0  # texts, to their end
    for _ in _extend(setting, texts):
        while shown < len(texts):
            if new := texts[shown].new_text():
                yield _visible(new)
            if texts[shown].ended is None:
                break
            shown += 1
            yield "\n" if shown == len(texts) else f"\n---\n{_visible(texts[shown].prompt_as_read)}"


def _json_lines(setting: Setting, texts: Sequence[GeneratedText]) -> Generator[str]:
    """Yield a line for each text that has ended, in order."""
    shown = 0
    for _ in _extend(setting, texts):
        while shown < len(texts) and (text := texts[shown]).ended is not None:
            shown += 1
            row = {"prompt": text.prompt, "text": text.text, "tokens": text.tokens}
            yield json.dumps(row | {"log_probabilities": text.log_probabilities, "ended": text.ended}) + "\n"


def _extend(setting: Setting, texts: Sequence[GeneratedText]) -> Iterator[None]:
    return extend(setting.model, setting.tokenizer, texts, setting.cfg)


def _visible(text: str) -> str:
    """Return the text as a terminal shows it, on which its control codes could do anything; else as it is."""
    if not sys.stdout.isatty():
        return text
    return "".join(letter if letter in "\n\t" else printable(letter) for letter in text)


def _interactive(setting: Setting, seed: int) -> int:
    """Continue each prompt that is typed. Ctrl-C ends a text, not the program."""
    in_a_terminal = sys.stdin.isatty() and sys.stdout.isatty()  # where a new line asks for each prompt
    for number, prompt in enumerate(typed_one_by_one()):
        if number and not in_a_terminal:
            show("---")
        _warn(setting, [prompt])
        texts = new_texts(
            setting.tokenizer, [prompt], setting.cfg, batch=setting.batch, seed=seed + number * setting.batch
        )
        try:
            if not print_texts(setting, texts):
                break
        except KeyboardInterrupt:
            show("")
    return 0


def _check_together(args: argparse.Namespace) -> None:
    """Raise UserError for options that exclude each other."""
    sources = [name for name in ("prompt", "prompts", "interactive") if getattr(args, name) not in (None, False)]
    if len(sources) > 1:
        raise UserError(f"--{sources[0]} and --{sources[1]} are both given; prompts come from one of them")
    if args.interactive and args.json:
        raise UserError("--interactive shows text, and --json is for programs; give --prompts - to read prompts")


def _config(args: argparse.Namespace) -> GenerationConfig:
    try:
        return GenerationConfig(
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            min_p=args.min_p,
            repetition_penalty=args.repetition_penalty,
            stop=tuple(as_typed(text, "--stop") for text in args.stop),
        )
    except ValidationError as error:
        key, wrong = next(mistakes(error, GenerationConfig, section=""))
        raise UserError(f"--{key.replace('_', '-')}{wrong.removeprefix(key)}") from None


def _settings(cfg: GenerationConfig) -> str:
    """Return the settings in words; those that are off by default only where they are on."""
    said = f"at most {cfg.max_tokens:,} tokens, temperature {cfg.temperature:g}, top-k {cfg.top_k}, top-p {cfg.top_p:g}"
    said += f", min-p {cfg.min_p:g}" if cfg.min_p else ""
    return said + (f", repetition penalty {cfg.repetition_penalty:g}" if cfg.repetition_penalty != 1.0 else "")


def _warn(setting: Setting, prompts: Sequence[str]) -> None:
    for line in changed_prompts(setting.tokenizer, prompts, setting.model.cfg.seq_len):
        print_error(f"warning: {line}")


def _prompts_at_once(setting: Setting, prompts: Sequence[str], device: torch.device) -> int:
    """Return how many prompts to continue together.

    Raises UserError for more texts of one than memory holds; Linux would end the process when it writes to the last.
    """
    model, batch = setting.model.cfg, setting.batch
    longest = min(model.seq_len, 1 + max((len(ids) for ids in setting.tokenizer.encode_batch(prompts)), default=0))
    positions = min(model.seq_len, longest + setting.cfg.max_tokens)
    # Keys and values in fp32, what reading the prompt takes, the next token's logits and what sorting them takes, and
    # the generator of its random numbers.
    each = 8 * model.n_layer * positions * model.n_embd + 60 * longest * model.n_embd
    each += 40 * setting.tokenizer.vocab_size + 20_000
    if batch * each > (free := free_memory(device)):
        raise UserError(
            f"--batch {batch} needs {batch * each / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB are free; "
            f"give --batch {max(1, free // each)} or less"
        )
    return max(1, min(AT_ONCE, free // each) // batch)
