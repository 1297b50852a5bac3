"""The one exception a user is meant to read."""


class TDMError(ValueError):
    """A wrong input: its message is one line that says what was wrong and what to do.

    The command line prints the message and exits with code 2; in Python it is an ordinary ``ValueError``.
    """
