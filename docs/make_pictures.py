"""Draw the picture of README.md from real runs, `make demo` and the same with plain GPT-2:

megagpt train ds_configs/demo.json megagpt.every.log=50
megagpt train ds_configs/demo_gpt2.json megagpt.every.log=50
python docs/make_pictures.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megagpt.metrics.metrics_file import read_rows

HERE = Path(__file__).parent


def curve(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric."""
    points = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def draw_losses(runs: dict[str, Path], picture: Path) -> None:
    """Training and validation losses of runs over their steps."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for (name, folder), color in zip(runs.items(), ("#4c72b0", "#c44e52"), strict=True):
        rows = read_rows(folder / "metrics.jsonl")
        axes.plot(*curve(rows, "train/loss"), color=color, alpha=0.4)
        axes.plot(*curve(rows, "val/loss"), color=color, marker="o", label=name)
    axes.set(xlabel="step", ylabel="nats per token", title="make demo: validation loss, and training loss pale")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    compared = {"make demo: Muon, Qwen3's blocks": "runs/demo", "AdamW, GPT-2's blocks": "runs/demo_gpt2"}
    draw_losses({name: Path(folder) for name, folder in compared.items()}, HERE / "demo_losses.png")
