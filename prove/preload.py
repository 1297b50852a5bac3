"""What processes are forked from: libraries that say nothing, and everything that a job needs imported already."""

from ..chatter import hush

hush()

from . import jobs  # noqa: E402, F401
