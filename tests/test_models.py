"""The networks: published sizes, outputs against independent compositions, manners."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
import pytest
import tensorflow as tf

import cbam_ops
from cbam_ops import models, testing
from cbam_ops.layers import CBAM, ChannelAttention
from cbam_ops.testing import assert_close

SMALL = (32, 32, 3)
# Trainable parameters, and multiply-adds in G as far as they are published: with the stride where
# the release has it, and with the stride on the first 1x1 of a bottleneck.
RELEASED = {
    (18, "cbam"): (11_779_392, "1.815", None),
    (34, "cbam"): (21_960_468, "3.665", None),
    (50, "cbam"): (28_089_624, "4.096", "3.864362"),
    (101, "cbam"): (49_330_172, None, "7.581366"),
    (152, "cbam"): (66_826_848, None, None),
    (18, "se"): (None, "1.814", None),
    (50, "se"): (28_088_024, "4.092", "3.860488"),
    (101, "se"): (None, None, "7.574938"),
    (18, None): (None, "1.814", None),
    (34, None): (None, "3.664", None),
    (50, None): (25_557_032, "4.089", "3.857973"),
    (101, None): (None, None, "7.570194"),
}
SEED_TOTAL = {50: 42_714_184, 101: 81_876_251, 152: 114_137_454}


@pytest.fixture(autouse=True)
def _keras_defaults() -> Iterator[None]:
    """Every test starts from Keras's defaults."""
    policy, data_format = keras.config.dtype_policy(), keras.config.image_data_format()
    keras.utils.set_random_seed(7)
    yield
    keras.config.set_dtype_policy(policy)
    keras.config.set_image_data_format(data_format)


@pytest.fixture
def float64() -> Iterator[None]:
    """Networks in float64, whose memory is given back."""
    floatx = keras.config.floatx()
    keras.config.set_floatx("float64")  # the type of the inputs
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(floatx)
    keras.backend.clear_session()


@pytest.fixture(scope="module")
def small() -> keras.Model:
    """A network with weights that matter, which tests must leave as they are."""
    model = models.CBAMResNet18(input_shape=SMALL, classes=5)
    _randomize(model, np.random.default_rng(3))
    return model


def _constructor(depth: int, seed: bool = False):
    return getattr(models, f"{'Seed' if seed else ''}CBAMResNet{depth}")


def _trainable(model: keras.Model) -> int:
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


def _randomize(model: keras.Model, rng: np.random.Generator) -> None:
    """Gives every weight a value that matters: no gamma of 0, no bias of 0, no variance of 1."""
    for weight in model.weights:
        name, shape = weight.path.rsplit("/", 1)[-1], weight.shape
        if "variance" in name:
            value = rng.uniform(0.5, 2.0, shape)
        elif "gamma" in name:
            value = rng.uniform(0.5, 1.5, shape)
        elif len(shape) == 1:
            value = rng.uniform(-0.3, 0.3, shape)
        else:  # repeated, which takes a fraction of the time of drawing them all
            value = np.resize(rng.normal(size=10_007), shape) / np.sqrt(np.prod(shape[:-1]))
        weight.assign(value)


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "attention"), RELEASED)
def test_released_sizes(shapes_only, depth, attention):
    """Fails for a layer, a bias or a shortcut too many, or a stride in the wrong place."""
    if attention == "cbam":
        model = _constructor(depth)()
    else:
        model = models.build_resnet(depth, attention=attention)
    assert model.input_shape == (None, 224, 224, 3)
    assert model.output_shape == (None, 1000)
    assert model.name == f"{attention}_resnet{depth}".removeprefix("None_")
    parameters, multiply_adds, with_stride_on_first = RELEASED[depth, attention]
    assert parameters in (None, _trainable(model))
    for expected, on_first in ((multiply_adds, False), (with_stride_on_first, True)):
        if expected is not None:
            digits = len(expected.partition(".")[2])
            assert f"{_multiply_adds(model, on_first) / 1e9:.{digits}f}" == expected


# Of the paper's other networks; of MobileNet in M as its table has them, with its multiply-adds in
# G; of the network for CIFAR's images those of He et al.'s with projections.
OTHERS = {
    "CBAMResNeXt50": ({}, 27_561_496, None),
    "CBAMResNeXt101": ({}, 48_958_716, None),
    "CBAMResNet18, 1.5": ({"width": 1.5}, 26_075_516, None),
    "CBAMResNet18, 2": ({"width": 2}, 45_971_256, None),
    "CBAMMobileNet": ({}, "5.07", "0.576"),
    "CBAMMobileNet, 0.7": ({"width": 0.7}, "2.71", None),
}


@pytest.mark.parametrize("network", OTHERS)
def test_sizes_of_other_networks(shapes_only, network):
    """A wrong count means other widths, groups or places of modules than the paper's."""
    arguments, parameters, multiply_adds = OTHERS[network]
    model = getattr(models, network.partition(",")[0])(**arguments)
    assert _trainable(model) == parameters or f"{_trainable(model) / 1e6:.2f}" == parameters
    assert multiply_adds in (None, f"{_multiply_adds(model) / 1e9:.3f}")


def test_names_of_architectures():
    """Fails when a checkpoint's network is called otherwise than the constructor calls it."""
    row = models.DEPTHS[50]
    assert models.name_of(row) == "cbam_resnet50"
    assert models.name_of(row._replace(groups=32, group_width=4)) == "cbam_resnext50"
    assert models.name_of(row._replace(groups=2)) == "cbam_resnet"


def test_mobilenet(shapes_only):
    """Fails when the plain network is not Keras's, or a module is left out of the 27."""
    plain = models.build_resnet(28, network="mobilenet", attention=None)
    keras_own = keras.applications.MobileNet(weights=None)
    assert plain.name == "mobilenet"
    sizes, own_sizes = ([int(np.prod(w.shape)) for w in m.weights] for m in (plain, keras_own))
    assert sizes == own_sizes
    assert f"{_multiply_adds(plain) / 1e9:.3f}" == "0.569"
    squeezed = models.build_resnet(28, network="mobilenet", attention="se")
    assert f"{_multiply_adds(squeezed) / 1e9:.3f}" == "0.570"
    model = models.CBAMMobileNet()
    places = cbam_ops.add_attention(plain, dry_run=True)
    modules = [layer for layer in model.layers if isinstance(layer, CBAM)]
    assert [m.name for m in modules] == [p.layer.replace("_bn", "_cbam") for p in places]
    assert [m.output.shape for m in modules] == [p.shape for p in places]


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 272_474), (32, 466_906), (44, 661_338), (56, 855_770)]
)
def test_networks_for_cifar(shapes_only, depth, parameters):
    """Fails when a stage, a projection or the classifier is another than He et al.'s."""
    plain = models.build_resnet(depth, network="cifar", attention=None)
    assert (plain.input_shape, plain.output_shape) == ((None, 32, 32, 3), (None, 10))
    assert _trainable(plain) == parameters
    model = getattr(models, f"CBAMCIFARResNet{depth}")(include_top=False)
    assert model.name == f"cbam_cifar_resnet{depth}"
    assert model.output_shape == (None, None, None, 64)
    assert sum(isinstance(layer, CBAM) for layer in model.layers) == (depth - 2) // 2


@pytest.mark.parametrize("depth", SEED_TOTAL)
def test_seed_parameters(shapes_only, depth):
    """A wrong count means a departure from the network that the seed document defines."""
    model = _constructor(depth, seed=True)(input_shape=SMALL)
    assert model.count_params() == SEED_TOTAL[depth]
    assert model.name == f"seed_cbam_resnet{depth}"


def _multiply_adds(model: keras.Model, stride_on_first: bool = False) -> int:
    """Multiply-adds of convolutions and dense layers, read off the built graph.

    With `stride_on_first`, as if the strided bottlenecks had their stride on the first 1x1.
    """
    total = 0
    for layer in model.layers:
        if type(layer) is keras.layers.Conv2D:
            height, width = layer.output.shape[1:3]
            count = height * width * int(np.prod(layer.kernel.shape))
            first = layer.name.endswith("block1_1_conv") and not layer.name.startswith("conv2")
            total += count // 4 if stride_on_first and first else count
        elif isinstance(layer, keras.layers.Dense):
            total += int(np.prod(layer.kernel.shape))
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            total += int(np.prod(layer.output.shape[1:])) * layer.kernel.shape[0] ** 2
        elif isinstance(layer, CBAM | ChannelAttention):
            height, width = layer.output.shape[1:3]
            for weight in layer.weights:
                if len(weight.shape) == 2:  # the MLP runs on each pool
                    total += len(layer.pooling.split("+")) * int(np.prod(weight.shape))
                elif len(weight.shape) == 4:
                    total += height * width * int(np.prod(weight.shape))
    return total


# --- summary --------------------------------------------------------------------------------------


def test_summary_of_a_module_and_its_stock_form():
    """Fails when a fused op is not counted, or more than the network's own arithmetic."""
    for attention in ("cbam", "se", "stock", None):
        model = models.build_resnet(20, network="cifar", attention=attention)
        found = models.summary(model)
        expected = models.CBAMCIFARResNet20() if attention == "stock" else model
        assert found.multiply_adds == _multiply_adds(expected)
        assert found.trainable_parameters == _trainable(model)
        assert found.parameters == model.count_params()
    with cbam_ops.use_implementation("reference"):
        assert models.summary(expected).multiply_adds == _multiply_adds(expected)


@pytest.mark.parametrize("merge", ["logits", "hidden", "gates"])
@pytest.mark.parametrize("pooling", ["avg+max", "max"])
def test_summary_counts_a_fused_mlp_as_its_definition(pooling, merge):
    """Fails when a layer is counted for both branches that both share, or once where it is not."""
    x = keras.Input((8, 8, 16))
    layer = cbam_ops.ChannelAttention(hidden=4, pooling=pooling, mlp_merge=merge)
    model = keras.Model(x, layer(x))
    fused = models.summary(model)
    with cbam_ops.use_implementation("reference"):
        assert fused == models.summary(model)


@pytest.mark.parametrize(
    ("depth", "plain", "se", "cbam"),
    [
        (50, "3.857973", "3.860488", "3.864362"),
        pytest.param(101, "7.570194", "7.574938", "7.581366", marks=pytest.mark.long),
    ],
)
def test_summary_has_the_papers_figures(depth, plain, se, cbam):
    """Keras's ResNet has its stride on the first 1x1, as the figures have it."""
    model = getattr(keras.applications, f"ResNet{depth}")(weights=None)
    assert f"{models.summary(model).multiply_adds / 1e9:.6f}" == plain
    squeeze = cbam_ops.ChannelAttention(pooling="avg")
    for attention, expected in ((squeeze, se), (CBAM(), cbam)):
        with_attention = cbam_ops.add_attention(model, attention, start="paper")
        assert f"{models.summary(with_attention).multiply_adds / 1e9:.6f}" == expected


def test_summary_of_other_layers():
    """Fails when a product of some layer of Keras is not counted, or counted twice."""
    layers = keras.layers
    image, series = keras.Input((9, 7, 4)), keras.Input((10, 16))
    attended = layers.MultiHeadAttention(2, 8)(series, series)
    for inputs, outputs, expected in (
        (image, layers.Conv2D(6, 3, groups=2)(image), 7 * 5 * 6 * 9 * 2),
        (image, layers.DepthwiseConv2D((3, 1))(image), 7 * 7 * 4 * 3),
        (image, layers.Conv2DTranspose(6, 3, 2)(image), 9 * 7 * 4 * 9 * 6),
        (series, layers.Conv1D(5, 3)(series), 8 * 5 * 3 * 16),
        (series, layers.Dense(5)(series), 10 * 16 * 5),
        (series, attended, 4 * 10 * 16 * 16 + 2 * 2 * 10 * 10 * 8),
        ([image, series], [layers.Flatten()(image), layers.Dense(3)(series)], 10 * 16 * 3),
    ):
        assert models.summary(keras.Model(inputs, outputs)).multiply_adds == expected


def test_summary_of_open_sizes_and_subclassed_models():
    """Fails when an open size is counted as something, or only functional models are."""

    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            return tf.function(self.dense)(x)

    mine = Mine()
    with pytest.raises(ValueError, match="`model` must be a built keras.Model"):
        models.summary(mine)
    mine(np.zeros((5, 4), "float32"))
    assert models.summary(mine) == (15, 15, 12)
    model = models.CBAMCIFARResNet20(input_shape=(None, None, 3))
    with pytest.raises(ValueError, match=r"`input_shape` must be given, .* \(None, None, 3\)"):
        models.summary(model)
    with pytest.raises(ValueError, match=r"`input_shape` must fit .*\(None, None, 3\), got"):
        models.summary(model, (32, 32, 4))
    with pytest.raises(ValueError, match="`input_shape` must fit the model's input, .*, got 32"):
        models.summary(model, 32)
    fixed = models.summary(models.CBAMCIFARResNet20())
    assert models.summary(model, (32, 32, 3)) == fixed


# --- the same function as an independent composition ----------------------------------------------


class _Stateless:
    """The released network in plain TensorFlow ops, from a model's weights found by layer name."""

    def __init__(self, model: keras.Model, training: bool):
        self.model, self.training = model, training

    def conv(self, x, name, stride=1):
        kernel = self.model.get_layer(f"{name}_conv").kernel.value
        pad = kernel.shape[0] // 2
        return tf.nn.conv2d(x, kernel, stride, [[0, 0], [pad, pad], [pad, pad], [0, 0]])

    def normalize(self, x, gamma, beta, mean, variance):
        if self.training:
            mean, variance = tf.nn.moments(x, [0, 1, 2])
        return (x - mean) / tf.sqrt(variance + 1e-5) * gamma + beta

    def batch_norm(self, x, name):
        layer = self.model.get_layer(f"{name}_bn")
        return self.normalize(
            x,
            layer.gamma.value,
            layer.beta.value,
            layer.moving_mean.value,
            layer.moving_variance.value,
        )

    def cbam(self, x, name):
        layer = self.model.get_layer(name)
        w0, b0, w1, b1, kernel, *statistics = (weight.value for weight in _cbam_weights(layer))

        def mlp(t):
            return tf.nn.relu(t @ w0 + b0) @ w1 + b1

        gate = tf.sigmoid(mlp(tf.reduce_mean(x, [1, 2])) + mlp(tf.reduce_max(x, [1, 2])))
        x = x * gate[:, None, None, :]
        planes = tf.stack([tf.reduce_mean(x, 3), tf.reduce_max(x, 3)], axis=3)
        logits = tf.nn.conv2d(planes, kernel, 1, "SAME")
        return x * tf.sigmoid(self.normalize(logits, *statistics))

    def block(self, x, name, strides):
        filters = self.model.get_layer(f"{name}_{len(strides)}_conv").filters
        shortcut, stride = x, int(np.prod(strides))
        if stride != 1 or x.shape[3] != filters:
            shortcut = self.batch_norm(self.conv(x, f"{name}_0", stride), f"{name}_0")
        for index, conv_stride in enumerate(strides, start=1):
            x = tf.nn.relu(x) if index > 1 else x
            x = self.batch_norm(self.conv(x, f"{name}_{index}", conv_stride), f"{name}_{index}")
        return tf.nn.relu(self.cbam(x, f"{name}_cbam") + shortcut)

    def __call__(self, x, blocks_per_stage, bottleneck):
        x = tf.nn.relu(self.batch_norm(self.conv(x, "conv1", 2), "conv1"))
        lowest = tf.constant(-np.inf, x.dtype)
        x = tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=lowest)
        x = tf.nn.max_pool2d(x, 3, 2, "VALID")
        for stage, blocks in enumerate(blocks_per_stage):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                strides = (1, stride, 1) if bottleneck else (stride, 1)
                x = self.block(x, f"conv{stage + 2}_block{block + 1}", strides)
        x = tf.reduce_mean(x, [1, 2])
        layer = self.model.get_layer("predictions")
        return tf.nn.softmax(x @ layer.kernel.value + layer.bias.value)


# A CBAM layer's weights by role, and the stock form's layers and weights in the same order.
_MLP = ("w0", "b0", "w1", "b1", "spatial_kernel")
_BATCH_NORM = ("batch_norm_gamma", "batch_norm_beta", "moving_mean", "moving_variance")


def _cbam_weights(layer: CBAM) -> list[keras.Variable]:
    names = _MLP + (_BATCH_NORM if layer.spatial_batch_norm else ("spatial_bias",))
    weights = [getattr(layer, name) for name in names]
    return [weight for weight in weights if weight is not None]


@pytest.mark.parametrize("depth", [18, 50])
def test_released_network_is_the_composition(float64, depth):
    """Fails when a layer is out of order, padded on the wrong side or normalized otherwise."""
    rng = np.random.default_rng(depth)
    model = _constructor(depth)(input_shape=(None, None, 3), classes=10)
    _randomize(model, rng)
    blocks = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth]
    images = tf.constant(rng.normal(size=(2, 33, 48, 3)))  # odd and even sizes down the stages
    weights = tf.constant(rng.normal(size=(2, 10)))

    def output_and_gradient(function):
        with tf.GradientTape() as tape:
            tape.watch(images)
            output = function(images)
            loss = tf.reduce_sum(output * weights)
        return output, tape.gradient(loss, images)

    def check(training):
        composition = _Stateless(model, training)
        expected, expected_gradient = output_and_gradient(
            lambda x: composition(x, blocks, bottleneck=depth == 50)
        )
        actual, actual_gradient = output_and_gradient(lambda x: model(x, training=training))
        assert_close(actual, expected, testing.MODEL_FORWARD, "output")
        assert_close(actual_gradient, expected_gradient, testing.MODEL_GRADIENT, "gradient")

    check(training=False)
    check(training=True)


def _seed_literal(depth: int, classes: int, input_shape: tuple[int, int, int]) -> keras.Model:
    """The seed's own code, but for `tf.multiply` and `tf.reduce_*`, which Keras 3 refuses."""
    layers = keras.layers

    def conv_block(inputs, filter_num, reduction_ratio, stride=1, name=None):
        x = inputs
        x = layers.Conv2D(
            filter_num[0], (1, 1), strides=stride, padding="same", name=name + "_conv1"
        )(x)
        x = layers.BatchNormalization(axis=3, name=name + "_bn1")(x)
        x = layers.Activation("relu", name=name + "_relu1")(x)

        x = layers.Conv2D(filter_num[1], (3, 3), strides=1, padding="same", name=name + "_conv2")(x)
        x = layers.BatchNormalization(axis=3, name=name + "_bn2")(x)
        x = layers.Activation("relu", name=name + "_relu2")(x)

        x = layers.Conv2D(filter_num[2], (1, 1), strides=1, padding="same", name=name + "_conv3")(x)
        x = layers.BatchNormalization(axis=3, name=name + "_bn3")(x)

        avgpool = layers.GlobalAveragePooling2D(name=name + "_channel_avgpool")(x)
        maxpool = layers.GlobalMaxPool2D(name=name + "_channel_maxpool")(x)
        fc1 = layers.Dense(
            filter_num[2] // reduction_ratio, activation="relu", name=name + "_channel_fc1"
        )
        fc2 = layers.Dense(filter_num[2], activation="relu", name=name + "_channel_fc2")
        avg_out = fc2(fc1(avgpool))
        max_out = fc2(fc1(maxpool))
        channel = layers.add([avg_out, max_out])
        channel = layers.Activation("sigmoid", name=name + "_channel_sigmoid")(channel)
        channel = layers.Reshape((1, 1, filter_num[2]), name=name + "_channel_reshape")(channel)
        channel_out = layers.multiply([x, channel])

        avgpool = keras.ops.mean(channel_out, axis=3, keepdims=True)
        maxpool = keras.ops.max(channel_out, axis=3, keepdims=True)
        spatial = layers.Concatenate(axis=3)([avgpool, maxpool])
        spatial = layers.Conv2D(
            1, (7, 7), strides=1, padding="same", name=name + "_spatial_conv2d"
        )(spatial)
        spatial_out = layers.Activation("sigmoid", name=name + "_spatial_sigmoid")(spatial)
        cbam_out = layers.multiply([channel_out, spatial_out])

        r = layers.Conv2D(
            filter_num[2], (1, 1), strides=stride, padding="same", name=name + "_residual"
        )(inputs)
        x = layers.add([cbam_out, r])
        return layers.Activation("relu", name=name + "_relu3")(x)

    def build_block(x, filter_num, blocks, reduction_ratio=16, stride=1, name=None):
        x = conv_block(x, filter_num, reduction_ratio, stride, name=name)
        for i in range(1, blocks):
            x = conv_block(x, filter_num, reduction_ratio, stride=1, name=name + "_block" + str(i))
        return x

    layers_dims = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}[depth]
    img_input = layers.Input(shape=input_shape)
    x = layers.Conv2D(64, (7, 7), strides=(2, 2), padding="same", name="stem_conv")(img_input)
    x = layers.BatchNormalization(axis=3, name="stem_bn")(x)
    x = layers.Activation("relu", name="stem_relu")(x)
    x = layers.MaxPooling2D((3, 3), strides=(2, 2), padding="same", name="stem_pool")(x)
    x = build_block(x, [64, 64, 256], layers_dims[0], 16, name="conv1")
    x = build_block(x, [128, 128, 512], layers_dims[1], 16, stride=2, name="conv2")
    x = build_block(x, [256, 256, 1024], layers_dims[2], 16, stride=2, name="conv3")
    x = build_block(x, [512, 512, 2048], layers_dims[3], 16, stride=2, name="conv4")
    x = layers.GlobalAveragePooling2D(name="top_layer_pool")(x)
    x = layers.Dense(classes, activation="softmax", name="fc")(x)
    return keras.Model(img_input, x)


def test_seed_network_is_the_seeds_code(float64):
    """Fails when the seed's network is no longer reproduced exactly."""
    rng = np.random.default_rng(50)
    shape = (33, 48, 3)
    literal = _seed_literal(50, 10, shape)
    _randomize(literal, rng)
    model = models.SeedCBAMResNet50(input_shape=shape, classes=10)
    _copy_weights(literal, model, ("_channel_fc1", "_channel_fc2", "_spatial_conv2d"), "_cbam")
    images = rng.normal(size=(2, *shape))
    for training in (False, True):
        expected = literal(images, training=training)
        assert_close(model(images, training=training), expected, testing.MODEL_FORWARD, "output")


@pytest.mark.parametrize(
    ("network", "depth", "dialect"),
    [("released", 18, None), ("seed", 50, None), ("released", 18, "ultralytics")],
)
def test_stock_form_is_the_same_function(float64, network, depth, dialect):
    """Benchmarks against the stock form compare different functions when this fails."""
    rng = np.random.default_rng(1)
    shape = (48, 33, 3)
    arguments = {"network": network, "input_shape": shape, "classes": 10, "dialect": dialect}
    stock = models.build_resnet(depth, attention="stock", **arguments)
    fused = models.build_resnet(depth, **arguments)
    assert stock.name == f"{'seed_' if network == 'seed' else ''}stock_cbam_resnet{depth}"
    assert _trainable(stock) == _trainable(fused)
    _randomize(stock, rng)
    parts = ("_mlp_0", "_mlp_1", "_spatial_conv") + ("_spatial_bn",) * (network == "released")
    _copy_weights(stock, fused, ("_mlp_0", "_spatial_conv") if dialect else parts)
    images = rng.normal(size=(2, *shape))
    for training in (False, True):
        expected = stock(images, training=training)
        assert_close(fused(images, training=training), expected, testing.MODEL_FORWARD, "output")


def _copy_weights(source: keras.Model, model: keras.Model, parts, suffix: str = "") -> None:
    """Copies by layer name; a CBAM layer's weights come from the stock layers it stands for."""
    for layer in model.layers:
        if isinstance(layer, CBAM):
            values = [
                value
                for part in parts
                for value in source.get_layer(layer.name.removesuffix(suffix) + part).weights
            ]
            for weight, value in zip(_cbam_weights(layer), values, strict=True):
                weight.assign(value)
        elif layer.weights:
            layer.set_weights(source.get_layer(layer.name).get_weights())


def test_moving_statistics_follow_the_release(shapes_only):
    """A wrong momentum or epsilon leaves inference with other statistics than the release's."""
    model = models.CBAMResNet18(input_shape=SMALL, classes=10)
    norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    assert len(norms) == 20
    assert {(norm.momentum, norm.epsilon) for norm in norms} == {(0.9, 1e-5)}
    modules = [x for x in model.layers if isinstance(x, CBAM)]
    assert len(modules) == 8
    assert {(x.batch_norm_momentum, x.batch_norm_epsilon) for x in modules} == {(0.99, 1e-5)}


def test_initial_weights_follow_the_release():
    """Fails when a layer falls back to Keras's default initializer."""
    model = models.CBAMResNet18(input_shape=SMALL)

    def spread(kernel, expected):
        assert_close(np.std(kernel), expected, testing.STANDARD_DEVIATION, "spread")

    def uniform(kernel, limit):
        spread(kernel, limit / np.sqrt(3))
        assert np.abs(kernel).max() <= limit

    # He-normal with fan-out, not truncated, and every layer draws its own.
    first = model.get_layer("conv5_block1_2_conv").kernel.numpy()
    second = model.get_layer("conv5_block2_2_conv").kernel.numpy()
    spread(second, np.sqrt(2 / (9 * 512)))
    assert np.abs(second).max() > 3 * np.std(second)
    assert not np.array_equal(first, second)
    # PyTorch's own for the projection and the MLP, He-normal for the classifier, no biases.
    uniform(model.get_layer("conv5_block1_0_conv").kernel.numpy(), 256**-0.5)
    module = model.get_layer("conv5_block1_cbam")
    uniform(module.w0.numpy(), 512**-0.5)
    uniform(module.w1.numpy(), 32**-0.5)
    assert not np.array_equal(module.w0.numpy().ravel(), module.w1.numpy().ravel())
    spread(model.get_layer("predictions").kernel.numpy(), np.sqrt(2 / 512))
    assert not np.any(module.b0) and not np.any(module.b1) and not np.any(module.batch_norm_beta)
    assert np.all(module.batch_norm_gamma.numpy() == 0)  # the spatial gates start at 0.5
    kernels = [x.spatial_kernel.numpy() for x in model.layers if isinstance(x, CBAM)]
    spread(np.concatenate(kernels), np.sqrt(2 / 49))


# --- manners --------------------------------------------------------------------------------------


def test_without_the_top():
    """Feature extraction as in keras.applications: any size in, a map or a vector out."""
    model = models.CBAMResNet18(include_top=False)
    assert model.input_shape == (None, None, None, 3)
    assert model.output_shape == (None, None, None, 512)
    for height, width in ((32, 32), (33, 70)):
        output = model(np.zeros((1, height, width, 3), np.float32))
        assert output.shape == (1, -(-height // 32), -(-width // 32), 512)
    # The pooled forms pool exactly that map.
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    expected = model(images).numpy()
    for pooling, pool in (("avg", np.mean), ("max", np.max)):
        pooled = models.CBAMResNet18(include_top=False, pooling=pooling)
        assert pooled.output_shape == (None, 512)
        pooled.set_weights(model.get_weights())
        assert_close(pooled(images), pool(expected, axis=(1, 2)), testing.FLOAT32, pooling)


def test_top_options(shapes_only):
    """The classifier's size, its activation and an input of any size reach the model."""
    model = models.CBAMResNet18(
        input_shape=(None, None, 1), classes=4, classifier_activation=None, name="mine"
    )
    assert model.name == "mine"
    assert model.input_shape == (None, None, None, 1)
    assert model.output_shape == (None, 4)
    assert model.get_layer("predictions").activation is keras.activations.linear
    assert model.get_layer("conv1_conv").kernel.shape[2] == 1


def test_ratio_and_kernel_size_reach_the_modules(shapes_only):
    """An option that is swallowed gives a network other than the one asked for."""
    model = models.CBAMResNet18(input_shape=SMALL, ratio=8, kernel_size=3)
    module = model.get_layer("conv2_block1_cbam")
    assert module.w0.shape == (64, 8)
    assert module.spatial_kernel.shape == (3, 3, 2, 1)


def test_a_dialect_reaches_the_modules(shapes_only):
    """Every block has the published code's module; the network around it stays its own."""
    model = models.CBAMResNet18(input_shape=SMALL, dialect="timm", kernel_size=3)
    module = model.get_layer("conv3_block1_cbam")
    assert [w.name for w in module.trainable_weights] == [
        "mlp_kernel_0", "mlp_kernel_1", "spatial_kernel", "batch_norm_gamma", "batch_norm_beta"
    ]  # fmt: skip
    assert (module.batch_norm_momentum, module.kernel_size) == (0.9, 3)
    module = models.CBAMResNet18(input_shape=SMALL, dialect="kobiso").get_layer("conv3_block1_cbam")
    assert (module.w0.shape, module.spatial_bias) == ((128, 16), None)
    module = models.CBAMResNet18(input_shape=SMALL, dialect="kobiso", ratio=4)
    assert module.get_layer("conv3_block1_cbam").w0.shape == (128, 32)


def test_input_tensor():
    """The model starts where the given tensor comes from."""
    raw = keras.Input((40, 40, 3), name="raw")
    scaled = keras.layers.Rescaling(1 / 255)(raw)
    model = models.CBAMResNet18(input_tensor=scaled, input_shape=(40, 40, 3), classes=3)
    assert model.input is raw
    assert any(isinstance(layer, keras.layers.Rescaling) for layer in model.layers)
    assert model(np.zeros((1, 40, 40, 3), np.float32)).shape == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "imagenet"}, "no pretrained weights exist by name; got 'imagenet'"),
        ({"weights": "/nowhere/cbam.weights.h5"}, "path of an existing weights file"),
        ({"input_shape": (32, 32)}, r"`input_shape` must have shape \(H, W, channels\)"),
        ({"input_shape": 32}, "`input_shape` must have shape"),
        ({"input_shape": (31, 32, 3)}, r"`input_shape` must be at least 32 x 32 .*\(31, 32, 3\)"),
        ({"input_shape": (32, 32, None)}, "known number of channels, at least 1, at index 2"),
        ({"input_tensor": np.zeros((1, 32, 32, 3))}, "must be a Keras tensor.*got ndarray"),
        ({"pooling": "mean"}, '`pooling` must be None, "avg" or "max", got \'mean\''),
        ({"classes": 0}, "`classes` must be a positive integer, got 0"),
        ({"classes": True}, "`classes` must be a positive integer, got True"),
        ({"classes": "ten"}, "`classes` must be a positive integer, got 'ten'"),
        ({"classes": 2.5}, "`classes` must be a positive integer, got 2.5"),
        ({"width": "wide"}, "`width` must be a number above 0, got 'wide'"),
        ({"weights": 0}, "path of an existing weights file; no pretrained .*; got 0"),
        ({"classifier_activation": "softmaxx"}, "softmaxx"),
        ({"ratio": 65}, "ratio"),
        ({"ratio": 0}, "ratio"),
        ({"kernel_size": 4}, "kernel_size"),
        ({"dialect": "jongchan"}, "`dialect` must be one of paper, official, .*, got 'jongchan'"),
        ({"dialect": "mobilenet_v3"}, "'mobilenet_v3' is one of ChannelAttention alone, not of CB"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    """A bad argument must be named where it is given, not deep in Keras."""
    with pytest.raises(ValueError, match=message):
        models.CBAMResNet18(**{"input_shape": SMALL, **arguments})


def test_input_tensor_and_shape_disagree():
    """One of the two would silently be ignored."""
    tensor = keras.Input(SMALL)
    with pytest.raises(ValueError, match=r"`input_shape` must be left out or equal.*\(64, 64, 3\)"):
        models.CBAMResNet18(input_tensor=tensor, input_shape=(64, 64, 3))
    with pytest.raises(ValueError, match="`input_tensor` must have shape"):
        models.CBAMResNet18(input_tensor=keras.Input((32,)))


@pytest.mark.parametrize(
    ("depth", "arguments", "message"),
    [
        (20, {}, "`depth` must be one of .*18, 34, 50, 101, 152.* got 20"),
        (18, {"network": "seed"}, "`depth` must be one of .*50, 101, 152.* seed network, got 18"),
        (18, {"network": "paper"}, '`network` must be "released" or .* "seed", got \'paper\''),
        (18, {"network": "cifar"}, "`depth` must be one of .*20, 32, 44, 56, 110.* got 18"),
        (18, {"attention": "eca"}, '`attention` must be "cbam", "se", "stock" or None, got \'eca'),
        (18, {"width": 0}, "`width` must be a number above 0, got 0"),
        ([18], {}, r"`depth` must be one of .* got \[18\]"),
        (18, {"attention": ["se"]}, r"`attention` must be .* got \['se'\]"),
        (18, {"network": ["seed"]}, r"`network` must be .* got \['seed'\]"),
    ],
)
def test_builder_rejects(depth, arguments, message):
    """The builder has options that the constructors have not."""
    with pytest.raises(ValueError, match=message):
        models.build_resnet(depth, input_shape=SMALL, **arguments)


@pytest.mark.parametrize("name", [name for name in models.__all__ if "CBAM" in name])
def test_docstrings_are_complete(name):
    """help() must show the arguments, not only the line each constructor has of its own."""
    text = getattr(models, name).__doc__
    for part in ("Args:", "Returns:", "Raises:", "Source:", "kernel_size:"):
        assert part in text
    assert "{" not in text
    assert all(len(line) <= 100 for line in text.splitlines())


# --- use ------------------------------------------------------------------------------------------


# Keras itself calls `__array__` of a TensorFlow variable, which knows no `copy`.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_save_and_load(small, tmp_path):
    """A saved model, or its weights, gives the same predictions in a fresh object."""
    images = np.random.default_rng(3).normal(size=(2, *SMALL)).astype(np.float32)
    expected = small(images).numpy()

    small.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images), expected)

    small.save_weights(tmp_path / "model.weights.h5")
    again = models.CBAMResNet18(weights=tmp_path / "model.weights.h5", input_shape=SMALL, classes=5)
    np.testing.assert_array_equal(again(images), expected)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Skipping nested container:UserWarning")
def test_a_weights_file_that_does_not_fit(tmp_path):
    """One sentence with its cause; the user's own layers keep their weights."""
    raw, path = keras.Input(SMALL), tmp_path / "model.weights.h5"
    first, second = (keras.layers.Conv2D(3, 1, name="mine") for _ in range(2))
    models.CBAMResNet18(input_tensor=first(raw), classes=5).save_weights(path)
    images = second(raw)
    before = second.kernel.numpy()
    message = r"`weights` must be a weights file of cbam_resnet18 .*model\.weights\.h5.*: .*"
    with pytest.raises(ValueError, match=message + r"name=predictions.*\(512, 6\).*\(512, 5\)"):
        models.CBAMResNet18(input_tensor=images, classes=6, weights=path)
    testing.assert_same_bits(second.kernel.numpy(), before, "the layer before the network")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=message + "truncated file"):
        models.CBAMResNet18(input_tensor=images, classes=5, weights=str(path))
    models.CBAMResNet18(input_tensor=first(raw), classes=5).save_weights(path)
    models.CBAMResNet18(input_tensor=images, classes=5, weights=path)
    testing.assert_same_bits(second.kernel.numpy(), first.kernel.numpy(), "the loaded layer")


def test_every_weight_trains():
    """A weight that never changes is cut off from the loss."""
    model = models.CBAMResNet18(input_shape=SMALL, classes=2)
    rng = np.random.default_rng(4)
    before = [weight.numpy() for weight in model.trainable_weights]
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    # Two steps: gamma of the spatial batch norm starts at 0, which hides its kernel in the first.
    history = model.fit(
        rng.normal(size=(8, *SMALL)).astype(np.float32),
        rng.integers(0, 2, 8),
        batch_size=4,
        verbose=0,
    )
    assert np.isfinite(history.history["loss"][0])
    for weight, old in zip(model.trainable_weights, before, strict=True):
        new = weight.numpy()
        assert np.all(np.isfinite(new)), weight.path
        assert not np.array_equal(new, old), weight.path


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(small, policy):
    """Half-type activations, float32 weights and probabilities, and about the float32 result."""
    images = np.random.default_rng(5).normal(size=(2, *SMALL)).astype(np.float32)
    expected = small(images).numpy()

    keras.config.set_dtype_policy(policy)
    mixed = models.CBAMResNet18(input_shape=SMALL, classes=5)
    mixed.set_weights(small.get_weights())
    assert mixed.get_layer("conv5_block2_cbam").compute_dtype == policy.removeprefix("mixed_")
    assert {weight.dtype for weight in mixed.weights} == {"float32"}
    actual = mixed(images)
    assert actual.dtype == tf.float32
    assert_close(actual, expected, testing.MIXED_MODEL[policy], "probabilities")
    assert_close(np.sum(actual, axis=1), np.ones(2), testing.FLOAT32, "sum of probabilities")


def test_channels_first_builds_the_same_network(shapes_only):
    """The same weights in the same order serve both layouts."""
    last = models.CBAMResNet18(input_shape=SMALL, classes=5)
    keras.config.set_image_data_format("channels_first")
    first = models.CBAMResNet18(input_shape=(3, 32, 32), classes=5)
    assert first.output_shape == (None, 5)
    assert [w.shape for w in first.weights] == [w.shape for w in last.weights]
    assert models.CBAMResNet18().input_shape == (None, 3, 224, 224)
    headless = models.CBAMResNet18(include_top=False)
    assert headless.input_shape == (None, 3, None, None)
    assert headless.output_shape == (None, 512, None, None)
    with pytest.raises(ValueError, match=r"\(channels, H, W\) for channels_first"):
        models.CBAMResNet18(input_shape=SMALL)


def test_channels_first_computes_the_same(small):
    """Fails when an axis, a padding or a pooling of the network is bound to one layout.

    TensorFlow's CPU kernels convolve channels_last only; compiled by XLA, both layouts run.
    """
    images = np.random.default_rng(8).normal(size=(2, *SMALL)).astype(np.float32)
    keras.config.set_image_data_format("channels_first")
    first = models.CBAMResNet18(input_shape=(3, 32, 32), classes=5)
    first.set_weights(small.get_weights())
    with cbam_ops.use_implementation("reference"):
        compiled = tf.function(first, jit_compile=True)
        assert_close(compiled(np.moveaxis(images, 3, 1)), small(images), testing.FLOAT32, "output")


# --- images in, names out -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "tensor", "integer tensor"])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_preprocess_input(kind, data_format):
    """Other statistics than the training's cost accuracy without any error."""
    pixels = np.random.default_rng(6).integers(0, 256, (2, 4, 5, 3))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (pixels / 255.0 - mean) / std
    if data_format == "channels_first":
        pixels, expected = (np.moveaxis(value, 3, 1) for value in (pixels, expected))
    if kind == "tensor":
        images = tf.constant(pixels, tf.float32)
    elif kind == "integer tensor":
        images = tf.constant(pixels, tf.uint8)
    else:
        images = pixels.astype(kind)
    untouched = np.array(images)
    for index in (slice(None), 0):  # a batch and one image
        actual = models.preprocess_input(images[index], data_format=data_format)
        assert actual.dtype == ("float64" if kind == "float64" else "float32")
        assert_close(actual, expected[index], testing.FLOAT32, "images")
    np.testing.assert_array_equal(images, untouched)


def test_preprocess_input_inside_a_model():
    """Preprocessing may be a part of the model, as Keras documents it."""
    raw = keras.Input(SMALL, dtype="uint8")
    model = models.CBAMResNet18(input_tensor=models.preprocess_input(raw), classes=2)
    assert model(np.zeros((1, *SMALL), np.uint8)).shape == (1, 2)


def test_preprocess_input_rejects():
    """A grey or transposed image must not be normalized by the wrong axis."""
    with pytest.raises(ValueError, match=r"`x` must be .* 3 channels, got shape \(4, 4, 1\)"):
        models.preprocess_input(np.zeros((4, 4, 1)))
    message = "`x` must be an array or a tensor of numbers, got "
    with pytest.raises(ValueError, match=f"{message}str"):
        models.preprocess_input("photograph.jpg")
    with pytest.raises(ValueError, match=f"{message}an array of <U1"):
        models.preprocess_input(np.full((4, 4, 3), "a"))
    with pytest.raises(ValueError, match="`data_format` must be .*got 'NHWC'"):
        models.preprocess_input(np.zeros((4, 4, 3)), data_format="NHWC")


def test_decode_predictions_needs_imagenet_scores():
    """Scores of another classifier must not be given ImageNet's names."""
    with pytest.raises(ValueError, match="1000"):
        models.decode_predictions(np.zeros((2, 10)))
