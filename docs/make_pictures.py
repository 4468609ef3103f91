"""Draw the pictures of README.md from real runs: `python docs/make_pictures.py` after `make demo`."""

import sys
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


def draw_losses(metrics_file: Path, picture: Path) -> None:
    """Training and validation loss of one run over its steps."""
    rows = read_rows(metrics_file)
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(*curve(rows, "train/loss"), color="#4c72b0", label="train/loss, mean of 50 steps")
    axes.plot(*curve(rows, "val/loss"), color="#c44e52", marker="o", label="val/loss")
    axes.set(xlabel="step", ylabel="nats per token", title="make demo: 2.2 million parameters, two CPU cores")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw_losses(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo/metrics.jsonl"), HERE / "demo_losses.png")
