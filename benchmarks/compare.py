"""Finds regressions between two CSVs: `python benchmarks/compare.py OLD NEW --fail`."""

import sys

from cbam_ops._bench.compare import main

if __name__ == "__main__":
    sys.exit(main())
