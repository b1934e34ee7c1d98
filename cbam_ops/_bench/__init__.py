"""The benchmark suite: what is timed, against what, how, and what becomes of the figures.

`cases` lists the calls, `providers` who computes them, `measure` checks and times one case,
`network` whole networks, `run` goes through a plan in worker processes and keeps a CSV, `results`
reads and writes that, `compare` finds regressions between two of them, `report` makes tables and
pictures of one. `cbam-ops bench` and the scripts in the repository's folder `benchmarks/` start
them.

Everything is in the package, so that an installed copy can measure the machine it is on.
"""
