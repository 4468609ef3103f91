"""Send a run's metrics to trackers: Weights & Biases, MLflow.

A run is one run there, over all its starts; tracker.json in its folder holds that run's id. These services delete
nothing, so what an earlier attempt sent is not sent again, and what could not be sent is sent later, from
metrics.jsonl. The service itself tells what it has, after a start that was killed or a request that failed.
"""

import json
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from queue import SimpleQueue
from typing import Any, ClassVar, Literal, Protocol

from megagpt.atomic_files import write_atomically
from megagpt.config.run_file import RunConfig
from megagpt.distributed.process_group import print_rank0
from megagpt.errors import UserError
from megagpt.metrics.metrics_file import Row, metrics_of
from megagpt.metrics.step_metrics import hyperparameters
from megagpt.metrics.wandb_file import last_offline_step

RECORD = "tracker.json"
# To send what is left at the end, to all trackers together: a launcher kills this rank 30 s after another has ended.
CLOSE_SECONDS = 15.0
ROWS_AT_A_TIME = 100
Values = dict[str, float]
Outcome = Literal["finished", "stopped", "failed"]  # "stopped": another start continues the run


class Tracker(Protocol):
    """A service that keeps runs."""

    name: ClassVar[str]
    id: str

    def taken(self, names: Iterable[str]) -> dict[str, int] | None:
        """Return the last step of each metric that the service has; None if it cannot tell."""

    def send(self, rows: Sequence[tuple[Row, Values]]) -> None:
        """Add the values of each row."""

    def close(self, outcome: Outcome) -> None:
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
        self.id, self._teardown = str(self._run.id), wandb.teardown
        self._last_step: int | None = self._run.starting_step - 1
        if self._run.offline and run_id is not None:
            self._last_step = last_offline_step(out_dir / "wandb", run_id)

    def taken(self, names: Iterable[str]) -> dict[str, int] | None:
        """Return the last step that the run had when it was opened: it takes none before it, of any metric."""
        return None if self._last_step is None else dict.fromkeys(names, self._last_step)

    def send(self, rows: Sequence[tuple[Row, Values]]) -> None:
        """Add the values of each row."""
        for row, values in rows:
            self._run.log(values, step=row["step"])

    def close(self, outcome: Outcome) -> None:
        """Wait until all is sent."""
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)
        self._teardown()  # `finish` may return before an offline run's file is written, which the next start reads


class MLflow:
    """A run of MLflow, on the server that MLFLOW_TRACKING_URI names, else in a database next to the run's folder."""

    name = "MLflow"
    STATUS: ClassVar[dict[Outcome, str]] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

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

    def taken(self, names: Iterable[str]) -> dict[str, int] | None:
        """Return the last step of each metric that the run has."""
        return {metric.key: metric.step for metric in self._client.get_run(self.id).data.to_proto().metrics}

    def send(self, rows: Sequence[tuple[Row, Values]]) -> None:
        """Add the values of each row."""
        points = [
            self._entities.Metric(name, value, round(1000 * row.get("time", 0.0)), row["step"])
            for row, values in rows
            for name, value in values.items()
        ]
        for begin in range(0, len(points), 1000):  # the most that it takes at a time
            self._client.log_batch(self.id, metrics=points[begin : begin + 1000])

    def close(self, outcome: Outcome) -> None:
        """Mark the run as ended."""
        self._client.set_terminated(self.id, self.STATUS[outcome])


class Feed:
    """Sends rows to a tracker in a thread, so that a slow or absent service delays no step."""

    def __init__(self, tracker: Tracker, record: "Record", rows: Iterable[Row]) -> None:
        self._tracker, self._record = tracker, record
        self._outcome: Outcome = "finished"
        self._queue: SimpleQueue[Row | None] = SimpleQueue()
        for row in rows:
            self._queue.put(row)
        self._thread = threading.Thread(target=self._send_all, daemon=True, name=f"feed of {tracker.name}")
        self._thread.start()

    def log(self, row: Row) -> None:
        """Send a row soon."""
        self._queue.put(row)

    def end(self, outcome: Outcome) -> None:
        """Send what is left, and close the tracker."""
        self._outcome = outcome
        self._queue.put(None)

    def wait(self, seconds: float) -> None:
        """Wait until the tracker is closed."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            print_rank0(
                f"{self._tracker.name} did not take the last metrics in {CLOSE_SECONDS:.0f} s; a start that trains "
                "further sends them from metrics.jsonl"
            )

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
                if failing:  # the request that failed may have arrived, or a part of it
                    record.add(tracker.taken(record.sent) or {})
                while waiting:
                    sent = dict(record.sent)
                    tracker.send([(row, values) for row in waiting[:ROWS_AT_A_TIME] if (values := _unsent(row, sent))])
                    del waiting[:ROWS_AT_A_TIME]
                    record.sent = sent
                    record.write()
                if failing:
                    print_rank0(f"{tracker.name} takes metrics again")
                failing = False
                if ended:
                    tracker.close(self._outcome)
            except Exception as error:  # of any kind: no tracker may end a run
                if not failing:
                    print_rank0(f"metrics cannot be sent to {tracker.name} ({_short(error)}); they are sent later")
                failing = True


class Record:
    """Holds what tracker.json says of one tracker: the run's id there, and the last step sent of each metric."""

    def __init__(self, run: RunConfig, key: str) -> None:
        self._file, self._key = run.megagpt.out_dir / RECORD, key
        self._folder = str(run.megagpt.out_dir.resolve())
        found = self._all().get(key, {})
        known = found.get("folder") == self._folder  # a copy of the run's folder is another run
        self.id: str | None = found["id"] if known else None
        self.sent: dict[str, int] = dict(found["sent"]) if known else {}

    def add(self, taken: Mapping[str, int]) -> None:
        """Note that a tracker has each metric up to a step."""
        self.sent |= {name: max(step, self.sent.get(name, 0)) for name, step in taken.items()}

    def write(self) -> None:
        """Write the record."""
        mine = {"id": self.id, "folder": self._folder, "sent": self.sent}
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
    names = {name for row in logged for name in ("tokens_seen", *metrics_of(row))}
    feeds: list[Feed] = []
    for key, kind in TRACKERS.items():
        if not is_on[key] or (key == "wandb" and os.environ.get("WANDB_MODE") == "disabled"):
            continue
        record = Record(run, key)
        try:
            tracker: Tracker = kind(run, record.id)
            if (taken := tracker.taken(names)) is not None:
                record.sent = taken
        except Exception as error:
            section = "wandb" if key == "wandb" else "megagpt.mlflow"
            why = f"{section}.enabled=true: {kind.name} cannot be used ({_short(error)})"
            if record.id is None:
                close_feeds(feeds, "failed")
                raise UserError(f"{why}; fix that, or set {section}.enabled=false") from error
            print_rank0(f"{why}; training continues without it")
            continue
        record.id = tracker.id
        record.write()
        feeds.append(Feed(tracker, record, rows))
    return feeds


def close_feeds(feeds: Iterable[Feed], outcome: Outcome) -> None:
    """Send what is left and close the trackers, within CLOSE_SECONDS for all of them."""
    deadline = time.monotonic() + CLOSE_SECONDS
    for feed in feeds:
        feed.end(outcome)
    for feed in feeds:
        feed.wait(max(0.0, deadline - time.monotonic()))


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
