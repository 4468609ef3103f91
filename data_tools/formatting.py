"""Format numbers for people."""


def format_bytes(n_bytes: float) -> str:
    """1234567 -> '1.23 MB', in powers of 1,000."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.3g} TB"
