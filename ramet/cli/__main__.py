"""`python -m ramet.cli`: the `ramet` command where its script is not on the path."""

import sys

from ramet.cli.main import main

sys.exit(main())
