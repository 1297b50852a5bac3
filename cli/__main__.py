"""``python -m tdm.cli`` is ``tdm``."""

import sys

from . import main

sys.exit(main())
