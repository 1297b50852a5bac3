"""The one exception a user is meant to read."""


class TDMError(ValueError):
    """A wrong input: its message is one line that says what was wrong and what to do.

    The command line prints the message and exits with code 2; in Python it is an ordinary ``ValueError``.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type where it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
