"""The one exception a user is meant to read."""


class TDMError(ValueError):
    """A wrong input: its message is one line that says what was wrong and what to do.

    The command line prints the message and exits with code 2; in Python it is an ordinary ``ValueError``.
    """


class BaseNotFoundError(TDMError):
    """There is no base that can be read under this name.

    Args:
        reason: what was asked for and why it cannot be read.
        remedy: how a caller names another base, in its own language: an argument of Python, or an option.
    """

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = reason


# The remedy where loading itself has no such option.
NO_STRICT = "tdm convert --no-strict leaves out what does not fit and writes the rest"


class PartialLoraError(TDMError):
    """Some tensors of a LoRA cannot be loaded onto a base. The others can, where the caller asks for that.

    Args:
        reason: which tensors, and why.
        remedy: how a caller asks for the others, in its own language: an argument of Python, an option, or a switch.
    """

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(f"{reason}; {remedy or 'strict=False leaves out what does not fit and loads the rest'}")
        self.reason = reason


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type where it has no message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
