"""Writing a step's files beside training: what they hold is copied in host memory, and a thread does the rest.

While the thread writes, training goes on and changes the originals. So nothing of them may be left in what it is given.
"""

import io
import pickle
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import UntypedStorage
from torch.storage import TypedStorage

from megagpt.atomic_files import write_atomically
from megagpt.checkpoint.commit import disk_errors
from megagpt.distributed.process_group import TIMEOUT, Group, print_rank0, world_size
from megagpt.errors import UserError, raised_on_every_rank


class Writer:
    """Runs one task at a time: in a thread of its own if `beside` training, else at once.

    `group` is for the tasks' collectives, so that they do not meet those of training; None: the usual one. Making a
    Writer is collective. Inside `with`, which waits for what is in flight: ranks that leave their group before would
    leave the others without their files.
    """

    def __init__(self, *, beside: bool) -> None:
        self._beside = beside
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "writer")  # which the interpreter waits for before it exits
        self._in_flight: Future[None] | None = None
        self.seconds = 0.0  # that the last task beside training took
        self.group: Group = dist.new_group(backend="gloo", timeout=TIMEOUT) if beside and world_size() > 1 else None

    def start(self, files: dict[Path, Any], task: Callable[[dict[Path, Any]], None]) -> None:
        """Hand `files` (path -> content) to `task`; what they hold may change as soon as this returns."""
        self.wait()
        if not self._beside:
            task(files)
            return
        self._in_flight = self._thread.submit(self._timed, task, self._copies.of(files))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not raised_on_every_rank(error):  # else the others may never write theirs
            return
        try:
            self.wait()
        except UserError as failed:
            if error is None:
                raise
            print_rank0(str(failed))

    def _timed(self, task: Callable[[dict[Path, Any]], None], files: dict[Path, Any]) -> None:
        began = time.monotonic()
        task(files)
        self.seconds = time.monotonic() - began

    @property
    def failed(self) -> bool:
        """Whether what is in flight has come to a bad end, which `wait` raises."""
        return self._in_flight is not None and self._in_flight.done() and self._in_flight.exception() is not None

    def wait(self) -> None:
        """Until nothing is in flight; raises what the task raised."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()


class HostCopies:
    """Copies of nested state in host memory, which the next copy takes again: equal states have equal sizes."""

    def __init__(self) -> None:
        self._memory: list[UntypedStorage] = []

    def of(self, state: Any) -> Any:
        """Everything that torch.save would save, with tensors that share storages sharing them again.

        The copy before it is overwritten.
        """
        pickled = io.BytesIO()
        pickler = _AllButStorages(pickled)
        pickler.dump(state)
        for i, storage in enumerate(pickler.storages):
            if i == len(self._memory):
                self._memory.append(UntypedStorage(0))
            if self._memory[i].nbytes() != storage.nbytes():
                self._memory[i] = _host_memory(storage.nbytes(), pinned=storage.is_cuda)
            self._memory[i].copy_(storage, non_blocking=True)
        if any(storage.is_cuda for storage in pickler.storages):
            torch.cuda.synchronize()
        pickled.seek(0)
        return _WithStorages(pickled, self._memory).load()


def _host_memory(n_bytes: int, *, pinned: bool) -> UntypedStorage:
    return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=pinned).untyped_storage()


class _AllButStorages(pickle.Pickler):
    """Leaves the contents of tensors out, as torch.save does, and lists where they are."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.storages: list[UntypedStorage] = []
        self._numbers: dict[int, int] = {}

    def persistent_id(self, item: Any) -> tuple[int, torch.dtype] | None:
        if not isinstance(item, TypedStorage):
            return None
        storage = item._untyped_storage  # as torch.save does; .untyped() warns
        number = self._numbers.setdefault(storage._cdata, len(self.storages))
        if number == len(self.storages):
            self.storages.append(storage)
        return number, item.dtype


class _WithStorages(pickle.Unpickler):
    """Reads what _AllButStorages wrote a moment ago in this process, and nothing else."""

    def __init__(self, file: io.BytesIO, storages: list[UntypedStorage]) -> None:
        super().__init__(file)
        self._storages = storages

    def persistent_load(self, item: tuple[int, torch.dtype]) -> TypedStorage:
        number, dtype = item
        return TypedStorage(wrap_storage=self._storages[number], dtype=dtype, _internal=True)


def write_files(step_dir: Path, files: dict[Path, Any]) -> None:
    """Bytes as they are, all else as torch.save does. Raises UserError if the disk cannot take them."""
    with disk_errors(step_dir):
        for path, content in files.items():
            if isinstance(content, bytes):
                write_atomically(path, content)
            else:
                write_state(path, content)


def write_state(path: Path, state: Any) -> None:
    """As torch.save, but an error of the disk is the OSError that it was."""
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch ends the file even so, which fails again, and hides the first error
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
