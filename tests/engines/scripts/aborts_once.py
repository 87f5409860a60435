"""The first launch is aborted, as a library in C++ does it; the second one ends well. Argument: a file that tells them apart."""

import os
import sys
from pathlib import Path

mark = Path(sys.argv[1])
if not mark.exists():
    mark.touch()
    os.abort()
print("well")
