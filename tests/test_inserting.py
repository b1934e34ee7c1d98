"""`cbam_ops.add_attention`: where it puts attention, and that the model stays what it was."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import cbam_ops
from cbam_ops import inserting
from cbam_ops.testing import FLOAT32, assert_close

SHAPE = (12, 10, 3)


def _images(count: int = 2, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, *shape)).astype("float32")


def _residual_network(name: str = "net", shape=SHAPE) -> keras.Model:
    """Blocks whose ways end in a normalisation, dropout, an activation, no normalisation at all."""
    x = image = keras.Input(shape)
    x = layers.Conv2D(8, 3, padding="same", name="stem")(x)
    y = layers.BatchNormalization(name="a_bn")(layers.Conv2D(8, 3, padding="same")(x))
    x = layers.ReLU()(layers.Add()([x, layers.Dropout(0.5)(y)]))
    y = layers.Conv2D(16, 3, 2, "same")(layers.ReLU()(layers.BatchNormalization()(x)))
    y = layers.Conv2D(16, 3, padding="same", name="b_conv")(y)
    x = layers.Conv2D(16, 1, 2)(x) + layers.Activation("tanh")(y)
    y = layers.GroupNormalization(4, name="c_norm")(layers.Conv2D(16, 3, padding="same")(x))
    gate = layers.Dense(16, "sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(y))
    x = layers.Add()([layers.Multiply(name="c_excite")([y, gate]), x])
    x = layers.Dense(5, name="top")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(image, x, name=name)
    random = np.random.default_rng(1)
    for weight in model.weights:
        if len(weight.shape) == 1:  # those of normalisations matter
            weight.assign(random.uniform(0.5, 1.5, weight.shape))
    return model


PLACES = ["a_bn", "b_conv", "c_excite"]


def _cbam(hidden: int = 12, **options) -> cbam_ops.CBAM:
    """With so many hidden units that some are not dead."""
    return cbam_ops.CBAM(hidden=hidden, kernel_size=3, **options)


# --- where ----------------------------------------------------------------------------------------

# How many places a network of each family has, of what kind, and the last of them.
FAMILIES = {
    "ConvNeXtTiny": (18, "residual block", "convnext_tiny_stage_3_block_2_pointwise_conv_2"),
    "DenseNet121": (4, "stage", "relu"),
    "EfficientNetB0": (9, "residual block", "block6d_project_bn"),
    "EfficientNetV2B0": (15, "residual block", "block6h_project_bn"),
    "InceptionResNetV2": (40, "residual block", "block8_10_conv"),
    "InceptionV3": (11, "concatenation", "mixed10"),
    "MobileNet": (27, "normalisation", "conv_pw_13_bn"),
    "MobileNetV2": (10, "residual block", "block_15_project_BN"),
    "MobileNetV3Small": (6, "residual block", "expanded_conv_10_project_bn"),
    "NASNetMobile": (16, "concatenation", "normal_concat_12"),
    "ResNet50": (16, "residual block", "conv5_block3_3_bn"),
    "ResNet50V2": (16, "residual block", "conv5_block3_3_conv"),
    "VGG16": (5, "stage", "block5_conv3"),
    "Xception": (12, "residual block", "block13_sepconv2_bn"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_places_in_the_families_of_keras_applications(shapes_only, family):
    """Fails when attention would go elsewhere than where papers put it."""
    model = getattr(keras.applications, family)(weights=None)
    places = cbam_ops.add_attention(model, dry_run=True)
    assert (len(places), {place.reason for place in places}, places[-1].layer) == (
        FAMILIES[family][0], {FAMILIES[family][1]}, FAMILIES[family][2],
    )  # fmt: skip
    assert all(place.name == f"{place.layer}_attention" for place in places)
    for place in places:
        assert place.shape == model.get_layer(place.layer).output.shape


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_the_families_of_keras_applications(family):
    """Fails when a family's model changes its outputs, its weights, or has no place."""
    model = getattr(keras.applications, family)(
        weights=None, include_top=False, pooling="avg", input_shape=(75, 75, 3)
    )
    random = np.random.default_rng(0)
    for weight in model.weights:
        if len(weight.shape) == 1:
            weight.assign(random.uniform(0.5, 1.5, weight.shape))
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # of the weights that it has now
    new = cbam_ops.add_attention(model, cbam_ops.CBAM(hidden_rounding="half_up"))
    images = _images(1, (75, 75, 3))
    expected = model(images, training=False).numpy()
    assert np.ptp(expected) > 0
    assert np.array_equal(new(images, training=False), expected)
    keras.backend.clear_session()


def _layers(places) -> list[str]:
    return [place.layer for place in places]


def test_places_in_residual_blocks():
    """Fails for a place behind the addition, on the shortcut, or before the last normalisation."""
    model = _residual_network()
    assert _layers(cbam_ops.add_attention(model, dry_run=True)) == PLACES
    skip = keras.layers.Concatenate()([model.get_layer("a_bn").output, model.layers[1].output])
    unet = keras.Model(model.input, [model.output, skip])  # a way past the block's end
    assert _layers(cbam_ops.add_attention(unet, dry_run=True)) == PLACES[1:]


def test_ways_of_one_size_are_no_residual_block():
    """Fails when one of two equal ways is taken for the shortcut of the other."""
    image = keras.Input(SHAPE)
    ways = [layers.Conv2D(8, 3, padding="same")(image) for _ in "ab"]
    x = layers.Conv2D(8, 3, name="last")(layers.Add(name="sum")(ways))
    places = cbam_ops.add_attention(keras.Model(image, x + x), dry_run=True)
    assert [place.reason for place in places] == ["stage"]


def test_places_in_models_inside():
    """Fails when a backbone inside a model is not looked into, or its places lose their names."""
    model = keras.Sequential([_residual_network("body"), layers.Dense(3)])
    places = cbam_ops.add_attention(model, dry_run=True)
    assert _layers(places) == [f"body/{name}" for name in PLACES]
    new = cbam_ops.add_attention(model, _cbam())
    assert list(cbam_ops.gates(new, _images())) == [place.name for place in places]
    assert np.array_equal(new(_images()), model(_images()))


def test_places_in_stages():
    """Fails when a plain network has attention before the end of a stage, or behind no map."""

    def network(*convolutions: int) -> keras.Model:
        parts = [keras.Input((None, None, 3))]
        for stage, count in enumerate(convolutions):
            parts += [layers.Conv2D(16, 3, name=f"conv_{stage}_{i}") for i in range(count)]
            parts.append(layers.MaxPooling2D())
        return keras.Sequential([*parts, layers.GlobalMaxPooling2D(), layers.Dense(2)])

    assert _layers(cbam_ops.add_attention(network(1, 2, 3), dry_run=True)) == [
        "conv_1_1", "conv_2_2",
    ]  # fmt: skip
    assert _layers(cbam_ops.add_attention(network(1, 1), dry_run=True)) == ["conv_0_0", "conv_1_0"]
    deep = network(1, 2, 3)
    pyramid = keras.Model(deep.inputs, [deep.get_layer("conv_1_1").output, deep.outputs[0]])
    assert _layers(cbam_ops.add_attention(pyramid, dry_run=True)) == ["conv_1_1", "conv_2_2"]


def test_given_places():
    """Fails when names or a function choose other layers, or one layer gets attention twice."""
    model = _residual_network()
    named = cbam_ops.add_attention(model, where=["b_conv", "stem", "b_conv"], dry_run=True)
    assert sorted(_layers(named)) == ["b_conv", "stem"]
    assert {place.reason for place in named} == {"given"}
    by_function = cbam_ops.add_attention(
        model, where=lambda layer: isinstance(layer, layers.BatchNormalization), dry_run=True
    )
    assert len(by_function) == 2 and "a_bn" in _layers(by_function)


def test_a_layer_called_twice_is_followed_by_one_attention():
    """Fails when the ways of a siamese network get weights of their own."""
    body = _residual_network("body")
    images = keras.Input(SHAPE), keras.Input(SHAPE)
    model = keras.Model(images, body(images[0]) - body(images[1]))
    new = cbam_ops.add_attention(model, _cbam())
    assert sum(isinstance(layer, cbam_ops.CBAM) for layer in new._flatten_layers()) == len(PLACES)
    pair = _images(), _images()[::-1]
    assert np.array_equal(new(pair), model(pair))


# --- what -----------------------------------------------------------------------------------------

ATTENTIONS = {
    "cbam": _cbam(),
    "batch norm": _cbam(spatial_batch_norm=True),
    "without biases": _cbam(use_bias=False, spatial_use_bias=False),
    "parallel, one layer": _cbam(order="parallel", hidden=0),
    "two gates": _cbam(mlp_merge="gates"),
    "two gates of channels": cbam_ops.ChannelAttention(hidden=12, mlp_merge="gates"),
    "sum of hidden units": cbam_ops.ChannelAttention(hidden=12, mlp_merge="hidden"),
    "hard": _cbam(gate_activation="hard_sigmoid"),
    "se": cbam_ops.ChannelAttention(hidden=12, pooling="avg"),
    "spatial": cbam_ops.SpatialAttention(3),
}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_identity_is_exact_and_learns(attention):
    """Fails when a pretrained model's outputs change, or a gate never leaves a half."""
    keras.utils.set_random_seed(1)
    model = _residual_network()
    images = _images()
    new = cbam_ops.add_attention(model, ATTENTIONS[attention])
    assert np.array_equal(new(images, training=False), model(images, training=False))
    expected = (1.0 if attention.startswith("two gates") else 0.5, 0.5)  # of channels, positions
    for gates in cbam_ops.gates(new, images).values():
        for gate, value in zip(gates, expected, strict=True):
            assert gate is None or np.all(gate == value)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(new(images, training=True) ** 2)
    inserted = [new.get_layer(f"{name}_attention") for name in PLACES]
    last = [weight for layer in inserted for weight in inserting._identity_weights(layer)]
    assert len(last) >= len(PLACES)
    for weight, slope in zip(last, tape.gradient(loss, last), strict=True):
        assert not np.any(weight) and np.any(slope), weight.path


def test_identity_in_a_graph():
    """Fails when a step of training, or prediction, computes something else than eager calls."""
    model, images = _residual_network(), _images(8)
    new = cbam_ops.add_attention(model, _cbam())
    # TensorFlow's graph optimizer may add in another order.
    assert_close(new.predict(images, verbose=0), model.predict(images, verbose=0), FLOAT32, "graph")
    new.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    new.fit(images, np.arange(8) % 5, verbose=0)
    for gates in cbam_ops.gates(new, images).values():
        assert all(np.any(gate != 0.5) for gate in gates)


def test_paper_start_is_the_layer_itself():
    """Fails when the layer has other options than were given, or something is scaled."""
    model = _residual_network()
    attention = _cbam(order="spatial_first", activation="relu")
    new = cbam_ops.add_attention(model, attention, ["stem"], "paper")
    layer = new.get_layer("stem_attention")
    ours, theirs = layer.get_config(), attention.get_config()
    assert {k: v for k, v in ours.items() if k != "name"} == {
        k: v for k, v in theirs.items() if k != "name"
    }
    stem = keras.Model(model.input, model.get_layer("stem").output)
    rest = keras.Model(model.get_layer("stem").output, model.output)
    assert np.array_equal(new(_images()), rest(layer(stem(_images()))))
    assert len(new.layers) == len(model.layers) + 1


def test_the_model_keeps_its_weights_and_what_is_frozen(tmp_path):
    """Fails when weights move, frozen ones are trained, attention is not, or a file differs."""
    body = _residual_network("body")
    body.trainable = False
    model = keras.Sequential([body, layers.Dense(3)])
    model.compile("sgd", "mse")
    before = [weight.numpy() for weight in model.weights]
    new = cbam_ops.add_attention(model, _cbam())
    assert new.compiled and len(model.get_layer("body").layers) == len(body.layers)
    trained = {weight.path for weight in new.trainable_weights}
    assert len(trained) == 2 + 6 * len(PLACES)
    new.fit(_images(4), np.zeros((4, 3)), verbose=0)
    for weight, value in zip(model.weights, before, strict=True):
        assert np.array_equal(weight, value)
    for weight in new.get_layer("body").get_layer("stem").weights:
        assert np.array_equal(weight, body.get_layer("stem").weights[len(weight.shape) == 1])
    new.save(tmp_path / "new.keras")
    again = keras.models.load_model(tmp_path / "new.keras")
    assert np.array_equal(again(_images()), new(_images()))


def test_a_frozen_network_of_each_step_of_time():
    """Fails when a TimeDistributed's network gets no attention, or some that is not trained."""
    video = keras.Input((None, *SHAPE))
    x = layers.TimeDistributed(_residual_network("frames"), name="steps")(video)
    model = keras.Model(video, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    model.get_layer("steps").trainable = False
    new = cbam_ops.add_attention(model, _cbam())
    assert len(new.trainable_weights) == 2 + 6 * len(PLACES)
    videos = np.stack([_images()] * 2, axis=1)
    assert np.array_equal(new(videos), model(videos))


def test_what_preprocessing_layers_were_adapted_to_stays():
    """Fails when a copy of such a layer has the vocabulary, or the mean, of a new one."""
    images, numbers, words = _images(), np.array([[0.1], [0.8]]), tf.constant([["a"], ["b"]])
    normal, look_up = layers.Normalization(), layers.StringLookup()
    bins = layers.Discretization(num_bins=3)
    for layer, data in ((normal, 3 * images + 2), (bins, np.arange(9) / 9), (look_up, ["b", "a"])):
        layer.adapt(data)
    inputs = {
        "image": keras.Input(SHAPE, name="image"),
        "number": keras.Input((1,), name="number"),
        "word": keras.Input((1,), dtype="string", name="word"),
    }
    x = layers.Conv2D(16, 3)(layers.Conv2D(16, 3)(normal(inputs["image"])))
    outputs = {"map": x, "bin": bins(inputs["number"]), "word": look_up(inputs["word"])}
    model = keras.Model(inputs, outputs)
    data = {"image": tf.constant(images), "number": tf.constant(numbers), "word": words}
    new, old = cbam_ops.add_attention(model)(data), model(data)
    assert list(new) == list(old) and np.unique(old["word"]).size == 2
    for name, value in old.items():
        assert np.array_equal(new[name], value), name


def test_layout_and_types_are_the_models():
    """Fails when the default attention does not fit the model's layout, or its dtype policy."""
    image = keras.Input((8, 6, 5))
    x = layers.Conv2D(16, 1, data_format="channels_first", name="conv", dtype="mixed_bfloat16")(
        image
    )
    new = cbam_ops.add_attention(keras.Model(image, x))
    layer = new.get_layer("conv_attention")
    assert layer.data_format == "channels_first" and layer.w0.shape == (16, 1)
    assert layer.compute_dtype == new.output.dtype == "bfloat16"


def test_bad_input_is_said():
    """Fails when bad input ends in another error than one that names the argument."""
    model = _residual_network()
    dense = keras.Sequential([keras.Input((4,)), layers.Dense(3)], name="dense")
    before = [layer.name for layer in model.layers]
    for arguments, words in (
        ((dense,), r"`where`=\"blocks\" finds no place"),
        ((print,), r"`model` must be a model of Keras 3"),
        ((model, layers.ReLU()), r"`attention` must be a layer of cbam_ops"),
        ((model, cbam_ops.CBAM()), r"no attention can follow a_bn: CBAM: `ratio` must be at most"),
        ((model, _cbam(activation="relu")), r"`attention` must have activation=None"),
        ((model, _cbam(mlp_activation="relu")), r"`attention` must have mlp_activation=None"),
        ((model, _cbam(), "everywhere"), r"`where` must be \"blocks\", a list of names or"),
        ((model, _cbam(), 3), r"`where` must be \"blocks\", a list of names or .* got 3"),
        ((model, _cbam(), ["a_bm"]), r"`where` must name layers .* got 'a_bm'; near it are a_bn"),
        ((model, _cbam(), []), r"`where` must name a layer, got an empty list"),
        ((model, _cbam(), ["top"]), r"`where` must name layers that return one map.*top returns"),
        ((model, _cbam(), lambda layer: False), r"`where` must be true of a layer"),
        ((model, _cbam(), "blocks", "zero"), r"`start` must be \"identity\" or \"paper\""),
    ):
        with pytest.raises(ValueError, match=f"^add_attention: .*{words}"):
            cbam_ops.add_attention(*arguments)
    assert [layer.name for layer in model.layers] == before


@pytest.mark.parametrize("rank", [3, 5])
def test_series_and_volumes(rank):
    """Fails when only images have places, or attention there is no identity."""
    convolution = {3: layers.Conv1D, 5: layers.Conv3D}[rank]
    pool = {3: layers.GlobalAveragePooling1D, 5: layers.GlobalAveragePooling3D}[rank]
    shape = (*(6,) * (rank - 2), 2)
    x = first = keras.Input(shape)
    x = convolution(8, 3, padding="same")(x)
    y = layers.BatchNormalization(name="bn")(convolution(8, 3, padding="same")(x))
    model = keras.Model(first, layers.Dense(2)(pool()(layers.Add()([x, y]))))
    new = cbam_ops.add_attention(model, _cbam())
    inputs = _images(2, shape)
    assert np.array_equal(new(inputs), model(inputs))
    ((name, (channel_gate, spatial_gate)),) = cbam_ops.gates(new, inputs).items()
    assert name == "bn_attention" and channel_gate.shape == (2, 8)
    assert spatial_gate.shape == (2, *shape[:-1])
