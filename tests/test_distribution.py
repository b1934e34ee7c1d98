"""examples/train.py: one device or many processes, mixed precision, kills and bad disks.

The processes are real, on the loopback interface. What they end with is compared bit for bit where
TensorFlow computes in the same order, else in float64 with what one process makes of the parts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
from programs import HANGS

import cbam_ops
from cbam_ops.testing import MODEL_GRADIENT, assert_close, assert_same_bits

PROGRAM = Path(__file__).parents[1] / "examples" / "train.py"
# The moving statistics, in a file of weights: each worker keeps those of its own batches.
STATISTICS = re.compile(r"(batch_normalization\w*/vars/[23]|cbam\w*/vars/[78])$")
SHORT = ("--epochs", "2", "--steps", "4", "--every", "3")

pytestmark = pytest.mark.long


def start(
    output: Path, *arguments: str, task: dict | None = None, run: tuple = (PROGRAM,)
) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TF_CONFIG"}
    environment["CBAM_OPS_IMPLEMENTATION"] = "native"
    if task is not None:
        environment["TF_CONFIG"] = json.dumps(task)
    return subprocess.Popen(
        [sys.executable, *run, "--output", output, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=HANGS)
    assert process.returncode == code, out[-4000:]
    return out


@contextlib.contextmanager
def running(
    cluster: dict[str, int], output: Path, *arguments: str, run: tuple = (PROGRAM,)
) -> Iterator[dict]:
    """The processes of a cluster, by job and index; none survives the block."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(sum(cluster.values()))]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        ports = iter([each.getsockname()[1] for each in sockets])
        jobs = {job: [f"127.0.0.1:{next(ports)}" for _ in range(n)] for job, n in cluster.items()}
    processes = {
        (job, index): start(
            *(output, *arguments),
            task={"cluster": jobs, "task": {"type": job, "index": index}},
            run=run,
        )
        for job, addresses in jobs.items()
        for index in range(len(addresses))
    }
    try:
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
            process.stdout.close()


def weights(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(folder / "model.weights.h5") as file:
        file.visititems(
            lambda name, item: found.update({name: item[()]}) if hasattr(item, "shape") else None
        )
    return found


def assert_same_weights(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert_same_bits(actual[name], value, name)


def workers(count: int, output: Path, *arguments: str, saying: str = "") -> dict[str, np.ndarray]:
    """The weights of the first of so many workers, that the others have too."""
    with running({"worker": count}, output, *SHORT, *arguments) as processes:
        for process in processes.values():
            assert saying in end(process)
    of_chief = weights(output)
    trained = {name: value for name, value in of_chief.items() if not STATISTICS.search(name)}
    assert len(trained) < len(of_chief)
    for index in range(1, count):
        other = weights(output / f"worker{index}")
        assert_same_weights({name: other[name] for name in trained}, trained)
    return of_chief


def test_one_process_learns(tmp_path):
    """A progress bar, a checkpoint, logs for TensorBoard, and a model that Keras loads."""
    said = end(start(tmp_path, "--epochs", "5", "--jit", "--policy", "mixed_bfloat16"))
    assert "22/22" in said and "loss:" in said
    accuracy = float(said.rpartition("test accuracy ")[2].strip().rstrip("%"))
    assert accuracy > 80  # chance is 10 %
    assert tf.train.latest_checkpoint(tmp_path / "checkpoints")
    if importlib.util.find_spec("tensorboard"):
        assert list((tmp_path / "logs").iterdir())
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert [layer for layer in loaded.layers if isinstance(layer, cbam_ops.CBAM)]


def test_a_folder_of_images(tmp_path):
    random = np.random.default_rng(0)
    for label in ("cat", "dog", "owl"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for index in range(6):
            pixels = tf.constant(random.integers(256, size=(20, 17, 3)), tf.uint8)
            path = tmp_path / "photos" / label / f"{index}.png"
            path.write_bytes(tf.io.encode_png(pixels).numpy())
    arguments = ("--data", tmp_path / "photos", "--size", "32", "--batch", "6", "--epochs", "1")
    end(start(tmp_path / "out", *map(str, arguments)))
    assert keras.models.load_model(tmp_path / "out" / "model.keras").output_shape == (None, 3)
    (tmp_path / "empty").mkdir()
    said = end(start(tmp_path / "out", "--data", str(tmp_path / "empty")), code=1)
    assert said.strip().splitlines()[-1].endswith("files in them")


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_parts(monkeypatch: pytest.MonkeyPatch, parts: int) -> dict[str, np.ndarray]:
    """What one process makes of each replica's part of every batch.

    Gradients are summed. Each part has moving statistics of its own, as with Keras's batch norm;
    those of the first are the model's.
    """
    train = program()
    monkeypatch.setattr(sys, "argv", ["train.py", *SHORT, "--policy", "float64"])
    args, images = train.arguments(), train.Images(None, 8)
    trainer = train.Trainer(args, images, tf.distribute.get_strategy())
    keras.config.set_dtype_policy("float32")
    model = trainer.model
    statistics = model.non_trainable_variables
    own = [[v.numpy() for v in statistics] for _ in range(parts)]
    for epoch in range(args.epochs):
        part, steps = train.epoch_of(images, args, epoch, 0, parts)
        batches = iter(part(tf.distribute.InputContext(1, 0, parts)))
        for _ in range(steps):
            gradients = []
            for index in range(parts):
                for variable, value in zip(statistics, own[index], strict=True):
                    variable.assign(value)
                x, labels = next(batches)
                with tf.GradientTape() as tape:
                    logits = model(x, training=True)
                    losses = keras.losses.sparse_categorical_crossentropy(
                        labels, logits, from_logits=True
                    )
                    loss = tf.reduce_sum(losses) / args.batch
                gradients.append(tape.gradient(loss, model.trainable_variables))
                own[index] = [v.numpy() for v in statistics]
            summed = [tf.add_n(each) for each in zip(*gradients, strict=True)]
            trainer.optimizer.apply(summed, model.trainable_variables)
    for variable, value in zip(statistics, own[0], strict=True):
        variable.assign(value)
    return {v.path: v.numpy() for v in model.variables}


def test_replicas_of_one_process_compute_what_the_parts_come_to(tmp_path, monkeypatch):
    """MirroredStrategy, with batch norms and that of the spatial gate, to rounding."""
    end(start(tmp_path, *SHORT, "--cpus", "2", "--policy", "float64"))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = in_parts(monkeypatch, 2)
    for variable, (name, value) in zip(loaded.variables, expected.items(), strict=True):
        assert_close(variable.numpy(), value, MODEL_GRADIENT, name)


@pytest.mark.gpu
def test_gpus_compute_what_the_parts_come_to(tmp_path, monkeypatch):
    """The same on two GPUs, and twice to the bit."""
    if len(tf.config.list_physical_devices("GPU")) < 2:
        pytest.skip("needs two GPUs")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for name in ("one", "two"):
        end(start(tmp_path / name, *SHORT, "--policy", "float64"))
    assert_same_weights(weights(tmp_path / "two"), weights(tmp_path / "one"))
    loaded = keras.models.load_model(tmp_path / "one" / "model.keras")
    expected = in_parts(monkeypatch, 2)
    for variable, (name, value) in zip(loaded.variables, expected.items(), strict=True):
        assert_close(variable.numpy(), value, MODEL_GRADIENT, name)


@pytest.mark.parametrize(
    ("count", "policy"), [(2, "float32"), (2, "mixed_float16"), (3, "mixed_bfloat16")]
)
def test_workers_compute_what_replicas_of_one_process_do(tmp_path, count, policy):
    """MultiWorkerMirroredStrategy with real processes, to the bit."""
    actual = workers(count, tmp_path / "workers", "--policy", policy)
    end(start(tmp_path / "one", *SHORT, "--cpus", str(count), "--policy", policy))
    assert_same_weights(actual, weights(tmp_path / "one"))


@pytest.mark.parametrize("policy", ["float64", "mixed_float16"])
def test_a_parameter_server_computes_what_one_process_does(tmp_path, policy):
    cluster = {"chief": 1, "worker": 1, "ps": 1}
    arguments = (*SHORT, "--policy", policy)
    with running(cluster, tmp_path / "servers", *arguments) as processes:
        end(processes["chief", 0])
    end(start(tmp_path / "one", *arguments))
    actual, expected = weights(tmp_path / "servers"), weights(tmp_path / "one")
    for name, value in expected.items():
        assert_close(actual[name], value, MODEL_GRADIENT, name)


OVERFLOW = """
    import numpy as np, tensorflow as tf
    import train

    args = train.arguments()
    strategy = train.strategy_of(args.cpus)
    trainer = train.Trainer(args, train.Images(None, 8), strategy)
    replicas = strategy.num_replicas_in_sync

    def part(context):
        mine = np.split(np.arange(replicas), context.num_input_pipelines)[context.input_pipeline_id]
        samples = np.random.default_rng(0).random((3, replicas, 10, 8, 8, 1), np.float32)
        samples[1, replicas - 1] = np.inf
        samples = samples[:, mine].reshape(-1, 10, 8, 8, 1)
        labels = np.broadcast_to(np.arange(10), (len(samples), 10))
        return tf.data.Dataset.from_tensor_slices((samples, labels))

    def state():
        scaling = trainer.optimizer
        variables = trainer.model.trainable_variables + scaling.inner_optimizer.variables
        return [v.numpy() for v in variables], float(scaling.dynamic_scale.numpy())

    def same(some, others):
        return all((a == b).all() for a, b in zip(some, others, strict=True))

    batches = iter(strategy.distribute_datasets_from_function(part))
    states = [state()]
    for _ in range(3):
        trainer.step(batches)
        states.append(state())
    assert all(np.isfinite(w).all() for weights, _ in states for w in weights)
    assert not same(states[0][0], states[1][0]) and not same(states[2][0], states[3][0])
    assert same(states[1][0], states[2][0])
    assert [scale / states[0][1] for _, scale in states] == [1, 1, 0.5, 0.5]
"""


@pytest.mark.parametrize("engine", ["mirrored", "workers"])
def test_no_replica_takes_a_step_in_which_one_overflows(tmp_path, monkeypatch, engine):
    """Keras lets the first replica decide, and lets workers wait for each other for ever."""
    monkeypatch.setenv("PYTHONPATH", str(PROGRAM.parent))
    run, arguments = ("-c", textwrap.dedent(OVERFLOW)), ("--policy", "mixed_float16")
    if engine == "mirrored":
        end(start(tmp_path, *arguments, "--cpus", "2", run=run))
        return
    with running({"worker": 2}, tmp_path, *arguments, run=run) as processes:
        for process in processes.values():
            end(process)


# --- faults ---------------------------------------------------------------------------------------


def test_a_killed_worker_goes_on(tmp_path):
    """One of two is killed in mid-epoch; both are started again, as a cluster's manager does."""
    many = ("--epochs", "4", "--steps", "20")
    whole = workers(2, tmp_path / "whole", *many)
    killed = tmp_path / "killed"
    with running({"worker": 2}, killed, *SHORT, *many) as processes:
        deadline = time.time() + HANGS
        while not tf.train.latest_checkpoint(killed / "checkpoints"):
            assert time.time() < deadline and processes["worker", 0].poll() is None
            time.sleep(0.05)
        processes["worker", 1].send_signal(signal.SIGKILL)
        assert processes["worker", 1].wait() == -signal.SIGKILL
    for folder in (killed / "checkpoints", killed / "worker1" / "checkpoints"):
        for number in range(1, 30):  # as where both were writing
            half_written = folder / f"ckpt-{number}_temp"
            half_written.mkdir(parents=True, exist_ok=True)
            (half_written / "part-00000-of-00001.index").write_bytes(b"half")
    again = workers(2, killed, *many, saying="goes on after step ")
    assert_same_weights(again, whole)


def test_a_checkpoint_that_is_cut_off_is_passed_over(tmp_path):
    """The one before it is taken, and the run ends with the same weights."""
    end(start(tmp_path, *SHORT))
    whole = weights(tmp_path)
    newest = tf.train.latest_checkpoint(tmp_path / "checkpoints")
    (data,) = Path(newest).parent.glob(f"{Path(newest).name}.data*")
    data.write_bytes(data.read_bytes()[:1000])
    (tmp_path / "model.weights.h5").unlink()
    said = end(start(tmp_path, *SHORT))
    assert f"{newest} cannot be read and is passed over" in said
    assert "goes on after step 6" in said
    assert_same_weights(weights(tmp_path), whole)


@contextlib.contextmanager
def disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def writable(place: Path, yes: bool) -> None:
    subprocess.run(["mount", "-o", f"remount,{'rw' if yes else 'ro'}", place], check=True)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_bad_disk_ends_in_a_sentence(tmp_path, fault):
    """And the last good checkpoint is there, and is gone on from."""
    place = tmp_path / "disk"
    with disk(place, "3m"):
        end(start(place, "--epochs", "1", "--steps", "3", "--every", "3"))
        good = tf.train.latest_checkpoint(place / "checkpoints")
        if fault == "full":
            with contextlib.suppress(OSError), (place / "filler").open("wb") as filler:
                filler.write(bytes(2**22))
        else:
            writable(place, False)
        said = end(start(place, "--epochs", "2", "--steps", "3", "--every", "3"), code=1)
        last = said.strip().splitlines()[-1]
        assert last.startswith("cannot write into ") and f"(last good checkpoint: {good})" in last
        assert tf.train.latest_checkpoint(place / "checkpoints") == good
        if fault == "full":
            (place / "filler").unlink()
        else:
            writable(place, True)
        said = end(start(place, "--epochs", "2", "--steps", "3", "--every", "3"))
        assert "goes on after step 3" in said


def test_the_commands_of_the_page(tmp_path):
    """docs/scale.md: every line, one after the other."""
    root = PROGRAM.parents[1]
    page = (root / "docs/scale.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```sh\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "examples").symlink_to(root / "examples")
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-ec", python + commands], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "goes on after step 22" in done.stdout
    for output in ("trained", "half", "two"):
        assert (tmp_path / output / "model.keras").is_file()
