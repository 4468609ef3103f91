"""Language identification by a fastText model that the user supplies, such as lid.176 or GlotLID."""

from functools import lru_cache
from pathlib import Path
from typing import Protocol, cast

from pydantic import Field

from data_tools.option_types import Names
from megagpt.config.parsing import Strict, UserPath
from megagpt.errors import UserError
from megagpt.git_pointers import MOST_POINTER, pointer_instead_of

MAGIC = (793712314).to_bytes(4, "little")  # the first bytes of a fastText model
INSTALL = "pip install fasttext-numpy2-wheel"


class LanguageConfig(Strict):
    """The model, and which of its languages to keep."""

    model: UserPath = Field(description="a fastText classifier, such as lid.176.bin")
    keep: Names = Field(
        default=(), description="labels without '__label__', such as en,de; none: any language with such a score"
    )
    min_score: float = Field(default=0.65, ge=0.0, lt=1.0, description="a wanted language has a score above this")


class _Classifier(Protocol):
    def predict(self, text: str, k: int, threshold: float, on_unicode_error: str) -> list[tuple[float, str]]: ...


def language(text: str, cfg: LanguageConfig) -> str | None:
    """Return why the document is rejected, or None: no wanted language has a score above `min_score`."""
    line = text.replace("\n", " ") + "\n"  # fastText reads one line, including its newline
    found = load_language_model(cfg.model).predict(line, -1, cfg.min_score, "strict")
    for score, label in found:
        if score > cfg.min_score and (not cfg.keep or label.removeprefix("__label__") in cfg.keep):
            return None
    return f"not one of {', '.join(cfg.keep)}" if cfg.keep else "none that is clear"


@lru_cache(maxsize=4)
def load_language_model(path: Path) -> _Classifier:
    """Return the model inside fastText's Python wrapper, which does not work with numpy 2. Raises UserError."""
    try:
        from fasttext.FastText import _FastText  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(f"rules.language.model={path} needs fastText; install it with: {INSTALL}") from error
    try:
        with path.open("rb") as file:
            start = file.read(MOST_POINTER)
    except OSError as error:
        raise UserError(f"cannot read rules.language.model={path}: {error.strerror}") from error
    if not start.startswith(MAGIC):
        if message := pointer_instead_of(str(path), start):
            raise UserError(f"rules.language.model: {message}")
        raise UserError(f"rules.language.model={path} is not a fastText model; give one such as lid.176.bin")
    try:
        model = _FastText(str(path))
        labels = set(model.get_labels())
    except (ValueError, RuntimeError, MemoryError) as error:
        raise UserError(f"rules.language.model={path} cannot be loaded ({error}); is the file complete?") from error
    if not any(label.startswith("__label__") for label in labels):
        raise UserError(
            f"rules.language.model={path} is not a classifier: it has no labels; give one such as lid.176.bin"
        )
    return cast(_Classifier, model.f)
