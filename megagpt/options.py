"""Command-line options: a parser whose help and errors fit a terminal, and numbers within bounds."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from megagpt.terminal import on_a_screen, show

LARGEST = 2**63 - 1  # the largest integer of numpy, torch and Arrow
MOST_RANKS_HERE = 1024  # on one machine
MANY = 10**12  # steps, checkpoints, targets: beyond what anybody trains with, and what a list can count


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints as all commands do."""

    def print_help(self, file: Any = None) -> None:
        """Print the help, which may be more than its reader wants."""
        show(self.format_help(), end="")

    def error(self, message: str) -> NoReturn:
        """End with code 2 and a message of at most a screen, whatever was typed."""
        super().error(on_a_screen(message))


def whole(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """Return the type of an option that is a whole number from `low` to `high`, which may be written as 1e6."""

    def parse(text: str) -> int:
        number = _whole_number(text)
        if number is None or not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return number

    return parse


def _whole_number(text: str) -> int | None:
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError, OverflowError):
        if (number := float(text)) == int(number):
            return int(number)
    return None


def decimal(low: float, high: float) -> Callable[[str], float]:
    """Return the type of an option that is a number from `low` to `high`."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return number

    return parse
