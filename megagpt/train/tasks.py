"""Run the run file's tasks while training: what they measure, and what a reader of their numbers must know."""

from megagpt.distributed.process_group import print_rank0
from megagpt.errors import UserError
from megagpt.evaluation.tasks import Tasks, run_tasks
from megagpt.model.gpt import GPT
from megagpt.terminal import YELLOW
from megagpt.tokenizer.tokenizer import Tokenizer


def task_metrics(tasks: Tasks, model: GPT, tokenizer: Tokenizer, *, micro_batch: int, step: int) -> dict[str, float]:
    """Run tasks and return their metrics; none where a task is wrong, which stops no run. Collective."""
    try:
        found = run_tasks(tasks, model, tokenizer, micro_batch=micro_batch)
    except UserError as error:
        print_rank0(f"no results of tasks at step {step}: {error}", color=YELLOW)
        return {}
    if found.unspelt:
        print_rank0(found.what_is_lost(), color=YELLOW)
    return found.as_metrics()
