"""``python -m tdm.cli`` is ``tdm``."""

import sys

from ..cli import main

sys.exit(main())
