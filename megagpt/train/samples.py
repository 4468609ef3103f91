"""Generate texts from the run file's prompts while training, and show their first lines in the terminal."""

import shutil
from collections.abc import Sequence

from megagpt.config.generation import GenerationConfig
from megagpt.distributed.collectives import on_every_rank
from megagpt.distributed.process_group import progress_bar
from megagpt.html_parts import printable
from megagpt.model.generate import complete
from megagpt.model.gpt import GPT
from megagpt.terminal import counted
from megagpt.tokenizer.tokenizer import Tokenizer

TEXTS, LINES = 3, 4  # of each step, of each text
NO_TERMINAL = (100, 24)


def generated_samples(model: GPT, tokenizer: Tokenizer, cfg: GenerationConfig) -> list[tuple[str, str]]:
    """Generate a text for each prompt; return (prompt, continuation) of each. Collective; raises UserError."""
    with progress_bar("sampling", total=len(cfg.prompts) * cfg.max_tokens, unit="token") as bar:

        def agree(fine: bool) -> bool:  # is called for each token
            bar.update()
            # At stage 3 a forward pass is collective: a rank that stopped alone would leave the others in the next.
            return on_every_rank(fine)

        # One at a time: training leaves no memory to spare.
        texts = [
            complete(model, tokenizer, [prompt], cfg, seed=i, until_ended=False, agree=agree)[0]
            for i, prompt in enumerate(cfg.prompts)
        ]
    # All is continuation if the tokenizer changed the prompt.
    return [
        (prompt, text.text) if text.prompt_as_read == prompt else ("", text.whole)
        for prompt, text in zip(cfg.prompts, texts, strict=True)
    ]


def sample_lines(samples: Sequence[tuple[str, str]], step: int) -> list[str]:
    """Return lines that show texts generated at a step, each given as prompt and continuation."""
    lines = []
    for prompt, continuation in samples[:TEXTS]:
        lines.append(
            f"sample at step {step}, after {prompt!r}:" if prompt else f"sample at step {step}, a new document:"
        )
        lines += _first_lines(continuation)
    more = len(samples) - TEXTS
    return lines if more <= 0 else [*lines, f"... and {counted(more, 'more text')}"]


def _first_lines(text: str) -> list[str]:
    width = shutil.get_terminal_size(NO_TERMINAL).columns - len("  | ...")
    written = [line for line in text.expandtabs(4).split("\n") if line.strip()]
    # a carriage return, the codes of a terminal and marks that reverse text are shown escaped
    shown = [printable(line) for line in written[:LINES]] or ["(it ended at once)"]
    cut = [line if len(line) <= width else line[: width - 3] + "..." for line in shown]
    return [f"  | {line}" for line in cut] + ["  | ..."] * (len(written) > LINES)
