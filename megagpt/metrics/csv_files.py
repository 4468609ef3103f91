"""Write a run's metrics as CSV files."""

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from megagpt.atomic_files import append_whole, write_atomically
from megagpt.config.run_file import RunConfig
from megagpt.metrics.metrics_file import Row, metrics_of


class CsvFiles:
    """A CSV file for each metric: step, value, tokens. Each start writes them from metrics.jsonl, and adds to them."""

    def __init__(self, run: RunConfig, rows: Iterable[Row]) -> None:
        self._folder = csv_folder(run)
        self._folder.mkdir(parents=True, exist_ok=True)
        lines: dict[str, list[list[Any]]] = {}
        for row in rows:
            for name, value in metrics_of(row).items():
                lines.setdefault(name, [self._head(name)]).append([row["step"], value, row["tokens_seen"]])
        for name, found in lines.items():
            write_atomically(self._file(name), _csv(found))
        self._begun = set(lines)

    def log(self, row: Row) -> None:
        """Add a row's metrics to their files."""
        for name, value in metrics_of(row).items():
            line = [row["step"], value, row["tokens_seen"]]
            if name in self._begun:
                append_whole(self._file(name), _csv([line]))
            else:
                write_atomically(self._file(name), _csv([self._head(name), line]))
                self._begun.add(name)

    def _head(self, name: str) -> list[str]:
        return ["step", name, "tokens_seen"]

    def _file(self, name: str) -> Path:
        return self._folder / f"{name.replace('/', '_')}.csv"


def csv_folder(run: RunConfig) -> Path:
    """Return the folder of a run's CSV files: out_dir/csv, unless csv_monitor names another."""
    cfg, out_dir = run.deepspeed.csv_monitor, run.megagpt.out_dir
    default = out_dir.resolve().name if cfg.output_path else "csv"
    return Path(cfg.output_path or out_dir) / (cfg.job_name or default)


def _csv(lines: Iterable[Sequence[Any]]) -> bytes:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()
