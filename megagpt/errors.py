"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """What the user gave is wrong: printed as one message, exit code 2, no traceback."""


class OwnRankError(UserError):
    """Seen by this rank alone, which therefore prints it itself; any other UserError is the same on every rank."""
