"""Raise the limit of open files as far as the system allows; errors.py names it where that is too low."""

import resource

# Where the hard limit is a billion, as in some containers, programs that we start would close each number up to it.
MOST = 2**16


def raise_limit() -> None:
    """Raise this process's soft limit of open files to its hard one; processes that it starts inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
