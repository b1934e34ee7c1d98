"""Makes tables and pictures of the figures: `python benchmarks/report.py --help`."""

import sys
from pathlib import Path

from cbam_ops._bench.report import main

if __name__ == "__main__":
    sys.exit(main(default_csv=Path(__file__).parent / "results" / "results.csv"))
