"""Trains a CBAM-ResNet on a folder of images or on scikit-learn's digits.

    python examples/train.py                             # the digits, a minute
    python examples/train.py --data photos               # photos/<class>/<image>.jpg or .png
    python examples/train.py --policy mixed_bfloat16 --jit
    python examples/train.py --cpus 2                    # two replicas on logical CPUs
    TF_CONFIG=... python examples/train.py               # a process of many (docs/scale.md)

On several GPUs of one machine it trains on all of them. A run that ended early, or was killed, goes
on from its last checkpoint when the same line is run again, and ends with the same weights.
TensorBoard reads the folder `logs` in the output.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import cbam_ops

HELD_OUT = 4  # every so many-th sample is for the test
POLICIES = ("float32", "mixed_bfloat16", "mixed_float16", "float64")


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with a folder of images per class")
    parser.add_argument("--size", type=positive, default=64, help="images are scaled to this")
    parser.add_argument("--epochs", type=positive, default=10)
    parser.add_argument("--batch", type=positive, default=60, help="images of a step")
    parser.add_argument("--rate", type=float, default=0.05, help="learning rate")
    parser.add_argument("--policy", default="float32", choices=POLICIES)
    parser.add_argument("--jit", action="store_true", help="compile the step by XLA")
    parser.add_argument("--cpus", type=positive, default=1, help="replicas on logical CPUs")
    parser.add_argument("--steps", type=positive, help="an epoch has at most so many")
    parser.add_argument("--every", type=positive, default=20, help="steps between checkpoints")
    parser.add_argument("--output", type=Path, default=Path("trained"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


# --- where it runs --------------------------------------------------------------------------------


def strategy_of(cpus: int) -> tf.distribute.Strategy:
    cluster = json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {})
    if "ps" in cluster:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        if resolver.task_type in ("worker", "ps"):
            server = tf.distribute.Server(
                resolver.cluster_spec(),
                job_name=resolver.task_type,
                task_index=resolver.task_id,
                protocol="grpc",
            )
            server.join()
        return tf.distribute.ParameterServerStrategy(resolver)
    if cluster:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if cpus > 1:
        (cpu, *_) = tf.config.list_physical_devices("CPU")
        parts = [tf.config.LogicalDeviceConfiguration() for _ in range(cpus)]
        tf.config.set_logical_device_configuration(cpu, parts)
        return tf.distribute.MirroredStrategy([f"CPU:{index}" for index in range(cpus)])
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    return tf.distribute.get_strategy()


# --- data -----------------------------------------------------------------------------------------


class Images:
    """Samples by their indices: digits in memory, or files that are read when they are needed."""

    def __init__(self, folder: Path | None, size: int) -> None:
        self._size = size
        if folder is None:
            from sklearn.datasets import load_digits

            digits = load_digits()
            self.shape: tuple[int, ...] = (8, 8, 1)
            self._samples = digits.images[..., None].astype(np.float32) / 16
            self._labels, self.classes = digits.target, 10
        else:
            names = sorted(path.name for path in folder.glob("*") if path.is_dir())
            suffixes = (".jpg", ".jpeg", ".png")
            files = [
                (str(path), label)
                for label, name in enumerate(names)
                for path in sorted((folder / name).iterdir())
                if path.suffix.lower() in suffixes
            ]
            if not files:
                sys.exit(f"{folder} has no folders with {', '.join(suffixes)} files in them")
            self.shape = (size, size, 3)
            self._samples = np.array([path for path, _ in files])
            self._labels, self.classes = np.array([label for _, label in files]), len(names)
        self._files = folder is not None
        everything = np.random.default_rng(0).permutation(len(self._labels))
        self.test, self.training = everything[::HELD_OUT], np.delete(everything, np.s_[::HELD_OUT])

    def dataset(self, indices: np.ndarray) -> tf.data.Dataset:
        samples = tf.data.Dataset.from_tensor_slices(
            (self._samples[indices], self._labels[indices].astype(np.int64))
        )
        return samples.map(self._read, tf.data.AUTOTUNE) if self._files else samples

    def _read(self, path: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.io.decode_image(tf.io.read_file(path), 3, expand_animations=False)
        image = tf.image.resize(image, (self._size, self._size), antialias=True)
        return tf.ensure_shape(image / 255.0, self.shape), label


def epoch_of(images: Images, args: argparse.Namespace, epoch: int, first_step: int, replicas: int):
    """A function that gives a process its part of an epoch, from a step on, in a fixed order."""
    order = np.random.default_rng((args.seed, epoch)).permutation(images.training)
    steps = min(len(order) // args.batch, args.steps or len(order))
    order = order[first_step * args.batch : steps * args.batch]

    def part(context: tf.distribute.InputContext) -> tf.data.Dataset:
        local = replicas // context.num_input_pipelines
        batches = images.dataset(order).batch(args.batch // replicas).batch(local)
        mine = batches.shard(context.num_input_pipelines, context.input_pipeline_id)
        return mine.unbatch().prefetch(2)

    return part, steps


# --- the network and its steps --------------------------------------------------------------------


def network(images: Images) -> keras.Model:
    """For the digits a small one, for photographs the paper's CBAM-ResNet-18."""
    if images.shape != (8, 8, 1):
        return cbam_ops.models.CBAMResNet18(
            input_shape=images.shape, classes=images.classes, classifier_activation=None
        )
    image = keras.Input(images.shape)

    def conv(x, filters, strides=1):
        x = keras.layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        return keras.layers.BatchNormalization(momentum=0.9)(x)

    x = keras.layers.ReLU()(conv(image, 16))
    for filters, strides in ((16, 1), (32, 2)):
        shortcut = conv(x, filters, strides)
        x = conv(keras.layers.ReLU()(conv(x, filters, strides)), filters)
        cbam = cbam_ops.CBAM(
            8, 3, spatial_batch_norm=True, activation="relu", batch_norm_momentum=0.9
        )
        x = cbam(x, residual=shortcut)
    x = keras.layers.GlobalAveragePooling2D()(x)
    whole = keras.config.dtype_policy().variable_dtype  # in mixed precision float32
    return keras.Model(image, keras.layers.Dense(images.classes, dtype=whole)(x))


class Trainer:
    """A model with its optimizer, and the steps that all replicas run."""

    def __init__(
        self, args: argparse.Namespace, images: Images, strategy: tf.distribute.Strategy
    ) -> None:
        self._strategy, self._batch = strategy, args.batch
        with strategy.scope():
            keras.utils.set_random_seed(args.seed)
            keras.config.set_dtype_policy(args.policy)
            self.model = network(images)
            optimizer = keras.optimizers.SGD(args.rate, momentum=0.9, nesterov=True)
            if args.policy == "mixed_float16":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
            optimizer.build(self.model.trainable_variables)
            self.optimizer = optimizer
        self.step = tf.function(self._run_step)
        self._of_replica = (
            tf.function(self._replica_step, jit_compile=True) if args.jit else (self._replica_step)
        )

    def _replica_step(self, x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            logits = self.model(x, training=True)
            losses = keras.losses.sparse_categorical_crossentropy(labels, logits, from_logits=True)
            loss = tf.reduce_sum(losses) / self._batch  # the replicas' sum is the batch's mean
            scaled = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(scaled, self.model.trainable_variables)
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            gradients = agreed(gradients)
        self.optimizer.apply(gradients, self.model.trainable_variables)  # sums over the replicas
        return loss

    def _run_step(self, iterator: Iterator) -> tf.Tensor:
        losses = self._strategy.run(self._of_replica, args=next(iterator))
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, losses, axis=None)

    def accuracy(self, images: Images) -> float:
        right = total = 0
        for x, labels in images.dataset(images.test).batch(256):
            answers = tf.argmax(self.model(x, training=False), axis=-1)
            right += int(tf.reduce_sum(tf.cast(answers == labels, tf.int32)))
            total += len(labels)
        return right / total


def agreed(gradients: list[tf.Tensor]) -> list[tf.Tensor]:
    """NaN for all gradients where any replica's overflow, so that all replicas pass over the step.

    `LossScaleOptimizer` looks at a replica's own gradients, before they are summed.
    """
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(each)) for each in gradients])
    overflows = tf.distribute.get_replica_context().all_reduce(
        tf.distribute.ReduceOp.SUM, tf.cast(tf.logical_not(finite), tf.float32)
    )
    return [tf.where(overflows > 0, np.nan, each) for each in gradients]


def restore(state: tf.train.Checkpoint, folder: Path) -> None:
    """Takes the newest checkpoint that is whole, if there is any."""
    known = tf.train.get_checkpoint_state(str(folder))
    for path in reversed(known.all_model_checkpoint_paths if known else []):
        try:
            state.restore(path).assert_existing_objects_matched()
            return
        except Exception as error:  # of many types
            why = str(error).strip().splitlines()[0]
            print(f"{path} cannot be read and is passed over: {why}", flush=True)


@contextlib.contextmanager
def writing(checkpoints: tf.train.CheckpointManager) -> Iterator[None]:
    """Where the block cannot write, the run ends with a sentence; what was saved before stays."""
    try:
        yield
    except (tf.errors.OpError, OSError) as error:
        print(flush=True)  # ends the progress bar's line
        why = str(error).strip().splitlines()[0]
        last = checkpoints.latest_checkpoint or "none"
        sys.exit(f"cannot write into {checkpoints.directory} (last good checkpoint: {last}): {why}")


def log(name: str, value: float, step: int) -> None:
    """For TensorBoard, where it is installed."""
    if tf.summary.should_record_summaries():
        tf.summary.scalar(name, value, step)


# --- a run ----------------------------------------------------------------------------------------


def main() -> None:
    args = arguments()
    strategy = strategy_of(args.cpus)
    replicas = strategy.num_replicas_in_sync
    if args.batch % replicas:
        sys.exit(f"--batch {args.batch} must be a multiple of the number of replicas, {replicas}")
    if args.jit and replicas > 1:
        sys.exit("--jit needs one replica: TensorFlow sends no gradients from inside XLA")
    images = Images(args.data, args.size)
    most = len(images.training)
    if args.batch > most:
        sys.exit(f"--batch must be 1 to {most}, the number of training images, got {args.batch}")
    trainer = Trainer(args, images, strategy)
    resolver = strategy.cluster_resolver
    servers = isinstance(strategy, tf.distribute.ParameterServerStrategy)
    chief = servers or resolver is None or not resolver.task_type or resolver.task_id == 0
    output = args.output if chief else args.output / f"worker{resolver.task_id}"
    done = tf.Variable(0, dtype=tf.int64, trainable=False)
    state = tf.train.Checkpoint(model=trainer.model, optimizer=trainer.optimizer, done=done)
    restore(state, args.output / "checkpoints")
    if int(done):
        print(f"goes on after step {int(done)}", flush=True)
    checkpoints = tf.train.CheckpointManager(state, str(output / "checkpoints"), max_to_keep=2)
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy) if servers else None
    _, steps = epoch_of(images, args, 0, 0, replicas)
    logs = contextlib.nullcontext()
    if chief and importlib.util.find_spec("tensorboard"):
        with writing(checkpoints):
            logs = tf.summary.create_file_writer(str(args.output / "logs")).as_default()
    with logs:
        for epoch in range(int(done) // steps, args.epochs):
            first = int(done) % steps
            part, _ = epoch_of(images, args, epoch, first, replicas)
            if coordinator:
                make = functools.partial(strategy.distribute_datasets_from_function, part)
                batches = iter(coordinator.create_per_worker_dataset(make))
            else:
                batches = iter(strategy.distribute_datasets_from_function(part))
            bar = keras.utils.Progbar(steps, verbose=int(chief), stateful_metrics=["loss"])
            for step in range(first, steps):
                if coordinator:
                    loss = coordinator.schedule(trainer.step, args=(batches,)).fetch()
                else:
                    loss = trainer.step(batches)
                done.assign_add(1)
                if int(done) % args.every == 0 or step + 1 == steps:
                    with writing(checkpoints):
                        checkpoints.save()
                bar.update(step + 1, [("loss", float(loss))])
                log("loss", float(loss), int(done))
            accuracy = trainer.accuracy(images)
            log("test accuracy", accuracy, int(done))
            if chief:
                print(f"epoch {epoch + 1}: test accuracy {accuracy:.1%}", flush=True)
    with writing(checkpoints):
        trainer.model.save_weights(output / "model.weights.h5")
        if chief:
            trainer.model.save(output / "model.keras")


if __name__ == "__main__":
    main()
