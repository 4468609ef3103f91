"""Asynchronous saving: the state is copied to host memory, and a thread writes the copy while training continues.

Training changes the originals while the thread writes, so the copy must not share any memory with them.
"""

import io
import pickle
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import UntypedStorage
from torch.storage import TypedStorage

from megagpt.distributed.collectives import new_gloo_group
from megagpt.distributed.process_group import Group, print_rank0
from megagpt.errors import UserError, raised_on_every_rank


class Writer:
    """Runs one task at a time: in a thread of its own if `asynchronous`, else at once.

    `group` is for the collectives of asynchronous tasks, which must not mix with those of training; None is the default
    group. Making a Writer is collective. Use it in a `with` block, whose end waits for the task in flight: a rank that
    left its group earlier would leave the other ranks without its files.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self._asynchronous = asynchronous
        self._copies = HostCopies()
        self._thread = ThreadPoolExecutor(1, "writer")  # the interpreter waits for it before it exits
        self._in_flight: Future[None] | None = None
        self.seconds = 0.0  # that the last asynchronous task took
        self.group: Group = new_gloo_group() if asynchronous else None

    def start(self, files: dict[Path, Any], task: Callable[[dict[Path, Any]], None]) -> None:
        """Hand a copy of `files` (path -> content) to `task`; the originals may change as soon as this returns."""
        self.wait()
        if not self._asynchronous:
            task(files)
            return
        self._in_flight = self._thread.submit(self._timed, task, self._copies.of(files))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not raised_on_every_rank(error):  # the others may never reach their part of the task
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
        """Tell whether the task in flight has failed; `wait` raises its error."""
        return self._in_flight is not None and self._in_flight.done() and self._in_flight.exception() is not None

    def wait(self) -> None:
        """Wait for the task in flight; raises what it raised."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()


class HostCopies:
    """Copies of a nested state in host memory, pinned if it comes from a GPU; the next copy reuses the buffers."""

    def __init__(self) -> None:
        self._memory: list[UntypedStorage] = []

    def of(self, state: Any) -> Any:
        """Copy everything that torch.save would save; tensors that share a storage share one in the copy too.

        The previous copy is overwritten.
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
    """Leaves the contents of tensors out, as torch.save does, and lists their storages."""

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
    """Reads what _AllButStorages wrote a moment ago in this process; it is never given anything else."""

    def __init__(self, file: io.BytesIO, storages: list[UntypedStorage]) -> None:
        super().__init__(file)
        self._storages = storages

    def persistent_load(self, item: tuple[int, torch.dtype]) -> TypedStorage:
        number, dtype = item
        return TypedStorage(wrap_storage=self._storages[number], dtype=dtype, _internal=True)
