"""``python -m gspn2_diffusers`` is ``gspn2``."""

import sys

from gspn2_diffusers.cli import main

sys.exit(main())
