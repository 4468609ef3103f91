"""Tell which package of the extra `huggingface` is missing, before one of them is imported, which takes a second."""

from importlib.util import find_spec

from megagpt.errors import UserError


def check_installed(what: str, *packages: str) -> None:
    """Raise UserError naming the packages that `what` needs and that are not installed."""
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"{what} needs {', '.join(missing)}; install with pip install -e '.[huggingface]'")
