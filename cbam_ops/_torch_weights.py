"""CBAM networks of PyTorch as Keras networks, weights and all, and back.

A checkpoint holds arrays by name. The names say who wrote it, names and shapes say what the network
is; :func:`from_torch` builds that one and copies the arrays. Every variable of a Keras network has
one name in each layout (`_keys`), so that nothing can be left over on either side unnoticed.
"""

from __future__ import annotations

import io
import os
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import keras
import numpy as np

from cbam_ops import models
from cbam_ops._console import CommandError, written
from cbam_ops._dialects import dialects
from cbam_ops.layers import CBAM

__all__ = ["from_torch", "to_torch"]


class _Layout(NamedTuple):
    """Where an implementation keeps the weights; what is left out is as in torchvision's ResNet.

    All names but those of stem and classifier are in a block.
    """

    dialect: str  # of its modules
    mlp: tuple[str, str]  # first and second layer
    spatial: tuple[str, str]  # convolution and batch norm (if any), as are the pairs below
    stem: tuple[str, str] = ("conv1", "bn1")
    classifier: str = "fc"
    block: str = "layer{stage}.{block}"
    conv: tuple[str, str] = ("conv{conv}", "bn{conv}")
    shortcut: tuple[str, str] = ("downsample.0", "downsample.1")
    first_block: int = 0
    mlp_convolves: bool = False  # its layers are 1x1 convolutions


_LAYOUTS = {
    "official": _Layout(
        dialect="official",
        mlp=("cbam.ChannelGate.mlp.1", "cbam.ChannelGate.mlp.3"),
        spatial=("cbam.SpatialGate.spatial.conv", "cbam.SpatialGate.spatial.bn"),
    ),
    "timm": _Layout(
        dialect="timm",
        mlp=("se.channel.fc1", "se.channel.fc2"),
        spatial=("se.spatial.conv.conv", "se.spatial.conv.bn"),
        mlp_convolves=True,
    ),
    "pytorchcv": _Layout(
        dialect="pytorchcv",
        mlp=("cbam.ch_gate.mlp.fc1", "cbam.ch_gate.mlp.fc2"),
        spatial=("cbam.sp_gate.conv.conv", "cbam.sp_gate.conv.bn"),
        stem=("features.init_block.conv.conv", "features.init_block.conv.bn"),
        classifier="output",
        block="features.stage{stage}.unit{block}",
        conv=("body.conv{conv}.conv", "body.conv{conv}.bn"),
        shortcut=("identity_conv.conv", "identity_conv.bn"),
        first_block=1,
    ),
    "luuuyi": _Layout(
        dialect="luuuyi",
        mlp=("ca.fc.0", "ca.fc.2"),
        spatial=("sa.conv1", ""),
        mlp_convolves=True,
    ),
}

# What PyTorch calls the variables of Keras's layers, and those of CBAM with the part they are of.
_STOCK = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_MODULE = {
    "mlp_kernel_0": ("mlp", 0, "weight"),
    "mlp_bias_0": ("mlp", 0, "bias"),
    "mlp_kernel_1": ("mlp", 1, "weight"),
    "mlp_bias_1": ("mlp", 1, "bias"),
    "spatial_kernel": ("spatial", 0, "weight"),
    "batch_norm_gamma": ("spatial", 1, "weight"),
    "batch_norm_beta": ("spatial", 1, "bias"),
    "moving_mean": ("spatial", 1, "running_mean"),
    "moving_variance": ("spatial", 1, "running_var"),
}
# How many batches a batch norm has seen, which no Keras layer counts.
_COUNTER = "num_batches_tracked"
# Where training programs put the weights among other things.
_WRAPPED = ("state_dict", "model_state_dict", "model")


# What a module of one dialect has, whatever its sizes.
_FUNCTION = (
    "order",
    "pooling",
    "mlp_activation",
    "hidden_activation",
    "gate_activation",
    "mlp_merge",
    "spatial_batch_norm",
    "batch_norm_epsilon",
)


class _Source(NamedTuple):
    """What a network does not keep of the checkpoint that it came from."""

    layout: str
    prefix: str
    types: dict[str, str]  # of the arrays, in their order
    counters: dict[str, np.ndarray]


_sources: weakref.WeakKeyDictionary[keras.Model, _Source] = weakref.WeakKeyDictionary()


def from_torch(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    attention: str | None = None,
    dialect: str | None = None,
    input_shape: Sequence[int | None] | None = None,
    classifier_activation: Any = "softmax",
    name: str | None = None,
) -> keras.Model:
    """Builds the network of a PyTorch checkpoint, with its weights.

    Layouts: "official" (Jongchan/attention-module), "timm" (a ResNet or ResNeXt with
    ``attn_layer="cbam"``), "pytorchcv" (its ``cbam_resnet``) and "luuuyi" (luuuyi/CBAM.PyTorch).
    Which one it is, depth, blocks per stage, widths, groups, hidden units, kernel sizes and the
    number of classes follow from names and shapes. Every array finds its place, or nothing is
    built.

    Args:
        source: path of a ``.safetensors`` file (read without PyTorch; needs the package
            ``safetensors``) or of a ``.pth`` or ``.pt`` file (read by
            ``torch.load(weights_only=True)``, which runs no code of it), or a state dict of tensors
            or arrays. The weights may lie under ``"state_dict"``, ``"model_state_dict"`` or
            ``"model"``, and all names begin with the same, as ``module.``; half types are widened.
        attention: None, or "new" for a plain ResNet's checkpoint (of torchvision or timm): its
            blocks get modules with initial weights.
        dialect: one of `cbam_ops.dialects`, of new modules only; None is "official".
        input_shape: shape of the images without the batch; None as for the networks of
            `cbam_ops.models` (224 x 224).
        classifier_activation: activation of the classifier; None returns logits.
        name: name of the model; None is for example "cbam_resnet50".

    Returns:
        A `keras.Model`, as `cbam_ops.models.CBAMResNet50` and its like.

    Raises:
        ValueError: the file is no checkpoint, holds more than weights, or is of another network;
            names that are missing, left over or of another shape are listed.
        ImportError: PyTorch, or the package safetensors, is not installed.
    """
    if attention not in (None, "new"):
        _refuse(f'`attention` must be None or "new", got {attention!r}')
    if dialect is not None and attention is None:
        _refuse('`dialect` goes with attention="new"; a checkpoint\'s own modules have theirs')
    prefix, tensors = _weights(source)
    layout_name = _layout_of(tensors, attention)
    layout = _LAYOUTS[layout_name]
    shapes = {key: tuple(getattr(tensor, "shape", ())) for key, tensor in tensors.items()}
    network = _network(shapes, layout, attention, dialect)
    channels = _shape(shapes, f"{layout.stem[0]}.weight", 4)[1]
    images = models.image_input(None, input_shape, True, network.data_format, channels)
    classes = _shape(shapes, f"{layout.classifier}.weight", 2)[0]
    outputs = network.top(network.features(images), classes, classifier_activation)
    if name is None:
        name = models.name_of(network.architecture)
    model = keras.Model(images, outputs, name=name)

    keys = _keys(model, layout)
    if attention == "new":
        keys = {key: place for key, place in keys.items() if not isinstance(place.layer, CBAM)}
    arrays = _matched(tensors, shapes, keys, layout)
    for key, place in keys.items():
        place.variable.assign(_to_keras(arrays[key], place, layout))
    _sources[model] = _Source(
        layout_name,
        prefix,
        {key: _type_name(tensor) for key, tensor in tensors.items()},
        {key: _array(tensors[key]) for key in tensors if key.endswith(_COUNTER)},
    )
    return model


def to_torch(
    model: keras.Model, path: str | os.PathLike[str] | None = None, layout: str | None = None
) -> dict[str, Any] | None:
    """The weights of a network as a PyTorch checkpoint.

    Args:
        model: a network of :func:`from_torch`, or a `CBAMResNet` of `cbam_ops.models` with its top.
        path: of the file to write: ``.safetensors`` (without PyTorch; needs the package
            ``safetensors``), ``.pth`` or ``.pt``; None for none.
        layout: one of those of :func:`from_torch`. None is that of the checkpoint which it built
            this very object from, with its prefix, its types and its counts of batches; and
            "official" for all other networks.

    Returns:
        Without a path the state dict, of PyTorch tensors; else None.

    Raises:
        ValueError: the model is another network, its modules are not those of the layout, or the
            file cannot be written.
        ImportError: PyTorch, or the package safetensors, is not installed.
    """
    if not isinstance(model, keras.Model):
        _refuse(f"`model` must be a keras.Model, got {type(model).__name__}", "to_torch")
    if not (path is None or isinstance(path, (str, os.PathLike))):
        _refuse(f"`path` must be a path or None, got {type(path).__name__}", "to_torch")
    source = _sources.get(model)
    if layout is None:
        layout = source.layout if source else "official"
    if layout not in tuple(_LAYOUTS):
        _refuse(f"`layout` must be one of {', '.join(_LAYOUTS)}, got {layout!r}", "to_torch")
    suffix = None if path is None else Path(path).suffix
    if suffix not in (None, ".safetensors", ".pth", ".pt"):
        _refuse(f"`path` must end in .safetensors, .pth or .pt, got {str(path)!r}", "to_torch")
    arrays = _arrays(model, layout, source)
    if path is None:
        return _tensors(arrays)
    if suffix == ".safetensors":
        content = _safetensors().numpy.save(arrays)
    else:
        buffer = io.BytesIO()
        _torch("writing a .pth file", "to_torch").save(_tensors(arrays), buffer)
        content = buffer.getvalue()
    try:
        with written(Path(path)) as part:
            part.write_bytes(content)
    except CommandError as error:
        raise ValueError(f"to_torch: {error}") from error
    return None


def _refuse(message: str, function: str = "from_torch", cause: Exception | None = None) -> NoReturn:
    raise ValueError(f"{function}: {message}") from cause


# --- files ----------------------------------------------------------------------------------------


def _weights(source: Any) -> tuple[str, dict[str, Any]]:
    """The common prefix of all names, and the arrays without it."""
    tensors = source if isinstance(source, Mapping) else _read(source)
    while isinstance(tensors, Mapping):
        inner = next((tensors[n] for n in _WRAPPED if isinstance(tensors.get(n), Mapping)), None)
        if inner is None:
            break
        tensors = inner
    if not isinstance(tensors, Mapping) or not tensors or not all(map(_is_name, tensors)):
        _refuse(f"{_text(source)} holds no weights by name")
    stems = {f"{layout.stem[0]}.weight" for layout in _LAYOUTS.values()}
    before = (k.removesuffix(s) for k in tensors for s in stems if f".{k}".endswith(f".{s}"))
    prefix = next((p for p in before if all(k.startswith(p) for k in tensors)), "")
    return prefix, {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def _is_name(key: Any) -> bool:
    return isinstance(key, str)


def _text(source: Any) -> str:
    return "the dictionary" if isinstance(source, Mapping) else repr(os.fspath(source))


def _read(source: Any) -> Any:
    try:
        path = Path(source)
    except TypeError:
        kind = type(source).__name__
        _refuse(f"`source` must be the path of a checkpoint or a state dict, got {kind}")
    if not path.is_file():
        _refuse(f"there is no file {str(path)!r}")
    if path.suffix == ".safetensors":
        safetensors = _safetensors()
        try:
            found = safetensors.deserialize(path.read_bytes())
            return {key: _numpy(value) for key, value in found}
        except Exception as error:  # the package's own kinds
            _refuse(f"{str(path)!r} is no safetensors file: {error}", cause=error)
    torch = _torch(f"reading {str(path)!r}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds: of pickle, of zip files, of the tensors
        cause = " ".join(str(error).split()).split(". ")[0]
        _refuse(
            f"{str(path)!r} is no checkpoint, or holds more than weights, whose code is not run "
            f"(of a model, save its state_dict()): {type(error).__name__}: {cause}",
            cause=error,
        )


def _torch(purpose: str, function: str = "from_torch") -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{function}: {purpose} needs PyTorch (pip install torch); .safetensors files do not."
        ) from error
    return torch


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "A .safetensors file needs the package safetensors: pip install 'cbam-ops[safetensors]'"
        ) from error
    return safetensors


def _numpy(value: Mapping[str, Any]) -> np.ndarray:
    """An array of a safetensors file."""
    import ml_dtypes

    kinds = {"F": "float", "I": "int", "U": "uint"}
    name = value["dtype"]
    kind = ml_dtypes.bfloat16 if name == "BF16" else kinds[name[0]] + name[1:]
    return np.frombuffer(value["data"], np.dtype(kind)).reshape(value["shape"])


def _type_name(tensor: Any) -> str:
    return str(getattr(tensor, "dtype", "")).removeprefix("torch.")


def _array(tensor: Any) -> np.ndarray:
    """A tensor of PyTorch or an array, as an array."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        tensor = (tensor.float() if _type_name(tensor) == "bfloat16" else tensor).numpy()
    return np.asarray(tensor)


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    torch = _torch("a state dict", "to_torch")
    return {
        key: torch.tensor(
            array.astype("float32") if array.dtype.name == "bfloat16" else array,
            dtype=getattr(torch, array.dtype.name),
        )
        for key, array in arrays.items()
    }


# --- names and shapes -----------------------------------------------------------------------------


class _Place(NamedTuple):
    """Where an array of a checkpoint is in a Keras network."""

    layer: keras.layers.Layer
    variable: keras.Variable
    name: str  # of the variable


def _keys(model: keras.Model, layout: _Layout, function: str = "from_torch") -> dict[str, _Place]:
    """Every variable of a network under its name in the layout."""
    found, left = {}, []
    for layer in model.layers:
        for variable in layer.weights:
            key = _key(layer, variable.name, layout)
            if key is None:
                left.append(variable.path)
            else:
                found[key] = _Place(layer, variable, variable.name)
    if left or f"{layout.classifier}.weight" not in found:
        _refuse(
            "`model` must be a CBAMResNet of cbam_ops.models, as from_torch builds it, with its "
            f"top{_listed('no place for', left)}",
            function,
        )
    return found


def _key(layer: keras.layers.Layer, variable: str, layout: _Layout) -> str | None:
    """The name of a layer's variable; None if the layout has none."""
    stock = _STOCK.get(variable)
    if stock is not None and layer.name == models.Released.classifier:
        return f"{layout.classifier}.{stock}"
    if stock is not None and layer.name in ("conv1_conv", "conv1_bn"):
        return f"{layout.stem[layer.name == 'conv1_bn']}.{stock}"
    match = re.fullmatch(r"conv(\d+)_block(\d+)_(cbam|(\d)_(conv|bn))", layer.name)
    if match is None:
        return None
    stage, block, rest, conv, kind = match.groups()
    if rest == "cbam":
        if variable not in _MODULE:
            return None
        part, index, stock = _MODULE[variable]
    else:
        part, index = "shortcut" if conv == "0" else "conv", int(kind == "bn")
    within = getattr(layout, part)[index].format(conv=conv)
    where = _block(layout, int(stage) - 2, int(block) - 1)
    return f"{where}.{within}.{stock}"


def _block(layout: _Layout, stage: int, block: int) -> str:
    return layout.block.format(stage=stage + 1, block=block + layout.first_block)


def _layout_of(tensors: Mapping[str, Any], attention: str | None) -> str:
    """The layout that has such names; those of plain networks are the official release's."""
    with_attention = [
        name
        for name, layout in _LAYOUTS.items()
        if any(f".{layout.mlp[0]}." in key for key in tensors)
    ]
    if attention is None and with_attention:
        return with_attention[0]
    plain = f"{_block(_LAYOUTS['official'], 0, 0)}.conv1.weight" in tensors
    if attention == "new" and plain and not with_attention:
        return "official"
    if attention == "new":
        reason = "has attention of its own" if with_attention else "has other names"
        _refuse(
            'attention="new" is for the checkpoint of a plain ResNet of torchvision or timm; this '
            f"one {reason}{_listed('names', tensors)}"
        )
    hint = '; a plain ResNet loads with attention="new"' if plain else ""
    _refuse(
        f"no layout of a CBAM network ({', '.join(_LAYOUTS)}) has such names{hint}"
        f"{_listed('names', tensors)}"
    )


def _shape(shapes: Mapping[str, tuple[int, ...]], key: str, rank: int) -> tuple[int, ...]:
    """The shape of an array that says what the network is."""
    if key not in shapes:
        _refuse(f"not the whole network{_listed('missing', [key])}")
    if len(shapes[key]) != rank or not all(shapes[key]):
        _refuse(f"`{key}` must have rank {rank} and no dimension of 0, got shape {shapes[key]}")
    return shapes[key]


def _network(
    shapes: Mapping[str, tuple[int, ...]],
    layout: _Layout,
    attention: str | None,
    dialect: str | None,
) -> models.Released:
    """The layers of the network that has such shapes, as far as few of them tell."""
    pattern = f"{layout.block}.{layout.conv[0]}.weight"
    pattern = re.escape(pattern).replace(r"\{", "{").replace(r"\}", "}")
    pattern = pattern.format(stage=r"(\d+)", block=r"(\d+)", conv=r"(\d)")
    matches = [m for m in map(re.compile(pattern).fullmatch, shapes) if m]
    numbers = {(int(m[1]) - 1, int(m[2]) - layout.first_block) for m in matches}
    stages = sorted({stage for stage, _ in numbers})
    blocks = tuple(sum(stage == other for other, _ in numbers) for stage in stages)
    whole = {(stage, block) for stage, n in enumerate(blocks) for block in range(n)}
    if not numbers or numbers != whole:
        missing = [f"{_block(layout, *place)}.*" for place in sorted(whole - numbers)]
        _refuse(f"not the whole network{_listed('missing', missing or ['every block'])}")

    def conv(stage: int, number: int) -> tuple[int, ...]:
        name = layout.conv[0].format(conv=number)
        return _shape(shapes, f"{_block(layout, stage, 0)}.{name}.weight", 4)

    bottleneck = any(m[3] == "3" for m in matches)
    expansion = models.BOTTLENECK_EXPANSION if bottleneck else 1
    filters = tuple(conv(stage, 3 if bottleneck else 2)[0] // expansion for stage in stages)
    if not all(filters):
        _refuse(f"a bottleneck must end in {expansion} filters or more, got {filters}")
    stem = _shape(shapes, f"{layout.stem[0]}.weight", 4)[0]
    architecture = models.Architecture(blocks, bottleneck, filters, stem)
    if bottleneck:
        width, depth = conv(0, 2)[:2]
        groups = max(1, width // depth)
        group_width = width * 64 // (filters[0] * groups)
        if min(filters) * group_width < 64:
            _refuse(f"a stage of {min(filters)} filters has no bottlenecks of {width} in the first")
        architecture = architecture._replace(groups=groups, group_width=group_width)
    if attention == "new":
        return models.Released(architecture, "cbam", dialect, {})
    options = {"use_bias": True} if any(f"{layout.mlp[0]}.bias" in key for key in shapes) else {}
    of_block = {}
    for stage, block in sorted(whole):
        where = _block(layout, stage, block)
        mlp = _shape(shapes, f"{where}.{layout.mlp[0]}.weight", 4 if layout.mlp_convolves else 2)
        spatial = _shape(shapes, f"{where}.{layout.spatial[0]}.weight", 4)
        options_of_block = {"hidden": mlp[0], "kernel_size": spatial[2]}
        of_block[f"conv{stage + 2}_block{block + 1}"] = options_of_block
    return models.Released(architecture, "cbam", layout.dialect, options, of_block)


def _matched(
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    keys: Mapping[str, _Place],
    layout: _Layout,
) -> dict[str, np.ndarray]:
    """The arrays, each of the shape of its place; refuses what does not match."""
    norms = {key.rpartition(".")[0] for key in keys if key.endswith(".running_var")}
    counters = {f"{norm}.{_COUNTER}" for norm in norms}
    missing = [key for key in keys if key not in tensors]
    left = [key for key in tensors if key not in keys and key not in counters]
    expected = {
        key: _to_torch(np.empty(place.variable.shape, np.bool_), place, layout).shape
        for key, place in keys.items()
    }
    wrong = [
        f"{key} {shapes[key]} instead of {shape}"
        for key, shape in expected.items()
        if key in shapes and shapes[key] != shape
    ]
    if missing or left or wrong:
        _refuse(
            "the checkpoint is not of this network"
            + _listed("missing", missing)
            + _listed("left over", left)
            + _listed("wrong shapes", wrong)
        )
    return {key: _array(tensors[key]) for key in keys}


def _listed(what: str, names: Iterable[str], most: int = 20) -> str:
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; {what}: {', '.join(names[:most])}{rest}" if names else ""


# --- values ---------------------------------------------------------------------------------------


def _to_torch(array: np.ndarray, place: _Place, layout: _Layout) -> np.ndarray:
    """A variable's value in the layout: its order of a kernel's axes and of the descriptors."""
    if place.name == "spatial_kernel" and dialects[layout.dialect].maximum_first:
        array = array[:, :, ::-1]
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 2:
        array = array.T
        if layout.mlp_convolves and place.name in _MODULE:
            array = array[:, :, None, None]
    return array


def _to_keras(array: np.ndarray, place: _Place, layout: _Layout) -> np.ndarray:
    """The inverse of `_to_torch`."""
    if layout.mlp_convolves and place.name.startswith("mlp_kernel"):
        array = array[:, :, 0, 0]
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
        if place.name == "spatial_kernel" and dialects[layout.dialect].maximum_first:
            array = array[:, :, ::-1]
    return array.T if array.ndim == 2 else array


def _arrays(model: keras.Model, layout_name: str, source: _Source | None) -> dict[str, np.ndarray]:
    """The checkpoint's arrays by name, in the order of the checkpoint that the model came from."""
    layout = _LAYOUTS[layout_name]
    keys = _keys(model, layout, "to_torch")
    _check_modules(keys, layout_name)
    arrays = {}
    for key, place in keys.items():
        arrays[key] = _to_torch(np.asarray(place.variable), place, layout)
        if key.endswith(".running_var"):
            arrays[f"{key.rpartition('.')[0]}.{_COUNTER}"] = np.array(0, np.int64)
    if source is None or source.layout != layout_name:
        source = _Source(layout_name, "", {}, {})
    arrays.update(source.counters)
    if source.types:  # what is not in the checkpoint are new modules
        new = [key for key in arrays if key not in source.types]
        if not source.counters:
            new = [key for key in new if not key.endswith(_COUNTER)]
        arrays = {key: arrays[key] for key in (*source.types, *new)}
    import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by it)

    return {
        source.prefix + key: np.array(array, source.types.get(key, array.dtype), order="C")
        for key, array in arrays.items()
    }


def _check_modules(keys: Mapping[str, _Place], layout: str) -> None:
    """The layout's code computes its own dialect, whatever the weights are."""
    expected = CBAM.from_dialect(_LAYOUTS[layout].dialect)
    for layer in dict.fromkeys(p.layer for p in keys.values() if isinstance(p.layer, CBAM)):
        other = [name for name in _FUNCTION if getattr(layer, name) != getattr(expected, name)]
        other += ["hidden"] * (layer.hidden == 0)
        other += ["use_bias"] * (expected.use_bias and not layer.use_bias)
        if other:
            has = ", ".join(f"{name}={getattr(layer, name)!r}" for name in other)
            _refuse(f"the layout {layout!r} has no modules like {layer.name}, of {has}", "to_torch")
