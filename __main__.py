"""``python -m tdm`` is ``tdm``."""

import sys

from .cli import main

sys.exit(main())
