"""The process that measures: `python -m cbam_ops._bench.worker THREADS`.

One process has one number of threads, and may be killed by what it measures without taking the run
with it. It reads a job per line of standard input (`{"case": {...}, "seconds": 1.0, ...}`) and
writes a line with its outcome to standard output; whatever else prints goes to standard error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from typing import Any, TextIO

from cbam_ops._bench.cases import Case, NetworkCase


def _as_case(values: dict[str, Any]) -> Case | NetworkCase:
    kind = NetworkCase if "depth" in values else Case
    lists = {name: tuple(v) for name, v in values.items() if isinstance(v, list)}
    return kind(**{**values, **lists})


def _serve(jobs: TextIO, answers: TextIO, threads: int) -> None:
    from cbam_ops._console import import_tensorflow

    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    import_tensorflow()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    try:
        import torch

        torch.set_num_threads(threads)
    except ImportError:
        pass
    from cbam_ops._bench import measure, network

    for line in jobs:
        job = json.loads(line)
        case = _as_case(job["case"])
        try:
            if isinstance(case, NetworkCase):
                outcome = network.measure_network(case, job["seconds"])
            else:
                outcome = measure.measure(case, job["seconds"], job["cache_bytes"])
            answer = dataclasses.asdict(outcome)
        except Exception as error:  # the next case may go well
            traceback.print_exc()
            text = " ".join(str(error).split())[:300]
            answer = {"failed": f"{type(error).__name__}: {text}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serves jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _serve(sys.stdin, answers, int(sys.argv[1]))


if __name__ == "__main__":
    main()
