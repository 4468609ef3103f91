"""Format numbers and lists of names for people."""

from collections.abc import Iterable

SHOWN_NAMES, SHOWN_CHARACTERS = 20, 60  # more do not fit into a message


def format_share(share: float) -> str:
    """0.3123 -> '31.2%', with three digits however small it is."""
    return f"{100 * share:.3g}%"


def format_bytes(n_bytes: float) -> str:
    """1234567 -> '1.23 MB', in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"


def listed(names: Iterable[str]) -> str:
    """Join names by commas, as many and as much of each as a message has room for."""
    names = list(names)
    shown = ", ".join(shortened(name) for name in names[:SHOWN_NAMES])
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return f"{shown}{more}" or "none"


def shortened(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """Return the text, or its beginning and its length if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"
