"""pretrain in a process in which what argv[1] names takes long, and there may outlive the launcher by a second."""

import sys
import threading
from collections.abc import Callable
from typing import Any

from megagpt.cli.pretrain import pretrain
from megagpt.guards import watchdog
from megagpt.train import session, trainer, validation

PLACES = {  # where it is called, and for how many seconds it waits
    "the first step": (trainer, "train_step", None),
    "evaluating": (validation, "evaluate", None),
    "the last save": (session, "save_checkpoint", 6.0),
}


def slow(original: Callable[..., Any], seconds: float | None) -> Callable[..., Any]:
    def waits_first(*args: Any, **kw: Any) -> Any:
        watchdog.OUTLIVES = 1.0  # only from here on: on a busy machine a step before may take longer
        print("waiting", flush=True)
        threading.Event().wait(seconds)
        return original(*args, **kw)

    return waits_first


if __name__ == "__main__":
    module, name, seconds = PLACES[sys.argv[1]]
    setattr(module, name, slow(getattr(module, name), seconds))
    sys.exit(pretrain(sys.argv[2:]))
