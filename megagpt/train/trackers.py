"""Send a run's metrics to trackers: Weights & Biases, MLflow, CSV files.

A run is one run there, over all its starts. tracker.json in its folder holds that run's id and the last step that was
sent of each metric, because these services delete nothing: what an earlier attempt sent is not sent again, and what
could not be sent is sent later, from metrics.jsonl.
"""

import csv
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, Protocol

from megagpt.atomic_files import append_whole, write_atomically
from megagpt.config.run_file import RunConfig
from megagpt.distributed.process_group import print_rank0
from megagpt.errors import UserError
from megagpt.train.metrics_file import Row, metrics_of
from megagpt.train.tensorboard_file import hyperparameters
from megagpt.train.wandb_file import last_offline_step

RECORD = "tracker.json"
CLOSE_SECONDS = 20.0  # to send what is left at the end
Values = dict[str, float]


class Tracker(Protocol):
    """A service that keeps runs. `taken`: the last step that it has, for one that takes none before it."""

    name: ClassVar[str]
    id: str
    taken: int | None

    def send(self, rows: Sequence[tuple[Row, Values]]) -> None:
        """Add the values of each row."""

    def close(self) -> None:
        """End the run, until a later start continues it."""


class WeightsAndBiases:
    """A run of Weights & Biases; its steps are ours."""

    name = "Weights & Biases"

    def __init__(self, run: RunConfig, run_id: str | None) -> None:
        wandb, cfg, out_dir = import_module("wandb"), run.deepspeed.wandb, run.megagpt.out_dir
        # else it would ask at the terminal for a key, and wait
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise UserError("there is no key on this machine; run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=cfg.project,
            group=cfg.group,
            entity=cfg.team,
            name=out_dir.resolve().name,
            id=run_id,
            resume="allow",
            dir=str(out_dir),
            config=run.as_json(),
            allow_val_change=True,
            # A git remote's address may hold a password.
            settings=wandb.Settings(console="off", disable_git=True, save_code=False),
        )
        self.id = str(self._run.id)
        self.taken = self._run.starting_step - 1
        if self._run.offline and run_id is not None:
            self.taken = last_offline_step(out_dir / "wandb", run_id)

    def send(self, rows: Sequence[tuple[Row, Values]]) -> None:
        """Add the values of each row."""
        for row, values in rows:
            self._run.log(values, step=row["step"])

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


class MLflow:
    """A run of MLflow, on the server that MLFLOW_TRACKING_URI names, else in a database next to the run's folder."""

    name, taken = "MLflow", None

    def __init__(self, run: RunConfig, run_id: str | None) -> None:
        # else a start would wait for minutes for a server that is not there
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        mlflow, out_dir = import_module("mlflow"), run.megagpt.out_dir.resolve()
        self._entities = import_module("mlflow.entities")
        given = import_module("mlflow.environment_variables").MLFLOW_TRACKING_URI.get()
        if not given and find_spec("sqlalchemy") is None:
            raise UserError("set MLFLOW_TRACKING_URI to your server's address; for a database here, pip install mlflow")
        self._client = mlflow.MlflowClient(tracking_uri=given or f"sqlite:///{out_dir.parent / 'mlflow.db'}")
        if run_id is not None:
            self.id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        name = run.megagpt.mlflow.experiment
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self.id = str(self._client.create_run(experiment, run_name=out_dir.name).info.run_id)
        settings = [self._entities.Param(key, str(value)) for key, value in hyperparameters(run).items()]
        self._client.log_batch(self.id, params=settings)

    def send(self, rows: Sequence[tuple[Row, Values]]) -> None:
        """Add the values of each row."""
        points = [
            self._entities.Metric(name, value, round(1000 * row.get("time", 0.0)), row["step"])
            for row, values in rows
            for name, value in values.items()
        ]
        for begin in range(0, len(points), 1000):  # the most that it takes at a time
            self._client.log_batch(self.id, metrics=points[begin : begin + 1000])

    def close(self) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self.id)


class Feed:
    """Sends rows to a tracker in a thread, so that a slow or absent service delays no step."""

    def __init__(self, tracker: Tracker, record: "Record", rows: Iterable[Row]) -> None:
        self._tracker, self._record = tracker, record
        self._queue: SimpleQueue[Row | None] = SimpleQueue()
        for row in rows:
            self._queue.put(row)
        self._thread = threading.Thread(target=self._send_all, daemon=True, name=f"feed of {tracker.name}")
        self._thread.start()

    def log(self, row: Row) -> None:
        """Send a row soon."""
        self._queue.put(row)

    def close(self) -> None:
        """Send what is left, within CLOSE_SECONDS."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            print_rank0(f"{self._tracker.name} did not take the last metrics in {CLOSE_SECONDS:.0f} s")

    def _send_all(self) -> None:
        tracker, record = self._tracker, self._record
        waiting: list[Row] = []
        ended, failing = False, False
        while not ended:
            new = [self._queue.get()]
            while not self._queue.empty():
                new.append(self._queue.get())
            waiting += [row for row in new if row is not None]
            ended = None in new
            try:
                sent = dict(record.sent)
                tracker.send([(row, values) for row in waiting if (values := _unsent(row, sent))])
                waiting, record.sent = [], sent
                if failing:
                    print_rank0(f"{tracker.name} takes metrics again")
                    record.write(exact=False)
                failing = False
                if ended:
                    tracker.close()
            except Exception as error:  # of any kind: no tracker may end a run
                if not failing:
                    print_rank0(f"metrics cannot be sent to {tracker.name} ({_short(error)}); they are sent later")
                    record.write(exact=True)
                failing = True
        record.write(exact=True)


class Record:
    """What tracker.json says of one tracker: the run's id there, and the last step that was sent of each metric."""

    def __init__(self, run: RunConfig, key: str, logged: Mapping[str, int]) -> None:
        """`logged`: the last step of each metric that earlier starts logged, whether or not it was saved."""
        self._file, self._key = run.megagpt.out_dir / RECORD, key
        self._folder = str(run.megagpt.out_dir.resolve())
        found = self._all().get(key, {})
        known = found.get("folder") == self._folder  # a copy of the run's folder is another run
        self.id: str | None = found["id"] if known else None
        self.sent: dict[str, int] = dict(found["sent"]) if known else {}
        if known and not found["exact"]:  # that start was killed
            self.sent = {name: max(self.sent.get(name, 0), logged.get(name, 0)) for name in {*self.sent, *logged}}

    def write(self, *, exact: bool) -> None:
        """Write the record. `exact`: no more is being sent than it says."""
        mine = {"id": self.id, "folder": self._folder, "sent": self.sent, "exact": exact}
        with suppress(OSError), _ONE_AT_A_TIME:
            write_atomically(self._file, json.dumps(self._all() | {self._key: mine}).encode())

    def _all(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_bytes())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}


_ONE_AT_A_TIME = threading.Lock()
TRACKERS: dict[str, type[Any]] = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def open_feeds(run: RunConfig, rows: Sequence[Row], logged: Sequence[Row]) -> list[Feed]:
    """Start to send rows to the trackers that the run file names: first those up to the step to resume from.

    `logged`: all that earlier starts logged. Raises UserError where a tracker refuses a new run; a run that it knows
    trains on without it.
    """
    is_on = {"wandb": run.deepspeed.wandb.enabled, "mlflow": run.megagpt.mlflow.enabled}
    last = {name: row["step"] for row in logged for name in ("tokens_seen", *metrics_of(row))}
    feeds = []
    for key, kind in TRACKERS.items():
        if not is_on[key] or (key == "wandb" and os.environ.get("WANDB_MODE") == "disabled"):
            continue
        record = Record(run, key, last)
        try:
            tracker: Tracker = kind(run, record.id)
        except Exception as error:
            section = "wandb" if key == "wandb" else "megagpt.mlflow"
            why = f"{section}.enabled=true: {kind.name} cannot be used ({_short(error)})"
            if record.id is None:
                raise UserError(f"{why}; fix that, or set {section}.enabled=false") from error
            print_rank0(f"{why}; training continues without it")
            record.write(exact=True)
            continue
        record.id = tracker.id
        if tracker.taken is not None:
            record.sent = dict.fromkeys(last, tracker.taken)
        record.write(exact=False)
        feeds.append(Feed(tracker, record, rows))
    return feeds


class CsvFiles:
    """A CSV file for each metric: step, value, tokens. Each start writes them from metrics.jsonl, and adds to them."""

    def __init__(self, run: RunConfig, rows: Iterable[Row]) -> None:
        cfg, out_dir = run.deepspeed.csv_monitor, run.megagpt.out_dir
        default = out_dir.resolve().name if cfg.output_path else "csv"
        self._folder = Path(cfg.output_path or out_dir) / (cfg.job_name or default)
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


def _csv(lines: Iterable[Sequence[Any]]) -> bytes:
    text = StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def _unsent(row: Row, sent: dict[str, int]) -> Values:
    """Return the values of a row that were not sent before, and note that they are."""
    values = {"tokens_seen": row["tokens_seen"], **metrics_of(row)}
    step: int = row["step"]
    new = {name: value for name, value in values.items() if step > sent.get(name, 0)}
    sent.update(dict.fromkeys(new, step))
    return new


def _short(error: Exception) -> str:
    """Return an error in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
