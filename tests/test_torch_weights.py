"""PyTorch checkpoints as Keras networks and back: names, shapes, values, and what is refused.

The second half holds them against networks that others wrote, where PyTorch, pytorchcv and timm are
installed (`pip install '.[test-torch]'`).
"""

from __future__ import annotations

import importlib
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tensorflow as tf

import cbam_ops
from cbam_ops import models, testing

TINY = models.Architecture((2, 1), bottleneck=False, filters=(16, 32), stem=8)
LAYOUTS = ("official", "timm", "pytorchcv", "luuuyi")  # each has the dialect of its name


@pytest.fixture(autouse=True)
def _keras_defaults() -> Iterator[None]:
    """Every test starts from Keras's defaults."""
    keras.utils.set_random_seed(7)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def tiny(
    architecture: models.Architecture = TINY,
    attention: str | None = "cbam",
    dialect: str | None = None,
    **options,
) -> keras.Model:
    """A network of a few small blocks, with weights that matter."""
    network = models.Released(architecture, attention, dialect, {"ratio": 4, **options})
    images = keras.Input((32, 32, 2))
    model = keras.Model(images, network.top(network.features(images), 3, None))
    rng = np.random.default_rng(1)
    for weight in model.weights:
        value = rng.normal(size=weight.shape)
        weight.assign(np.abs(value) + 0.5 if "variance" in weight.name else value)
    return model


def images_for(model: keras.Model, size: int = 32) -> np.ndarray:
    shape = (2, size, size, model.input_shape[3])
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def checkpoint(folder: Path, layout: str = "official", **options) -> dict[str, np.ndarray]:
    """The arrays that `to_torch` writes of a tiny network."""
    cbam_ops.to_torch(tiny(dialect=layout, **options), folder / "tiny.safetensors", layout)
    return safetensors.numpy.load_file(folder / "tiny.safetensors")


def assert_same_arrays(actual: dict, expected: dict) -> None:
    assert list(actual) == list(expected)
    for name, value in expected.items():
        testing.assert_same_bits(np.asarray(actual[name]), np.asarray(value), name)


# --- without PyTorch ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(monkeypatch, tmp_path, layout):
    """Sizes, options and values follow from the file alone; the way back gives the same bits."""
    monkeypatch.setitem(sys.modules, "torch", None)
    model = tiny(dialect=layout, kernel_size=3)
    cbam_ops.to_torch(model, tmp_path / "a.safetensors", layout)
    again = cbam_ops.from_torch(
        str(tmp_path / "a.safetensors"), input_shape=(32, 32, 2), classifier_activation=None
    )
    x = images_for(model)
    testing.assert_same_bits(again(x).numpy(), model(x).numpy(), "logits")
    cbam_ops.to_torch(again, tmp_path / "b.safetensors")
    first, second = (tmp_path / f"{name}.safetensors" for name in "ab")
    assert_same_arrays(*map(safetensors.numpy.load_file, (second, first)))
    with pytest.raises(ImportError, match=r"reading '.*x\.pth' needs PyTorch \(pip install torch"):
        (tmp_path / "x.pth").touch()
        cbam_ops.from_torch(tmp_path / "x.pth")
    with pytest.raises(ImportError, match="to_torch: a state dict needs PyTorch"):
        cbam_ops.to_torch(again)


def test_the_names_of_the_official_release(tmp_path):
    """Names as the authors' checkpoint has them; 480 arrays for ResNet-50."""
    model = models.CBAMResNet50(classes=10)
    cbam_ops.to_torch(model, tmp_path / "a.safetensors")
    arrays = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert len(arrays) == 480
    cbam = "layer1.0.cbam."
    for name, shape in {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_var": (64,),
        "layer4.2.conv3.weight": (2048, 512, 1, 1),
        "layer2.0.downsample.0.weight": (512, 256, 1, 1),
        "layer2.0.downsample.1.num_batches_tracked": (),
        f"{cbam}ChannelGate.mlp.1.weight": (16, 256),
        f"{cbam}ChannelGate.mlp.3.bias": (256,),
        f"{cbam}SpatialGate.spatial.conv.weight": (1, 2, 7, 7),
        f"{cbam}SpatialGate.spatial.bn.running_mean": (1,),
        "fc.weight": (10, 2048),
    }.items():
        assert arrays[name].shape == shape, name
    kernel = model.get_layer("conv2_block1_cbam").spatial_kernel.numpy()
    planes = arrays[f"{cbam}SpatialGate.spatial.conv.weight"][0]
    testing.assert_same_bits(planes[0], kernel[:, :, 1, 0], "the maximum is first")
    testing.assert_same_bits(planes[1], kernel[:, :, 0, 0], "then the mean")


@pytest.mark.parametrize(
    "architecture",
    [
        models.Architecture((1, 2), bottleneck=True, filters=(8, 16), stem=4),
        models.Architecture((1, 1), True, filters=(16, 32), stem=32, group_width=128),
        models.Architecture((1, 1, 1), bottleneck=False, filters=(24, 40, 56), stem=24),
    ],
    ids=["bottleneck", "wide", "three stages"],
)
def test_widths_follow_from_the_shapes(tmp_path, architecture):
    model = tiny(architecture, hidden=5)
    cbam_ops.to_torch(model, tmp_path / "a.safetensors")
    again = cbam_ops.from_torch(tmp_path / "a.safetensors", input_shape=(None, 40, 2))
    assert again.input_shape == (None, None, 40, 2)
    assert [w.path for w in again.weights] == [w.path for w in model.weights]
    for weight, value in zip(again.weights, model.weights, strict=True):
        testing.assert_same_bits(weight.numpy(), value.numpy(), weight.path)


@pytest.mark.parametrize(
    ("dtype", "prefix"), [("float16", "module."), ("bfloat16", "net._orig_mod.")]
)
def test_half_types_wrappers_and_prefixes(tmp_path, dtype, prefix):
    """As training programs save them; the way back is the same again, and bit for bit."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    arrays = {
        f"{prefix}{name}": value if "num_batches" in name else value.astype(kind)
        for name, value in checkpoint(tmp_path).items()
    }
    arrays[f"{prefix}bn1.num_batches_tracked"] = np.array(41)
    safetensors.numpy.save_file(arrays, tmp_path / "half.safetensors")
    expected = arrays[f"{prefix}bn1.weight"].astype(np.float32)
    for source in (
        tmp_path / "half.safetensors",
        {"epoch": 3, "state_dict": arrays},
        {"model": {"state_dict": arrays}},
    ):
        model = cbam_ops.from_torch(source, name="mine")
        assert model.name == "mine"
        testing.assert_same_bits(model.get_layer("conv1_bn").gamma.numpy(), expected, "gamma")
        cbam_ops.to_torch(model, tmp_path / "back.safetensors")
        back = (tmp_path / "back.safetensors").read_bytes()
        assert dict(_raw(back)) == dict(_raw((tmp_path / "half.safetensors").read_bytes()))
    # Asked for a layout, it is that layout as such: no prefix, the network's own type.
    cbam_ops.to_torch(model, tmp_path / "other.safetensors", layout="pytorchcv")
    other = safetensors.numpy.load_file(tmp_path / "other.safetensors")
    testing.assert_same_bits(other["features.init_block.conv.bn.weight"], expected, "gamma")


def _raw(content: bytes) -> list[tuple[str, tuple]]:
    arrays = safetensors.deserialize(content)
    return [(name, (v["dtype"], v["shape"], bytes(v["data"]))) for name, v in arrays]


def test_counters_may_be_absent(tmp_path):
    """PyTorch before 0.4.1 had none."""
    arrays = {n: v for n, v in checkpoint(tmp_path).items() if not n.endswith("batches_tracked")}
    model = cbam_ops.from_torch(arrays)
    cbam_ops.to_torch(model, tmp_path / "back.safetensors")
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    assert back.keys() == arrays.keys()


def test_new_attention_around_a_plain_network(tmp_path):
    """The trunk has the checkpoint's weights, the modules a start that the dialect says."""
    plain = tiny(attention=None)
    cbam_ops.to_torch(plain, tmp_path / "plain.safetensors")
    arrays = safetensors.numpy.load_file(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r'a plain ResNet loads with attention="new"; names: bn1'):
        cbam_ops.from_torch(arrays)
    model = cbam_ops.from_torch(arrays, attention="new", dialect="timm")
    for layer in filter(lambda layer: layer.weights, plain.layers):
        for variable, value in zip(model.get_layer(layer.name).weights, layer.weights, strict=True):
            testing.assert_same_bits(variable.numpy(), value.numpy(), variable.path)
    modules = [layer for layer in model.layers if isinstance(layer, cbam_ops.CBAM)]
    assert [module.w0.shape for module in modules] == [(16, 1), (16, 1), (32, 2)]
    assert not any(module.use_bias for module in modules)
    # The official dialect has biases, which this network has not.
    with pytest.raises(ValueError, match="'official' has no modules like .*_cbam, of use_bias=Fal"):
        cbam_ops.to_torch(model, tmp_path / "back.safetensors")
    model = cbam_ops.from_torch(arrays, attention="new")
    cbam_ops.to_torch(model, tmp_path / "back.safetensors")
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    assert {name for name in back if "cbam" not in name} == set(arrays)
    assert cbam_ops.from_torch(back).count_params() == model.count_params()


def test_a_fresh_network_has_no_layout_of_its_own(tmp_path):
    """Saved and loaded by Keras, a network has forgotten where it came from."""
    arrays = checkpoint(tmp_path, "timm")
    model = cbam_ops.from_torch(arrays)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="'official' has no modules like conv2_block1_cbam"):
        cbam_ops.to_torch(loaded, tmp_path / "a.safetensors")
    cbam_ops.to_torch(loaded, tmp_path / "a.safetensors", layout="timm")
    back = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert_same_arrays(back, {name: arrays[name] for name in back})


# --- refused --------------------------------------------------------------------------------------


def _without(name: str):
    return lambda arrays: arrays.pop(name)


def _with(**new):
    return lambda arrays: arrays.update({name.replace("__", "."): v for name, v in new.items()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("bn1.bias"), "not of this network; missing: bn1.bias$"),
        (_without("fc.weight"), "not the whole network; missing: fc.weight$"),
        (_without("layer1.1.bn2.running_mean"), "missing: layer1.1.bn2.running_mean$"),
        (_without("layer2.0.downsample.0.weight"), "missing: layer2.0.downsample.0.weight$"),
        (_with(layer1__5__conv1__weight=np.ones((16, 16, 3, 3))), r"missing: layer1.2.\*$"),
        (_with(bam1__weight=np.ones(3)), "left over: bam1.weight$"),
        (_with(epoch=3), "left over: epoch$"),
        (_with(bn1__bias=np.ones(9)), r"wrong shapes: bn1.bias \(9,\) instead of \(8,\)$"),
        (_with(conv1__weight=np.ones((8, 2, 3, 3))), r"conv1.weight \(8, 2, 3, 3\) instead of"),
        (_with(conv1__weight=np.ones(8)), r"`conv1.weight` must have rank 4 .*, got shape \(8,\)"),
        (_with(fc__bias=np.ones((3, 1))), r"fc.bias \(3, 1\) instead of \(3,\)$"),
        (lambda arrays: arrays.clear(), "the dictionary holds no weights by name$"),
        (_with(), None),
    ],
)
def test_what_is_not_the_whole_network_is_refused(tmp_path, change, message):
    """Names are listed; a network with some weights of its own would pass for the checkpoint's."""
    arrays = checkpoint(tmp_path)
    change(arrays)
    if message is None:
        cbam_ops.from_torch(arrays)
        return
    with pytest.raises(ValueError, match=f"^from_torch: .*{message}"):
        cbam_ops.from_torch(arrays)


def test_long_lists_are_cut(tmp_path):
    arrays = checkpoint(tmp_path)
    arrays.update({f"other.{i}": np.ones(1) for i in range(30)})
    with pytest.raises(ValueError, match=r"left over: other.0, .*other.19 and 10 more$"):
        cbam_ops.from_torch(arrays)


def test_bad_sources(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file '.*gone\.safetensors'"):
        cbam_ops.from_torch(tmp_path / "gone.safetensors")
    with pytest.raises(ValueError, match="`source` must be the path of a checkpoint or a state d"):
        cbam_ops.from_torch(3)
    (tmp_path / "cut.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match=r"'.*cut\.safetensors' is no safetensors file: "):
        cbam_ops.from_torch(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"no layout of a CBAM network \(official, .*names: w$"):
        cbam_ops.from_torch({"w": np.ones(3)})
    with pytest.raises(ValueError, match="holds no weights by name"):
        cbam_ops.from_torch({0: np.ones(3)})
    arrays = checkpoint(tmp_path)
    with pytest.raises(ValueError, match='`attention` must be None or "new", got "?\'?cbam'):
        cbam_ops.from_torch(arrays, attention="cbam")
    with pytest.raises(ValueError, match="this one has attention of its own; names: "):
        cbam_ops.from_torch(arrays, attention="new")
    with pytest.raises(ValueError, match="this one has other names; names: w$"):
        cbam_ops.from_torch({"w": np.ones(3)}, attention="new")
    with pytest.raises(ValueError, match='`dialect` goes with attention="new"'):
        cbam_ops.from_torch(arrays, dialect="timm")


def test_bad_targets(tmp_path):
    """The model in hand, and a file that was there before, stay as they are."""
    model = tiny()
    with pytest.raises(ValueError, match="`layout` must be one of official, .*, got 'keras'"):
        cbam_ops.to_torch(model, layout="keras")
    with pytest.raises(ValueError, match=r"`layout` must be one of official, .*, got \['timm'\]"):
        cbam_ops.to_torch(model, layout=["timm"])
    with pytest.raises(ValueError, match=r"`path` must end in \.safetensors, .* or \.pt, got 'a"):
        cbam_ops.to_torch(model, "a.h5")
    with pytest.raises(ValueError, match="`path` must be a path or None, got int"):
        cbam_ops.to_torch(model, 3)
    with pytest.raises(ValueError, match="`model` must be a keras.Model, got str"):
        cbam_ops.to_torch("model.keras")
    with pytest.raises(ValueError, match=r"to_torch: cannot write .*nowhere.*: No such file"):
        cbam_ops.to_torch(model, tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(ValueError, match="with its top; no place for: sequential/dense/kernel"):
        cbam_ops.to_torch(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")],
                                           name="sequential"))  # fmt: skip
    with pytest.raises(ValueError, match="to_torch: `model` must be a CBAMResNet .* with its top$"):
        cbam_ops.to_torch(keras.Model(model.input, model.get_layer("conv3_block1_cbam").output))
    with pytest.raises(ValueError, match="like conv2_block1_cbam, of gate_activation='hard_sigm"):
        cbam_ops.to_torch(tiny(gate_activation="hard_sigmoid"))
    with pytest.raises(ValueError, match="'timm' has no modules like .*, of mlp_activation='relu'"):
        cbam_ops.to_torch(tiny(dialect="timm", mlp_activation="relu"), layout="timm")


# --- against networks that others wrote -----------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="pip install '.[test-torch]'")


@pytest.fixture(scope="module")
def timm(torch):
    """timm, which imports torchvision.

    PyPI's torchvision does not load its compiled part beside a PyTorch of another build; the two
    operators that it then lacks are declared.
    """
    library = None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except ImportError:
        pass  # as timm says itself
    yield pytest.importorskip("timm", reason="pip install '.[test-torch]'")
    del library  # until now, or its operators are gone


def randomise(torch, net, seed: int = 0):
    """Every weight and statistic a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith("num_batches_tracked"):
                value.fill_(seed + 3)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2.0, generator=generator)
            elif value.ndim == 1 and name.endswith("weight"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.ndim == 1:
                value.uniform_(-0.3, 0.3, generator=generator)
            else:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)
    return net.eval()


@pytest.fixture
def network(request: pytest.FixtureRequest, torch):
    """A network of pytorchcv or timm, with random weights, in float64."""
    name = request.param
    if name.startswith("cbam_"):
        module = pytest.importorskip("pytorchcv.models.cbamresnet")
        net = getattr(module, name)(num_classes=10)
    else:
        timm = request.getfixturevalue("timm")
        net = timm.create_model(name, num_classes=10, block_args={"attn_layer": "cbam"})
    return randomise(torch, net).double()


NETWORKS = [
    "cbam_resnet18",
    "resnet26",
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in ("cbam_resnet34", "cbam_resnet50", "cbam_resnet101", "resnet50")
    ),
    pytest.param("resnext50_32x4d", marks=pytest.mark.long),
]


def nchw(torch, x: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, 3, 1)))


@pytest.mark.parametrize("network", NETWORKS, indirect=True)
def test_logits_of_networks_that_others_wrote(torch, network):
    """In float64 both are the same function; in float32 ours errs about as much as theirs."""
    x = np.random.default_rng(3).normal(size=(1, 224, 224, 3))
    with torch.no_grad():
        truth = network(nchw(torch, x)).numpy()
        narrow = network.float()(nchw(torch, x.astype(np.float32))).numpy()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    model = cbam_ops.from_torch(state, classifier_activation=None)
    testing.assert_close(model(x.astype(np.float32)), truth, testing.FLOAT32, "float32")
    testing.assert_close(narrow, truth, testing.FLOAT32, "PyTorch's own float32")

    back = cbam_ops.to_torch(model)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    network.load_state_dict(back, strict=True)

    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    wide = {name: v.double() if v.is_floating_point() else v for name, v in state.items()}
    model = cbam_ops.from_torch(wide, classifier_activation=None)
    testing.assert_close(model(x), truth, testing.MODEL_FORWARD, "float64")


@pytest.mark.parametrize("network", ["cbam_resnet18", "resnet26"], indirect=True)
def test_gradients_of_all_weights(torch, network):
    """Fails for a weight in another's place that the logits do not show, and at a wrong tie."""
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    rng = np.random.default_rng(4)
    x, weights = rng.normal(size=(1, 224, 224, 3)), rng.normal(size=(1, 10))
    (network(nchw(torch, x)) * torch.from_numpy(weights)).sum().backward()
    model = cbam_ops.from_torch(network.state_dict(), classifier_activation=None)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x) * weights)
    gradients = tape.gradient(loss, [weight.value for weight in model.trainable_weights])
    for weight, gradient in zip(model.trainable_weights, gradients, strict=True):
        weight.assign(gradient)  # so that `to_torch` gives them their names
    actual = cbam_ops.to_torch(model)
    parameters = dict(network.named_parameters())
    assert len(parameters) == len(gradients)
    for name, parameter in parameters.items():
        testing.assert_close(
            actual[name].numpy(), parameter.grad.numpy(), testing.MODEL_GRADIENT, name
        )


@pytest.mark.parametrize(
    ("dialect", "ties"), [("pytorchcv", "first"), ("timm", "even")], ids=["pytorchcv", "timm"]
)
def test_modules_that_others_wrote(request, torch, implementation, dialect, ties):
    """On maps full of equal values: outputs, batch norm in training, and where gradients go."""
    channels, rng = 24, np.random.default_rng(5)
    if dialect == "timm":
        module = request.getfixturevalue("timm").layers.cbam.CbamModule(channels)
    else:
        pytorchcv = pytest.importorskip("pytorchcv.models.cbamresnet")
        module = pytorchcv.CbamBlock(channels, reduction_ratio=16)
    randomise(torch, module).double().train()
    layer = cbam_ops.CBAM.from_dialect(dialect, ties=ties, dtype="float64")
    layer.build((None, None, None, channels))

    def mine(arrays: dict) -> list[np.ndarray]:
        """Theirs in the order of the layer's trainable weights."""
        kernel = arrays.pop(next(name for name in arrays if "conv.weight" in name))
        kernel = kernel.transpose(2, 3, 1, 0)
        if cbam_ops.dialects[dialect].maximum_first:
            kernel = kernel[:, :, ::-1]
        norm = [arrays.pop(n) for n in list(arrays) if ".bn." in n]
        mlp = [v.reshape(v.shape[:2]).T if v.ndim > 1 else v for v in arrays.values()]
        return [*mlp, kernel, *norm]

    parameters = dict(module.named_parameters())
    for weight, value in zip(
        layer.trainable_weights,
        mine({n: p.detach().numpy() for n, p in parameters.items()}),
        strict=True,
    ):
        weight.assign(value)
    x, dy = np.round(rng.normal(size=(3, 5, 6, channels))), rng.normal(size=(3, 5, 6, channels))
    theirs = nchw(torch, x).requires_grad_()
    expected = module(theirs)
    expected.backward(nchw(torch, dy))
    with tf.GradientTape() as tape:
        t = tf.constant(x)
        tape.watch(t)
        y = layer(t, training=True)
    variables = [weight.value for weight in layer.trainable_weights]
    dx, *gradients = tape.gradient(y, [t, *variables], output_gradients=dy)

    def close(actual, value: np.ndarray, name: str) -> None:
        testing.assert_close(actual, value, testing.MODEL_GRADIENT, name)

    close(tf.transpose(y, (0, 3, 1, 2)), expected.detach().numpy(), "y")
    close(tf.transpose(dx, (0, 3, 1, 2)), theirs.grad.numpy(), "dx")
    d_weights = mine({n: p.grad.numpy() for n, p in parameters.items()})
    for weight, actual, value in zip(layer.trainable_weights, gradients, d_weights, strict=True):
        close(actual, value, weight.name)


@pytest.mark.parametrize("network", ["cbam_resnet18"], indirect=True)
def test_the_official_layout_is_the_same_network(torch, network):
    """pytorchcv's network under the official release's names, as its authors wrap and save it."""
    renamed = {}
    for name, value in network.float().state_dict().items():
        name = re.sub(r"^features\.init_block\.conv\.(conv|bn)", r"\g<1>1", name)
        name = re.sub(
            r"features\.stage(\d)\.unit(\d)", lambda m: f"layer{m[1]}.{int(m[2]) - 1}", name
        )
        name = re.sub(r"body\.conv(\d)\.(conv|bn)", r"\2\1", name)
        name = name.replace("identity_conv.conv", "downsample.0")
        name = name.replace("identity_conv.bn", "downsample.1")
        name = name.replace("ch_gate.mlp.fc1", "ChannelGate.mlp.1")
        name = name.replace("ch_gate.mlp.fc2", "ChannelGate.mlp.3")
        name = name.replace("sp_gate.conv", "SpatialGate.spatial")
        renamed[f"module.{name.replace('output', 'fc')}"] = value
    model, same = map(cbam_ops.from_torch, ({"state_dict": renamed}, network.state_dict()))
    for weight, value in zip(model.weights, same.weights, strict=True):
        testing.assert_same_bits(weight.numpy(), value.numpy(), weight.path)
    assert model.get_layer("conv2_block1_cbam").batch_norm_momentum == 0.99
    assert list(cbam_ops.to_torch(model)) == list(renamed)
    assert cbam_ops.to_torch(model, layout="pytorchcv").keys() == network.state_dict().keys()


def test_pth_files(torch, tmp_path):
    """Tensors of every type; half types come back as they were."""
    model = tiny()
    for suffix in ("pth", "pt"):
        cbam_ops.to_torch(model, tmp_path / f"a.{suffix}")
        again = cbam_ops.from_torch(tmp_path / f"a.{suffix}")
        for weight, value in zip(again.weights, model.weights, strict=True):
            testing.assert_same_bits(weight.numpy(), value.numpy(), weight.path)
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    half = {n: v.bfloat16() if v.is_floating_point() else v for n, v in state.items()}
    torch.save({"state_dict": half, "epoch": 90}, tmp_path / "half.pth.tar")
    back = cbam_ops.to_torch(cbam_ops.from_torch(tmp_path / "half.pth.tar"))
    assert all(torch.equal(back[n], v) and back[n].dtype == v.dtype for n, v in half.items())


class _Code:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_code_in_a_pickle_is_not_run(torch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"conv1.weight": _Code()}}, tmp_path / "code.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(_Code()))
    (tmp_path / "text.pth").write_text("no checkpoint")
    for name in ("code", "pickle", "text"):
        with pytest.raises(ValueError, match=rf"'.*{name}\.pth' is no checkpoint, or holds more"):
            cbam_ops.from_torch(tmp_path / f"{name}.pth")
    assert not Path("ran").exists()


def test_new_attention_in_torchvision_s_network(timm):
    torchvision = importlib.import_module("torchvision")
    plain = torchvision.models.resnet18(num_classes=10)
    model = cbam_ops.from_torch(plain.state_dict(), attention="new")
    assert (model.name, model.count_params()) == (
        "cbam_resnet18", models.CBAMResNet18(classes=10).count_params()
    )  # fmt: skip
    back = cbam_ops.to_torch(model)
    plain.load_state_dict({n: v for n, v in back.items() if "cbam" not in n}, strict=True)
