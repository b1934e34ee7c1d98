"""Times cbam_ops beside its peers: `python benchmarks/run.py --help`.

The suite itself is in the package, `cbam_ops._bench`, for `cbam-ops bench` to run it as well.
"""

import sys
from pathlib import Path

from cbam_ops._bench.run import main

if __name__ == "__main__":
    sys.exit(main(default_output=Path(__file__).parent / "results" / "results.csv"))
