"""Write a run's curves, samples and hyperparameters as TensorBoard's event files.

Each start writes a file of its own, and TensorBoard reads them in the order of their names. A second file, whose name
comes first, holds what describes the run now (run file, hyperparameters, charts), and each start replaces it.

An earlier attempt may have logged steps after the checkpoint that a start resumes from. They are dropped twice: from
the files, and by an event that tells a TensorBoard which has read them already to forget them.
"""

import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.plugins.hparams.api_pb2 import DataType, Experiment, HParamInfo, MetricInfo, MetricName
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, text

from megagpt.atomic_files import append_whole, write_atomically
from megagpt.config.run_file import RunConfig
from megagpt.metrics.metrics_file import RENAMED, Row, metrics_of
from megagpt.metrics.step_metrics import hyperparameters

PREFIX = "events.out.tfevents."
DESCRIPTION = f"{PREFIX}0000000000.run"
VERSION = "brain.Event:2"
SCALARS = SummaryMetadata.PluginData(plugin_name="scalars")
SHOWN_FIRST = ("global_batch", "lr", "max_steps", "n_embd", "n_layer")
# The metrics that are drawn a second time, by tokens: the "step" of the tag by_tokens/NAME is a number of tokens. This
# group comes first, because TensorBoard sorts the groups and unfolds only the first ones.
DRAWN_BY_TOKENS = re.compile("train/loss|val/(ema_)?loss(/.*)?")
BY_TOKENS = "by_tokens/"

# What TensorBoard tells of a card.
DESCRIPTIONS = {
    "train/loss": "nats per token, mean over the steps since the point before",
    "val/loss": "nats per token, of the validation set; of several the mean, or the one that decides",
    "val/ema_loss": "val/loss of the averaged weights",
    "val/best_loss": "nats per token: the lowest val/loss up to here, of the best checkpoint",
    "val/median_loss": "nats per token: the median of the last evaluations, which decides when to stop",
    "val/train_gap": "nats per token: val/loss above the mean training loss since the evaluation before",
    "val/perplexity": "e to the val/loss",
    "val/bits_per_byte": "val/loss in bits per byte of text: comparable between tokenizers that lose no text",
    "optim/lr": "learning rate of the last step",
    "optim/muon_lr": "the same of what Muon updates, the matrices inside the blocks",
    "optim/grad_norm": "norm of the gradient of all ranks, before clipping",
    "optim/noise_scale": "sequences: the batch above which a larger one gains less (McCandlish et al. 2018)",
    "optim/skipped_steps": "optimizer updates that a guard skipped since the run began",
    "data/epoch": "passes over the first dataset",
    "data/wait_seconds_per_step": "seconds of a step in which rank 0 waits for data",
    "perf/tokens_per_sec": "tokens per second over all ranks, without evaluating, sampling and saving",
    "perf/mfu": "model FLOPs utilization: the model's FLOPs over the GPUs' peak",
    "perf/hfu": "hardware FLOPs utilization: as perf/mfu, with recomputation",
    "perf/memory_gib": "GiB: peak memory of rank 0",
    "perf/seconds_per_step": "seconds of a step, without waiting for data",
    "perf/eval_seconds": "seconds of an evaluation",
    "perf/sample_seconds": "seconds of generating the samples",
    "perf/tasks_seconds": "seconds of running the tasks of lm-evaluation-harness",
    "perf/save_seconds": "seconds for which training waits for a save",
    "perf/write_seconds": "seconds of an asynchronous save's write, in the background",
}
DESCRIPTIONS_OF_SETS = {
    "loss": "nats per token",
    "ema_loss": "nats per token, with the averaged weights",
    "perplexity": "e to the loss",
    "bits_per_byte": "loss in bits per byte of text",
}
CLUSTER = "over the ranks, seconds of a step in forward passes or in waiting for data, or the rank that takes longest"

# The charts of the tab Custom Scalars; the tags are regular expressions.
LAYOUT = {
    "loss": {
        "training and validation loss": ["Multiline", ["^train/loss$", "^val/(ema_)?loss(/.*)?$"]],
        "training and validation loss by tokens": [
            "Multiline",
            ["^by_tokens/train/loss$", "^by_tokens/val/(ema_)?loss(/.*)?$"],
        ],
    },
    "optimizer": {
        "learning rate": ["Multiline", ["^optim/lr$", "^optim/muon_lr$"]],
        "gradient norm": ["Multiline", ["^optim/grad_norm$"]],
    },
    "speed": {
        "tokens per second": ["Multiline", ["^perf/tokens_per_sec$"]],
        "seconds of a step, and of it waiting for data": [
            "Multiline",
            ["^perf/seconds_per_step$", "^data/wait_seconds_per_step$"],
        ],
    },
}


class TensorBoardFile:
    """The event file of one start."""

    def __init__(self, run: RunConfig, step: int, rows: Sequence[Row]) -> None:
        """Open the file. `step`: training resumes from it; `rows`: what was logged up to it."""
        folder = events_folder(run, resumed=step > 0)
        folder.mkdir(parents=True, exist_ok=True)
        self.name = str(folder)
        self._file = folder / f"{PREFIX}{_after_all(folder):017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._described: set[str] = set()
        first, description = step + 1, folder / DESCRIPTION
        # There is none in a run of an older megagpt, whose names were others, or where TensorBoard was always off.
        redrawn = [] if description.exists() else rows
        if folder.resolve().is_relative_to(run.megagpt.out_dir.resolve()):  # else other runs may write there too
            files = sorted(folder.glob(f"{PREFIX}*"))
            # Where it was off for some starts, or a disk was full, all is drawn again: TensorBoard joins the points of
            # a curve in the order of the files.
            if not _points(rows) <= {point for file in files for point in _drawn(file)}:
                redrawn = rows
            for file in files:
                _keep_up_to(file, step, max((row["tokens_seen"] for row in rows), default=0), redrawn)
        events = [Event(wall_time=time.time(), file_version=VERSION)]
        events += [Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START))]
        events += [e for row in redrawn for e in self._events(row)]
        if not redrawn:  # else they are among those
            # Points by tokens are forgotten as well, as if these were steps.
            events += [e for row in rows for e in self._events(row, by_step=False) if e.step >= first]
        self._append(events)
        write_atomically(description, _records(_description(run)))

    def log(self, row: Row) -> None:
        """Draw a row of metrics.jsonl."""
        self._append(self._events(row))

    def samples(self, samples: Iterable[tuple[str, str]], step: int) -> None:
        """Show generated texts, each a prompt and its continuation."""
        shown = [
            (f"**prompt**\n\n{_verbatim(prompt)}\n\n" if prompt else "") + f"**continuation**\n\n{_verbatim(more)}"
            for prompt, more in samples
        ]
        self._append([Event(wall_time=time.time(), step=step, summary=text("samples", "\n\n---\n\n".join(shown)))])

    def _events(self, row: Row, *, by_step: bool = True) -> list[Event]:
        wall_time = row.get("time", time.time())
        events = []
        for name, value in metrics_of(row).items():
            if by_step:
                events.append(Event(wall_time=wall_time, step=row["step"], summary=self._scalar(name, value)))
            if DRAWN_BY_TOKENS.fullmatch(name):
                summary = self._scalar(BY_TOKENS + name, value)
                events.append(Event(wall_time=wall_time, step=row["tokens_seen"], summary=summary))
        return events

    def _scalar(self, tag: str, value: float) -> Summary:
        """Return a point; a tag's first one in a file describes it."""
        metadata = None
        if tag not in self._described:
            about = _about(tag.removeprefix(BY_TOKENS))
            about += "; the horizontal axis counts tokens" * tag.startswith(BY_TOKENS)
            metadata = SummaryMetadata(plugin_data=SCALARS, display_name=tag, summary_description=about)
            self._described.add(tag)
        point = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(), float_val=[value])
        return Summary(value=[Summary.Value(tag=tag, tensor=point, metadata=metadata)])

    def _append(self, events: Iterable[Event]) -> None:
        append_whole(self._file, _records(events))


def _about(name: str) -> str:
    """Describe a metric."""
    if name.startswith("cluster/"):
        return CLUSTER
    group, _, measured = name.partition("/")
    kind, _, of_set = measured.partition("/")
    if group == "val" and of_set:
        return f"{DESCRIPTIONS_OF_SETS[kind]}, of the validation set {of_set}"
    return DESCRIPTIONS.get(name, "")


def events_folder(run: RunConfig, *, resumed: bool) -> Path:
    """Return the folder of a run's event files, which TensorBoard names the run by.

    That is out_dir, or with tensorboard.output_path a folder there of the same name; tensorboard.job_name is another.
    A run of an older megagpt, which had them in a folder `tensorboard`, keeps that.
    """
    board, out_dir = run.deepspeed.tensorboard, run.megagpt.out_dir
    base = Path(board.output_path or out_dir)
    if board.job_name:
        return base / board.job_name
    folder, former = (base / out_dir.resolve().name if board.output_path else out_dir), base / "tensorboard"
    if former.is_dir() and not any(folder.glob(f"{PREFIX}*")) and (resumed or not board.output_path):
        return former
    return folder


def _keep_up_to(file: Path, step: int, tokens: int, redrawn: Sequence[Row]) -> None:
    """Drop events after `step` from an event file, by tokens those after `tokens`, and points that are drawn again."""
    again = _points(redrawn) | {(name, row["step"]) for row in redrawn for name in row}

    def is_kept(event: Event) -> bool:
        tag = event.summary.value[0].tag if event.summary.value else ""
        last = tokens if tag.startswith(BY_TOKENS) else step
        return event.step <= last and (RENAMED.get(tag, tag), event.step) not in again

    before = file.read_bytes()
    after = b"".join(record for record, event in _parsed(before) if is_kept(event) or event.HasField("session_log"))
    if after != before:
        write_atomically(file, after)


def _points(rows: Iterable[Row]) -> set[tuple[str, int]]:
    """Return the tag and the step of each point of rows, by steps and by tokens."""
    points = set()
    for row in rows:
        names = metrics_of(row)
        points |= {(name, row["step"]) for name in names}
        points |= {(BY_TOKENS + name, row["tokens_seen"]) for name in names if DRAWN_BY_TOKENS.fullmatch(name)}
    return points


def _drawn(file: Path) -> Iterator[tuple[str, int]]:
    """Yield the tag and the step of each point in an event file."""
    return ((value.tag, event.step) for _, event in _parsed(file.read_bytes()) for value in event.summary.value)


def _parsed(records: bytes) -> Iterator[tuple[bytes, Event]]:
    """Yield the whole records of an event file: length, its checksum, an event, its checksum (8, 4, n and 4 bytes)."""
    begin = 0
    while begin + 12 <= len(records):
        n = int.from_bytes(records[begin : begin + 8], "little")
        end = begin + 12 + n + 4
        if end > len(records):  # cut short by a crash
            return
        try:
            yield records[begin:end], Event.FromString(records[begin + 12 : end - 4])
        except DecodeError:
            return
        begin = end


def _after_all(folder: Path) -> float:
    """Return the time for a file's name: now, or later if a host whose clock is ahead wrote here."""
    names = (path.name.removeprefix(PREFIX).split(".") for path in folder.glob(f"{PREFIX}*"))
    return max([time.time(), *(int(seconds) + 1.0 for seconds, *_ in names if seconds.isdigit())])


def _description(run: RunConfig) -> list[Event]:
    """Return the events of step 0, before all that a start draws: the run file, hyperparameters, charts."""
    run_file = _verbatim(json.dumps(run.as_json(), indent=2))
    values = hyperparameters(run)
    _, started, _ = hparams(values, {})
    summaries = [text("settings/run_file", run_file), custom_scalars(LAYOUT), _columns(values), started]
    return [
        Event(wall_time=time.time(), file_version=VERSION),
        *(Event(wall_time=time.time(), step=0, summary=summary) for summary in summaries),
    ]


def _columns(values: Mapping[str, float | str]) -> Summary:
    """Return the columns of the tab HParams, which shows five: by name, first those that it is told differ."""
    columns = [
        HParamInfo(
            name=name,
            type=DataType.Value("DATA_TYPE_STRING" if isinstance(value, str) else "DATA_TYPE_FLOAT64"),
            differs=name in SHOWN_FIRST,
        )
        for name, value in values.items()
    ]
    best = MetricInfo(name=MetricName(tag="val/best_loss"))
    data = HParamsPluginData(experiment=Experiment(hparam_infos=columns, metric_infos=[best]))
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=data.SerializeToString())
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag="_hparams_/experiment", metadata=metadata)])


def _verbatim(words: str) -> str:
    """Return Markdown that shows a text as it is."""
    return "\n".join("    " + line for line in words.split("\n"))


def _records(events: Iterable[Event]) -> bytes:
    buffer = BytesIO()
    writer = RecordWriter(buffer)
    for event in events:
        writer.write(event.SerializeToString())
    return buffer.getvalue()
