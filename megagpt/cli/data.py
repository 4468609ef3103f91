"""`megagpt data ...`: the dataset builder, the same program as `python -m data_tools ...`."""

from collections.abc import Sequence
from importlib import import_module

from megagpt.errors import UserError


def run(arguments: Sequence[str]) -> int:
    """Run a command of the builder; returns its exit code. Raises UserError if its packages are not installed."""
    try:
        # By name, as the builder is no part of this package.
        builder = import_module("data_tools.__main__")
    except ModuleNotFoundError as error:
        raise UserError(
            f"megagpt data needs the package {error.name}, which is not installed here; "
            "pip install 'megagpt[data]', or in a checkout pip install -e '.[data]'"
        ) from None
    return int(builder.main(arguments))
