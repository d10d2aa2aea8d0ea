"""The one exception that a person at the terminal is meant to read, and how it names options."""


def flag(name: str) -> str:
    """The command line's spelling of a field: ``batch_size`` becomes ``--batch-size``."""
    return "--" + name.replace("_", "-")


class UserError(Exception):
    """One clear line for the person at the terminal: what is wrong, where, and what to do.

    Raised for everything that the person can put right (a missing path, a corrupt file, an unknown
    name); the command line prints it without a traceback and exits with status 2. The text is
    always a single line, so that texts of other libraries can be quoted in it.

    Attributes:
        status: the exit status.
    """

    status = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class LostError(UserError):
    """Another process is gone: nothing is wrong with the command, which may simply run again."""

    status = 75  # EX_TEMPFAIL of sysexits.h
