"""Runs the command as `python -m dadpo_kernels.cli`."""

import sys

from .main import main

sys.exit(main())
