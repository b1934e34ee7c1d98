"""What only shows in time or in bad company: leaks, racing threads, kills, several workers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from programs import HANGS

TRAINING = """
    import hashlib, os, signal, sys
    import keras
    import numpy as np
    import tensorflow as tf
    import cbam_ops

    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()
    cbam_ops.set_implementation("native")

    def model():
        keras.utils.set_random_seed(2)
        image = keras.Input((8, 8, 3))
        x = keras.layers.Conv2D(16, 3, padding="same")(image)
        x = cbam_ops.CBAM(ratio=4, kernel_size=3, spatial_batch_norm=True)(x)
        x = keras.layers.GlobalAveragePooling2D()(x)
        made = keras.Model(image, keras.layers.Dense(4)(x))
        made.compile(keras.optimizers.SGD(0.1, momentum=0.9),
                     keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return made

    random = np.random.default_rng(3)
    images = random.normal(size=(64, 8, 8, 3)).astype(np.float32)
    labels = random.integers(4, size=64)

    def digest(made):
        return hashlib.sha256(b"".join(w.tobytes() for w in made.get_weights())).hexdigest()
"""


def script(code: str) -> str:
    return textwrap.dedent(TRAINING) + textwrap.dedent(code)


def start(code: str, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_line(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, f"{out[-2000:]}\n{err[-4000:]}"
    return out.splitlines()[-1]


@pytest.mark.long
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_ten_thousand_steps_keep_their_memory(mode):
    """Fails where something is kept per call: 1 KB of it would come to 10 MB."""
    code = """
        import sys
        import tensorflow as tf
        import cbam_ops
        from cbam_ops.testing import Case

        cbam_ops.set_implementation("native")
        case = Case("cbam_with_batch_norm", size=(2, 4, 4, 8), residual=True)
        tensors = case.draw()

        def step():
            return case.gradients(cbam_ops, tensors)

        if sys.argv[1] != "eager":
            step = tf.function(step, jit_compile=sys.argv[1] == "xla", autograph=False)

        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096 / 2**20

        for _ in range(2000):  # allocators and caches fill up
            step()
        before = resident()
        for _ in range(10000):
            step()
        print(resident() - before)
    """
    assert float(last_line(start(textwrap.dedent(code), mode))) < 8.0


def test_threads_that_race_for_the_first_call_agree():
    """Sixteen threads make the first calls of a process, each with its own choice of
    implementation, switching as often as Python can."""
    code = """
        import sys, threading, warnings
        sys.setswitchinterval(1e-6)
        import numpy as np
        import tensorflow as tf
        import cbam_ops
        from cbam_ops import _loader
        from cbam_ops.testing import Case

        case = Case(size=(2, 6, 5, 16))
        tensors = case.draw()
        choices = ["native", "reference", "auto", None] * 4
        barrier = threading.Barrier(len(choices))
        results, faults = {}, []

        def work(index, choice):
            try:
                barrier.wait()
                for round in range(10):
                    if choice is None:
                        cbam_ops.set_implementation(["auto", "native"][round % 2])
                        cbam_ops.build_info()
                        y = case.call(cbam_ops, tensors)[0]
                        kind = "native"
                    else:
                        with cbam_ops.use_implementation(choice):
                            y = case.call(cbam_ops, tensors)[0]
                        kind = "reference" if choice == "reference" else "native"
                    results.setdefault(kind, set()).add(y.numpy().tobytes())
            except Exception as error:
                faults.append(f"{choice}: {error!r}")

        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            threads = [threading.Thread(target=work, args=item) for item in enumerate(choices)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
        assert not faults, faults
        assert {kind: len(bits) for kind, bits in results.items()} == {"native": 1, "reference": 1}
        assert results["native"] != results["reference"], "everybody ran the same thing"
        print("agreed")
    """
    assert last_line(start(textwrap.dedent(code))) == "agreed"


@pytest.mark.long
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not(tmp_path):
    code = script("""
        made, folder = model(), sys.argv[1]
        epochs = []

        class Epochs(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                epochs.append(epoch)

            def on_train_batch_end(self, batch, logs=None):
                if sys.argv[2] == "killed" and (epochs[-1], batch) == (2, 2):
                    os.kill(os.getpid(), signal.SIGKILL)

        made.fit(images, labels, batch_size=16, epochs=6, shuffle=False, verbose=0,
                 callbacks=[keras.callbacks.BackupAndRestore(folder), Epochs()])
        print(epochs[0], digest(made))
    """)
    first, whole = last_line(start(code, tmp_path / "whole", "goes on")).split()
    assert first == "0"
    process = start(code, tmp_path / "killed", "killed")
    process.communicate(timeout=HANGS)
    assert process.returncode == -signal.SIGKILL
    assert last_line(start(code, tmp_path / "killed", "goes on")).split() == ["2", whole]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.long
def test_two_workers_end_with_the_same_weights_and_those_of_one_process():
    """TensorFlow's own data-parallel engine over the loopback interface, with real processes."""
    code = """
        sizes = int(sys.argv[1])
        strategy = tf.distribute.get_strategy()
        if sizes > 1:
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
        with strategy.scope():
            kernel = tf.Variable(tf.random.stateless_normal((3, 3, 2, 1), (1, 1)))
            w0 = tf.Variable(tf.random.stateless_normal((8, 2), (1, 2)))
            w1 = tf.Variable(tf.random.stateless_normal((2, 8), (1, 3)))
        x = tf.random.stateless_normal((8, 6, 5, 8), (1, 4))
        weights = [w0, w1, kernel]

        @tf.function
        def step(x):
            def of_one(x):
                with tf.GradientTape() as tape:
                    y = cbam_ops.cbam(x, w0, None, w1, None, kernel)
                    loss = tf.reduce_sum(y * y) / 8
                gradients = tape.gradient(loss, weights)
                context = tf.distribute.get_replica_context()
                gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
                for weight, gradient in zip(weights, gradients):
                    weight.assign_sub(0.01 * gradient)
            strategy.run(of_one, args=(x,))

        rank = strategy.cluster_resolver.task_id if sizes > 1 else 0
        mine = x[rank * 8 // sizes : (rank + 1) * 8 // sizes]
        for _ in range(5):
            step(mine)
        print(" ".join(f"{value:.9g}" for w in weights for value in w.numpy().ravel()))
    """
    code = script(code)
    alone = last_line(start(code, "1"))
    ports = free_ports(2)
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    workers = [
        start(
            code,
            "2",
            TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
        )
        for index in range(2)
    ]
    first, second = (last_line(worker) for worker in workers)
    assert first == second
    for one, other in zip(first.split(), alone.split(), strict=True):
        assert abs(float(one) - float(other)) <= 1e-5 * max(1.0, abs(float(other)))


@pytest.mark.long
def test_a_full_disk_leaves_the_last_good_file(tmp_path):
    """A disk of 2 MB that something else fills while the demo's model is saved over an old one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        good = b"the last good model"
        (disk / "digits.keras").write_bytes(good)
        with (disk / "filler").open("wb") as filler:
            filler.write(bytes(2**21 - 3 * 4096))
        done = subprocess.run(
            [sys.executable, "-m", "cbam_ops", "demo", "--quick", "--output", disk],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2, done.stdout + done.stderr
        assert (disk / "digits.keras").read_bytes() == good
        assert sorted(path.name for path in disk.iterdir()) == ["digits.keras", "filler"]
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("cbam-ops demo: ") and "No space left" in last
    finally:
        subprocess.run(["umount", disk], check=True)
