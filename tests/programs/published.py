"""Compare `megagpt plan` with published runs of others: `python tests/programs/published.py` prints the table.

published_runs.json has a source for each, what was assumed where the source does not say, and the figure: tokens a
second for each GPU. Runs that a plan cannot express (tensor or pipeline parallelism, fp8, shards of a host alone) are
left out, and of llm-foundry's tables every row of 2,048 tokens is in, whatever its ratio.

Some ran older kernels for attention than megagpt. Their speeds, shares of the peak, stand by the source: for
llm-foundry's (Triton) they follow from its rows of 32,768 and 65,536 tokens, where attention is most of the step, and
FlashAttention-2 reaches 35 % of an H100 (Shah et al. 2024, FlashAttention-3, abstract).
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from megagpt.config.run_file import parse_run
from megagpt.planner.estimate import machine, setting

DATA = Path(__file__).parents[1] / "planner" / "published_runs.json"
# Sources that constants were chosen by: PRODUCTS (planner/compute.py) and the speeds of the older kernels by the first,
# attention's speeds on Hopper and Blackwell (planner/gpu_specs.py) by the page that has the second.
CHOSEN_BY = ("llm-foundry", "DeepSpeed ZeRO-2")


@dataclass(frozen=True)
class Comparison:
    """A published run, its figure, and the plan's."""

    run: dict[str, Any]
    planned: float

    @property
    def published(self) -> float:
        """Tokens a second for each GPU."""
        return float(self.run["tokens_per_second"])

    @property
    def ratio(self) -> float:
        """The plan's figure over the published one."""
        return self.planned / self.published

    @property
    def chosen_by(self) -> bool:
        """Tell whether a constant was chosen by this row."""
        return self.run["source"] in CHOSEN_BY


@cache
def published() -> dict[str, Any]:
    """Return the file."""
    found: dict[str, Any] = json.loads(DATA.read_text("utf-8"))
    return found


def run_file(row: dict[str, Any]) -> dict[str, Any]:
    """Return the run file of a published run."""
    return {
        "train_batch_size": row["micro_batch"] * row["accumulation"] * row["ranks"],
        "train_micro_batch_size_per_gpu": row["micro_batch"],
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": row["stage"], "overlap_comm": row["stage"] > 1},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "megagpt": {
            "out_dir": "out",
            "model": {"seq_len": row["seq_len"], **published()["models"][row["model"]]["model"]},
            "data": {"train": [{"path": "data"}], "val": "data"},
            "schedule": {"max_steps": 10},
            "recompute": {"policy": row["recompute"]},
            "compile": row["compile"],
        },
    }


def comparisons(*, replaces: bool = True) -> list[Comparison]:
    """Return every published run with the plan's figure; without `replaces`, that of the plan's own attention."""
    return [Comparison(row, planned(row, older_attention(row) if replaces else None)) for row in published()["runs"]]


def older_attention(row: dict[str, Any]) -> float | None:
    """Return the speed of a run's attention where its kernel is older than megagpt's, as a share of the peak."""
    found: float | None = published()["sources"][row["source"]].get("attention", {}).get(row["gpu"])
    return found


def planned(row: dict[str, Any], attention: float | None) -> float:
    """Return the plan's tokens a second for each GPU, with this speed of attention or the plan's own."""
    on = machine(row["gpu"], row["ranks"], row["network"], gpus_per_host=row.get("gpus_per_host"))
    on = replace(on, gpu=replace(on.gpu, attention=attention or on.gpu.attention))
    found = setting(parse_run(run_file(row)), on, published()["models"][row["model"]]["vocab_size"])
    return row["micro_batch"] * row["accumulation"] * row["seq_len"] / found.seconds


def table(found: list[Comparison]) -> str:
    """Return the comparisons as a table."""
    lines = ["| source | model | GPUs | tokens | micro-batch | stage | recompute | published | plan | ratio |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for c in found:
        row, chosen = c.run, " *" if c.chosen_by else ""
        lines.append(
            f"| {row['source']}{chosen} | {row['model']} | {row['ranks']} {row['gpu']} | {row['seq_len']:,} | "
            f"{row['micro_batch']} x {row['accumulation']} | {row['stage']} | {row['recompute']} | "
            f"{c.published:,.0f} | {c.planned:,.0f} | {c.ratio:.2f} |"
        )
    return "\n".join([*lines, "", *verdicts(found, comparisons(replaces=False))])


def near(found: list[Comparison]) -> int:
    """Return how many are within 20 %."""
    return sum(0.8 <= c.ratio <= 1.2 for c in found)


def verdicts(found: list[Comparison], own: list[Comparison]) -> list[str]:
    """Return in lines how near the plan is: to all, to held-out rows, and with its own speed of attention."""
    others, alike = [c for c in found if not c.chosen_by], like_ours(own)
    return [
        f"{near(found)} of {len(found)} within 20 %",
        f"without the rows that a constant was chosen by (*): {near(others)} of {len(others)}",
        f"with the plan's own speed of attention, where kernels are like ours: {near(alike)} of {len(alike)}",
        f"with the plan's own speed of attention, all rows: {near(own)} of {len(own)}",
    ]


def like_ours(found: list[Comparison]) -> list[Comparison]:
    """Return the comparisons with runs whose kernel for attention is none of the older ones."""
    return [c for c in found if older_attention(c.run) is None]


if __name__ == "__main__":
    sys.stdout.write(table(comparisons()) + "\n")
