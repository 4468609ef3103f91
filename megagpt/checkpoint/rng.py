"""Save and restore the random generators of this process as plain JSON, so that a resumed rank draws the same."""

import base64
import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed every generator whose state is saved, so that two runs of one run file save the same."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_from(*numbers: int) -> int:
    """Derive one seed from several numbers, another one for each combination."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def rng_state() -> dict[str, Any]:
    """Return the state of every random generator of this process."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else torch.empty(0, dtype=torch.uint8)
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "cuda": base64.b64encode(cuda.numpy().tobytes()).decode(),
    }


def set_rng_state(saved: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    saved["numpy"]["state"]["key"] = np.array(saved["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state(saved["numpy"])
    torch.set_rng_state(_bytes(saved["torch"]))
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(saved["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
