"""`python -m hf_cuttlefish` is the command `hf-cuttlefish`."""

import sys

from .cli.main import main

sys.exit(main())
