"""Inside XLA the same kernels run: as custom calls, with the bits of the ops outside it.

Results are compared by their bits where XLA has no part in them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from programs import run_python

import cbam_ops
from cbam_ops import _loader, ops
from cbam_ops import options as choices
from cbam_ops.testing import (
    FLOAT32,
    LARGE,
    OPTIONS,
    SECOND_ORDER_TOLERANCE,
    SIZES,
    Case,
    assert_close,
    assert_same_bits,
    digest,
    options,
)

pytestmark = pytest.mark.usefixtures("native")

OPS = [
    f"CbamOps>{name}{suffix}"
    for name in ("Cbam", "ChannelAttention", "SpatialAttention", "ChannelPool", "SpatialPool")
    for suffix in ("", "Grad")
]


@pytest.fixture
def native(request):
    if not _loader.build_record()["xla"] and "old TensorFlow" not in request.node.name:
        pytest.skip("this TensorFlow lacks the headers of XLA's custom calls")
    with cbam_ops.use_implementation("native"):
        yield


@pytest.fixture
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(choices, "_warned", set())


def step(case: Case):
    """A function of a case's tensors: all outputs, then the gradients of all tensors in order."""

    def outputs_and_gradients(*values):
        tensors = dict(zip(case.names, values, strict=True))
        outputs = case.call(ops, tensors)
        return [*outputs, *case.gradients(ops, tensors).values()]

    return outputs_and_gradients


def compiled(function, **keywords):
    """The function compiled by XLA, without TensorFlow's advice on how often to do that."""
    return tf.function(function, autograph=False, jit_compile=True, **keywords)


def hlo(function, *arguments) -> str:
    return function.experimental_get_compiler_ir(*arguments)(stage="hlo")


def custom_calls(text: str) -> list[str]:
    """The ops that a program in HLO calls, in order."""
    return [name for line in text.splitlines() for name in OPS if f'target="{name}"' in line]


def check_bits(actual, expected) -> None:
    assert len(actual) == len(expected)
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(ours.numpy(), theirs.numpy(), f"result {i}")


# --- every op, type, layout and option ------------------------------------------------------------


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_kernel_of_xla(op):
    """For GPUs exactly where the CUDA kernels were built: elsewhere the reference is to compute."""
    from tensorflow.python.framework import kernels

    assert _loader.load_xla() is None
    registered = [k.device_type for k in kernels.get_registered_kernels_for_op(op).kernel]
    cuda = _loader.build_record()["cuda"]["enabled"]
    assert registered.count("XLA_CPU_JIT") == 1
    assert registered.count("XLA_GPU_JIT") == int(cuda)


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_every_option_has_the_same_bits(case, dtype, data_format):
    """Fails where an option, a type or an optional argument is lost on the way through XLA."""
    case = case.replace(dtype=dtype, data_format=data_format)
    values = list(case.draw().values())
    function = step(case)
    check_bits(compiled(function)(*values), function(*values))


@pytest.mark.parametrize("case", [*SIZES, *LARGE], ids=str)
def test_every_size_has_the_same_bits(case):
    """Fails where scratch memory is too small, or misaligned, for a shape."""
    values = list(case.draw().values())
    function = step(case)
    check_bits(compiled(function)(*values), function(*values))


@pytest.mark.parametrize("case", [OPTIONS[3], OPTIONS[6], *OPTIONS[-2:]], ids=str)
def test_an_empty_batch_is_legal(case):
    case = case.replace(size=(0, 5, 7, 13))
    values = list(case.draw().values())
    function = step(case)
    check_bits(compiled(function)(*values), function(*values))


def test_special_values_and_denormals_have_the_same_bits():
    """Fails where XLA's threads run with other floating-point modes than TensorFlow's."""
    case = OPTIONS[3]
    tensors = case.draw()
    x = tensors["x"].numpy()
    x[0, 2, 3, 4], x[0, 0, 0, 0], x[1, 1, 1] = np.nan, np.inf, 1e-39
    values = [tf.constant(x), *list(tensors.values())[1:]]
    function = step(case)
    check_bits(compiled(function)(*values), function(*values))


def test_a_call_is_one_custom_call():
    """Fails where something is computed twice, or by XLA itself."""
    case = Case(
        residual=True, options=options(activation="relu"), dtype="bfloat16", data_format="NCHW"
    )
    tensors = case.draw()

    def function(tensors):
        return case.gradients(ops, tensors)

    text = hlo(compiled(function), tensors)
    assert custom_calls(text) == ["CbamOps>Cbam", "CbamOps>CbamGrad"]
    assert text.count("custom-call(") == 2
    assert "convolution" not in text and "reduce(" not in text


def test_options_travel_with_the_call():
    """Fails where a handler's own defaults could stand in for what the user asked for."""
    case = Case("cbam_with_batch_norm", options=options(epsilon=0.1, mlp_activation="relu"))
    tensors = case.draw()
    text = hlo(compiled(lambda t: case.call(ops, t)), tensors)
    bits = np.float32(0.1).view(np.uint32)
    (line,) = [line for line in text.splitlines() if 'target="CbamOps>Cbam"' in line]
    for attribute in (f"epsilon = 0x{bits:08X} : f32", 'mlp_activation = "relu"', "num_gamma = 1"):
        assert attribute in line


# --- how XLA is met -------------------------------------------------------------------------------


def test_the_reference_is_plain_hlo():
    """Fails where the choice of implementation is lost inside XLA, in either direction."""
    case = Case()
    tensors = case.draw()

    def function(tensors):
        return case.gradients(ops, tensors)

    assert custom_calls(hlo(compiled(function), tensors)) == ["CbamOps>Cbam", "CbamOps>CbamGrad"]
    with cbam_ops.use_implementation("reference"):
        text = hlo(compiled(function), tensors)
    assert 'custom_call_target="CbamOps' not in text
    with cbam_ops.use_implementation("auto"), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert custom_calls(hlo(compiled(function), tensors))


def test_a_function_traced_outside_before():
    """Fails where only calls made inside XLA are prepared for it."""
    case = OPTIONS[3]
    values = list(case.draw().values())
    inner = tf.function(step(case), autograph=False)
    expected = inner(*values)
    check_bits(compiled(lambda *v: inner(*v))(*values), expected)


def test_a_loop_inside_xla():
    case = Case(options=options(activation="relu"))
    tensors = case.draw()

    def function(x):
        def body(i, x):
            return i + 1, case.call(ops, {**tensors, "x": x})[0]

        return tf.while_loop(lambda i, _: i < 3, body, (0, x), maximum_iterations=3)[1]

    def with_gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        return y, tape.gradient(y, x)

    program = compiled(with_gradient)
    check_bits(program(tensors["x"]), tf.function(with_gradient, autograph=False)(tensors["x"]))
    assert set(custom_calls(hlo(program, tensors["x"]))) == {"CbamOps>Cbam", "CbamOps>CbamGrad"}


def test_sizes_unknown_when_traced():
    """Fails where a dynamic batch costs XLA, or where a shape of one call reaches another."""
    case = Case()
    spec = [tf.TensorSpec([None] * t.shape.rank, t.dtype) for t in case.draw().values()]
    function = compiled(step_of_any_size, input_signature=spec)
    for size in ((1, 5, 7, 13), (4, 5, 7, 13), (2, 9, 3, 13)):
        sized = case.replace(size=size)
        values = list(sized.draw().values())
        check_bits(function(*values), step_of_any_size(*values))


def step_of_any_size(x, w0, b0, w1, b1, kernel, bias):
    with tf.GradientTape() as tape:
        tape.watch([x, w0])
        y = cbam_ops.cbam(x, w0, b0, w1, b1, kernel, bias)
    return [y, *tape.gradient(y, [x, w0])]


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_a_batch_that_xla_only_bounds(data_format):
    """Fails where samples that a mask left out reach a result, be it as garbage."""
    case = Case(
        size=(5, 5, 7, 13),
        residual=True,
        options=options(activation="relu"),
        data_format=data_format,
    )
    tensors = case.draw()
    keep = tf.constant([True, False, True, True, False])

    def function(keep, *values):
        tensors = dict(zip(case.names, values, strict=True))
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            kept = {
                n: tf.boolean_mask(t, keep) if n in ("x", "residual") else t
                for n, t in tensors.items()
            }
            y, *gates = case.call(ops, kept)
            loss = tf.reduce_sum(y * y) + sum(tf.reduce_sum(g * g) for g in gates)
        gradients = tape.gradient(loss, tensors)
        return [y, *gates, *gradients.values()]

    program = compiled(function)
    actual, expected = program(keep, *tensors.values()), function(keep, *tensors.values())
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_close(ours, theirs, FLOAT32, f"result {i}")
    assert "CbamOps>CbamGrad" in custom_calls(hlo(program, keep, *tensors.values()))


def test_second_order():
    case = Case("cbam_with_batch_norm", size=(2, 3, 4, 5), residual=True, dtype="float64")
    values = list(case.draw().values())

    def function(*values):
        tensors = dict(zip(case.names, values, strict=True))
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            gradients = case.gradients(ops, tensors)
            loss = sum(tf.reduce_sum(g * g) for g in gradients.values())
        return [*gradients.values(), *tape.gradient(loss, tensors).values()]

    actual, expected = compiled(function)(*values), function(*values)
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_close(ours, theirs, SECOND_ORDER_TOLERANCE["float64"], f"result {i}")


AUTO_CLUSTERING = """
    import sys
    import tensorflow as tf
    tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[2]))
    if sys.argv[1] == "on":
        tf.config.optimizer.set_jit("autoclustering")
    import cbam_ops
    from cbam_ops import ops
    from cbam_ops.testing import Case, digest, options
    cbam_ops.set_implementation("native")
    case = Case(size=(2, 20, 20, 13), residual=True, options=options(activation="relu"))
    tensors = case.draw()

    @tf.function(autograph=False)
    def function(tensors):
        gradients = case.gradients(ops, tensors)
        return [case.call(ops, tensors), {k: 2.0 * g for k, g in gradients.items()}]

    print(digest(function(tensors)))
"""


def test_auto_clustering(tmp_path):
    """Fails where clusters that XLA chooses itself stop at the ops, or change what they compute."""
    flags = {"TF_XLA_FLAGS": "--tf_xla_cpu_global_jit --tf_xla_min_cluster_size=1"}
    dump = {"XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"}
    plain = run_python(AUTO_CLUSTERING, "off", "2")
    assert run_python(AUTO_CLUSTERING, "on", "2", **flags, **dump)[-1] == plain[-1]
    programs = "".join(path.read_text() for path in tmp_path.glob("*before_optimizations.txt"))
    assert set(custom_calls(programs)) == {"CbamOps>Cbam", "CbamOps>CbamGrad"}


# --- Keras ----------------------------------------------------------------------------------------


def network(**arguments) -> keras.Model:
    keras.utils.set_random_seed(3)
    inputs = keras.Input((8, 6, 4))
    x = keras.layers.Conv2D(16, 3, padding="same")(inputs)
    x = cbam_ops.CBAM(ratio=4, kernel_size=3, activation="relu", **arguments)(x, residual=x)
    x = cbam_ops.ChannelAttention(ratio=4)(x)
    x = cbam_ops.SpatialAttention(kernel_size=3)(x)
    x = keras.layers.GlobalAveragePooling2D(dtype="float32")(x)
    return keras.Model(inputs, keras.layers.Dense(3, dtype="float32")(x))


def train(jit_compile: bool, **arguments) -> tuple[list[float], list[np.ndarray]]:
    """Losses and predictions; the last batch of the data is a smaller one."""
    generator = np.random.default_rng(4)
    x = generator.normal(size=(10, 8, 6, 4)).astype("float32")
    y = generator.integers(0, 3, size=10)
    model = network(**arguments)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05), loss, jit_compile=jit_compile)
    assert model.jit_compile == jit_compile
    history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0).history["loss"]
    evaluated = model.evaluate(x, y, batch_size=4, verbose=0)
    return [*history, evaluated], [model.predict(x, batch_size=4, verbose=0), *model.get_weights()]


@pytest.mark.parametrize("spatial_batch_norm", [False, True])
def test_a_model_trains_inside_xla(spatial_batch_norm):
    """Fails where fit, evaluate or predict, a last small batch, or moving statistics break."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        losses, arrays = train(True, spatial_batch_norm=spatial_batch_norm)
        expected_losses, expected = train(False, spatial_batch_norm=spatial_batch_norm)
    assert_close(np.array(losses), np.array(expected_losses), 10 * FLOAT32, "losses")
    for i, (ours, theirs) in enumerate(zip(arrays, expected, strict=True)):
        assert_close(ours, theirs, 100 * FLOAT32, f"array {i}")


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    layer = cbam_ops.CBAM(ratio=4, kernel_size=3, dtype=policy)
    x = tf.random.stateless_normal((2, 6, 5, 16), (1, 2))

    def function(x):
        with tf.GradientTape() as tape:
            y = layer(x)
        return [y, *tape.gradient(y, layer.trainable_variables)]

    expected = function(x)
    program = compiled(function)
    check_bits(program(x), expected)
    half = {"mixed_float16": "f16[2,6,5,16]", "mixed_bfloat16": "bf16[2,6,5,16]"}[policy]
    (line,) = [line for line in hlo(program, x).splitlines() if 'target="CbamOps>Cbam"' in line]
    assert half in line


def test_layers_support_xla(fresh_warnings):
    for layer in (cbam_ops.CBAM(), cbam_ops.ChannelAttention(), cbam_ops.SpatialAttention()):
        for implementation in ("native", "auto", "reference"):
            with cbam_ops.use_implementation(implementation), warnings.catch_warnings():
                warnings.simplefilter("error")
                assert layer.supports_jit
        layer.supports_jit = False
        assert not layer.supports_jit


def test_mirrored_on_two_processors():
    """Fails where replicas compiled by XLA share what is one replica's.

    The weights are arguments of what is compiled: XLA in TensorFlow takes no variable of a second
    logical processor, stock layers' included.
    """
    lines = run_python(
        """
        import tensorflow as tf
        from cbam_ops.testing import FLOAT32, assert_close
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2)
        import cbam_ops
        cbam_ops.set_implementation("native")
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
        x = tf.random.stateless_normal((4, 6, 5, 16), (1, 2))
        with strategy.scope():
            layer = cbam_ops.CBAM(ratio=4, kernel_size=3)
            layer.build(x.shape)

        def step(x, *weights):
            with tf.GradientTape() as tape:
                tape.watch(weights)
                y = cbam_ops.cbam(x, *weights)
                loss = tf.reduce_sum(y * y)
            return loss, tape.gradient(loss, weights)

        inner = tf.function(step, jit_compile=True)

        @tf.function
        def replicated(x):
            halves = strategy.experimental_distribute_values_from_function(
                lambda context: tf.split(x, 2)[context.replica_id_in_sync_group])
            replica = lambda half: inner(half, *[v.value for v in layer.trainable_variables])
            return strategy.reduce("SUM", strategy.run(replica, (halves,)), axis=None)

        weights = [v.numpy() for v in layer.trainable_variables]
        parts = [step(half, *map(tf.constant, weights)) for half in tf.split(x, 2)]
        expected = tf.nest.map_structure(lambda a, b: a + b, *parts)
        for a, e in zip(tf.nest.flatten(replicated(x)), tf.nest.flatten(expected), strict=True):
            assert_close(a, e, FLOAT32, "sum of the replicas")
        print(strategy.num_replicas_in_sync)
        """
    )
    assert lines[-1] == "2"


def test_determinism():
    """`enable_op_determinism` needs no exception for the ops inside XLA."""
    lines = run_python(
        """
        import tensorflow as tf
        tf.config.experimental.enable_op_determinism()
        import cbam_ops
        from cbam_ops import ops
        from cbam_ops.testing import Case, digest
        cbam_ops.set_implementation("native")
        case = Case(size=(4, 20, 20, 13))
        tensors = case.draw()
        function = lambda t: [case.call(ops, t), case.gradients(ops, t)]
        compiled = tf.function(function, autograph=False, jit_compile=True)
        print(*{digest(compiled(tensors)) for _ in range(5)}, digest(function(tensors)))
        """
    )
    repeated, outside = lines[-1].split()
    assert repeated == outside


# --- threads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", ["1", "5"])
def test_calls_from_many_threads_of_a_small_pool(threads):
    """Fails where a call waits for work queued behind it, or for more threads than there are."""
    lines = run_python(
        """
        import sys, threading
        import tensorflow as tf
        tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
        tf.config.threading.set_inter_op_parallelism_threads(1)
        import cbam_ops
        from cbam_ops import ops
        from cbam_ops.testing import LARGE, digest
        cbam_ops.set_implementation("native")
        case = LARGE[1]
        tensors = case.draw()
        function = lambda t: [case.call(ops, t), case.gradients(ops, t)]
        compiled = tf.function(function, autograph=False, jit_compile=True)
        expected = digest(function(tensors))
        text = compiled.experimental_get_compiler_ir(tensors)(stage="hlo")
        assert text.count(f"threads = {sys.argv[1]} : i32") == 3, text
        wrong = []

        def work():
            for _ in range(3):
                if digest(compiled(tensors)) != expected:
                    wrong.append(threading.get_ident())

        workers = [threading.Thread(target=work) for _ in range(8)]
        for worker in workers: worker.start()
        for worker in workers: worker.join()
        print(len(wrong))
        """,
        threads,
    )
    assert lines[-1] == "0"


# --- memory ---------------------------------------------------------------------------------------


def test_inputs_may_lie_anywhere(dtype):
    """Fails where a kernel inside XLA takes the alignment of a whole tensor for granted."""
    case = Case(size=(4, 3, 3, 5), dtype=dtype)
    tensors = case.draw()
    program = compiled(step(case))
    for start in range(1, 4):
        part = {**tensors, "x": tensors["x"][start:]}  # shares the buffer, at an odd offset
        check_bits(program(*part.values()), step(case)(*part.values()))


def test_inputs_stay_as_they_are():
    """Fails where XLA lets an output take over an input's buffer: x is read again after y."""
    case = Case(residual=True, options=options(activation="relu"))
    tensors = case.draw()

    def function(tensors):
        temporaries = {name: tensor * 2.0 for name, tensor in tensors.items()}
        return case.call(ops, temporaries), list(temporaries.values())

    outputs, after = compiled(function)(tensors)
    expected, before = function(tensors)
    check_bits([*outputs, *after], [*expected, *before])


# --- loading --------------------------------------------------------------------------------------

COMPARE = """
        import sys, warnings
        from pathlib import Path
        import tensorflow as tf
        from cbam_ops.testing import Case, digest
        case = Case()
        tensors = case.draw()

        def function(tensors):
            from cbam_ops import ops
            return [case.call(ops, tensors), case.gradients(ops, tensors)]

        def compare():
            import cbam_ops
            with cbam_ops.use_implementation("native"):
                compiled = tf.function(function, autograph=False, jit_compile=True)
                assert digest(compiled(tensors)) == digest(function(tensors))
                text = compiled.experimental_get_compiler_ir(tensors)(stage="hlo")
                assert text.count('target="CbamOps>Cbam"') == 2, text
"""


def xla_library() -> Path:
    directory = _loader.compiled_directory()
    assert directory is not None
    return directory / _loader.XLA_LIBRARY


def test_the_library_may_come_after_a_first_compilation():
    """Fails where XLA takes its list of ops when it first compiles."""
    run_python(
        """
        import sys
        import tensorflow as tf
        first = tf.function(lambda x: x * 2.0, jit_compile=True)
        assert first(tf.ones(3))[0] == 2.0
        assert "cbam_ops" not in sys.modules
        """
        + COMPARE
        + """
        compare()
        """
    )


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_library_may_come_twice(when, tmp_path):
    """Fails where a second copy ends the process, or leaves two kernels to choose from."""
    shutil.copy(xla_library(), tmp_path / "copy.so")
    shutil.copy(xla_library().parent / _loader.CORE_LIBRARY, tmp_path)
    copy = "tf.load_library(sys.argv[1])"
    run_python(
        COMPARE
        + f"""
        {copy if when == "before" else ""}
        compare()
        {copy}
        tf.load_library(sys.argv[2])
        compare()
        """,
        str(tmp_path / "copy.so"),
        str(xla_library()),
    )


@pytest.mark.parametrize("damage", ["missing", "cut off", "not loadable", "old TensorFlow"])
def test_eager_and_graph_mode_do_without_the_library(damage, tmp_path):
    """Fails where XLA's library can take the ops outside XLA down with it."""
    for name in (_loader.LIBRARY, _loader.CORE_LIBRARY, _loader.BUILD_RECORD):
        shutil.copy(xla_library().parent / name, tmp_path / name)
    if damage == "cut off":
        (tmp_path / _loader.XLA_LIBRARY).write_bytes(xla_library().read_bytes()[:100_000])
    if damage == "old TensorFlow":  # what a build for 2.18 or 2.19 writes
        record = json.loads((tmp_path / _loader.BUILD_RECORD).read_text())
        (tmp_path / _loader.BUILD_RECORD).write_text(json.dumps({**record, "xla": False}))
    if damage == "not loadable":
        content = xla_library().read_bytes()
        needed = b"libtensorflow_cc.so.2\0"
        assert needed in content
        content = content.replace(needed, needed.replace(b"2", b"9"))
        (tmp_path / _loader.XLA_LIBRARY).write_bytes(content)
        record = json.loads((tmp_path / _loader.BUILD_RECORD).read_text())
        record["libraries"][_loader.XLA_LIBRARY] = hashlib.sha256(content).hexdigest()
        (tmp_path / _loader.BUILD_RECORD).write_text(json.dumps(record))
    lines = run_python(
        """
        import importlib.machinery, importlib.util, sys
        find_spec = importlib.util.find_spec
        def find_copies(name, package=None):  # where the loader looks for the libraries
            if name != "cbam_ops._core":
                return find_spec(name, package)
            return importlib.machinery.ModuleSpec(name, None, origin=f"{sys.argv[1]}/_core.so")
        importlib.util.find_spec = find_copies
        """
        + COMPARE
        + """
        import cbam_ops
        with cbam_ops.use_implementation("native"):
            outside = digest(function(tensors))
            assert digest(tf.function(function, autograph=False)(tensors)) == outside
        try:
            with cbam_ops.use_implementation("native"):
                tf.function(function, autograph=False, jit_compile=True)(tensors)
        except cbam_ops.NativeUnavailableError as error:
            assert error.cause.fix.count("pip install") == 1
            print(error)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                compiled = tf.function(function, autograph=False, jit_compile=True)
                text = compiled.experimental_get_compiler_ir(tensors)(stage="hlo")
                assert "CbamOps>" not in text.replace('op_name="', "")
                compiled(tensors)
        (warning,) = [w for w in caught if w.category is RuntimeWarning]
        print(warning.message)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not cbam_ops.CBAM().supports_jit
            assert not cbam_ops.ChannelAttention().supports_jit
            with cbam_ops.use_implementation("reference"):
                assert cbam_ops.CBAM().supports_jit
        (warning,) = caught
        print(warning.message)
        info = cbam_ops.build_info()
        assert info["native"] and not info["xla"]
        print(info["xla_off_because"])
        """,
        str(tmp_path),
    )
    error, in_function, in_layer, in_info = lines[-4:]
    words = {
        "missing": "there is no ",
        "cut off": "is not the file that was built",
        "not loadable": "libtensorflow_cc.so.9",
        "old TensorFlow": "has no headers for that, 2.20 and later do",
    }[damage]
    for text in (error, in_function, in_layer, in_info):
        assert "XLA (jit_compile=True) cannot compile the ops: " in text
        assert words in text
    assert "computes with plain TensorFlow" in in_function
    assert in_layer.startswith("Keras leaves XLA out")


def test_kernels_that_xla_does_not_accept_are_a_cause(monkeypatch):
    """Fails where ops that run on a GPU count as compiled there, though XLA refused them."""
    for devices in ({"CPU"}, {"CPU", "GPU", "XLA_CPU_JIT"}):
        monkeypatch.setattr(_loader, "_devices_with_kernels", lambda devices=devices: devices)
        cause = _loader.load_xla_from(xla_library().parent)
        assert cause is not None and cause.kind == "load_failed"
        assert "it did not accept those of" in cause.reason


def test_a_saved_function_is_compiled_in_a_fresh_process(tmp_path):
    """Fails where a graph from a file reaches XLA before what XLA needs is loaded."""
    case = Case(residual=True)
    values = list(case.draw().values())

    def function(*values):
        return case.call(ops, dict(zip(case.names, values, strict=True)))

    module = tf.Module()
    specs = [tf.TensorSpec([None, *v.shape[1:]], v.dtype) for v in values]
    module.function = compiled(function, input_signature=specs)
    tf.saved_model.save(module, str(tmp_path / "saved"))
    lines = run_python(
        """
        import sys
        import tensorflow as tf
        import cbam_ops
        from cbam_ops.testing import Case, digest
        cbam_ops.ops.load_library()
        values = list(Case(residual=True).draw().values())
        function = tf.saved_model.load(sys.argv[1]).function
        assert "target=\\"CbamOps>Cbam\\"" in function.experimental_get_compiler_ir(*values)(
            stage="hlo")
        print(digest(function(*values)))
        """,
        str(tmp_path / "saved"),
    )
    assert lines[-1] == digest(function(*values))


def test_the_report_says_whether_xla_runs_the_kernels(capsys):
    from cbam_ops._cli import info

    report = cbam_ops.build_info()
    assert (report["xla"], report["xla_off_because"]) == (True, None)
    info.run(as_json=False)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "inside XLA" in line]
    assert line.split()[-1] == "on"


# --- bad input ------------------------------------------------------------------------------------


def error_of(function, *arguments) -> str:
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        function(*arguments)
    return caught.value.message


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (2, 5, 7), "CbamOps>Cbam: `x` must have shape [N, H, W, C] or [N, D, H, W, C], got"),
        ("w1", (3, 12), "`w1` must have shape [hidden, C] = [3, 13], got [3, 12]"),
        ("kernel", (4, 4, 2, 1), "`kernel` must have an odd kh, got shape [4, 4, 2, 1]"),
        ("x", (2, 0, 7, 13), "`x` must have H >= 1, got shape [2, 0, 7, 13]"),
        ("residual", (1, 5, 7, 13), "`residual` must have shape [N, H, W, C] = [2, 5, 7, 13]"),
    ],
)
def test_a_mismatch_found_when_compiling(name, shape, message):
    """Fails where XLA's message, or none, takes the place of the op's own."""
    case = Case(residual=True)
    tensors = case.draw()
    tensors[name] = tf.zeros(shape)
    spec = [tf.TensorSpec(None, t.dtype) for t in tensors.values()]

    def function(*values):
        return case.call(ops, dict(zip(case.names, values, strict=True)))

    inside = error_of(compiled(function, input_signature=spec), *tensors.values())
    outside = error_of(tf.function(function, input_signature=spec), *tensors.values())
    assert message in inside
    assert message in outside


@pytest.mark.parametrize(
    ("axis", "case"), [(1, Case()), (0, Case("cbam_with_batch_norm"))], ids=["height", "batch norm"]
)
def test_a_size_that_xla_cannot_fix(axis, case):
    """A batch norm needs the number of samples, and every kernel the map's height and width."""
    tensors = case.draw()
    keep = tf.constant([True, False, True, True, True][: tensors["x"].shape[axis]])

    def function(keep, tensors):
        x = tf.boolean_mask(tensors["x"], keep, axis=axis)
        return case.call(ops, {**tensors, "x": x})

    message = error_of(compiled(function), keep, tensors)
    assert "CbamOps>Cbam: `x` must have sizes" in message
    assert "that are known when XLA compiles, got shape f32[" in message


def test_wrong_types_are_refused_when_traced():
    case = Case()
    tensors = case.draw()
    tensors["w0"] = tf.cast(tensors["w0"], tf.float64)
    with pytest.raises(ValueError, match="`w0`"):
        compiled(lambda t: case.call(ops, t))(tensors)


# The spatial pool of a map, called as a program from a file would call it.
OPERANDS = "tensor<2x3x4x5xf32>"
RESULTS = "tensor<2x3x4x2xf32>, tensor<4000xui8>"
ATTRIBUTES = {"T": "1 : i32", "data_format": '"NHWC"', "threads": "2 : i32"}


def custom_call(
    x: tf.Tensor,
    operands: str = OPERANDS,
    results: str = RESULTS,
    attributes: dict[str, str] = ATTRIBUTES,
) -> tf.Tensor:
    """The first result of a custom call that no lowering of ours has checked."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    dictionary = ", ".join(f"{name} = {value}" for name, value in attributes.items())
    count = operands.count("tensor")
    first = results.split(", ")[0]
    module = f"""
        func.func public @main(%x: {OPERANDS}) -> {first} {{
          %y:{results.count("tensor")} = stablehlo.custom_call @"CbamOps>SpatialPool"(
            {", ".join(["%x"] * count)})
            {{api_version = 4 : i32, backend_config = {{{dictionary}}}}}
            : ({operands}) -> ({results})
          return %y#0 : {first}
        }}"""
    types = {"f32": tf.float32, "f64": tf.float64}
    sizes, element = first.removeprefix("tensor<").removesuffix(">").rsplit("x", 1)

    @tf.function(jit_compile=True, autograph=False)
    def function(x):
        (y,) = gen_xla_ops.xla_call_module(
            args=[x],
            version=9,
            module=module,
            Sout=[[int(size) for size in sizes.split("x")]],
            Tout=[types[element]],
            platforms=["CPU"],
            disabled_checks=["call:CbamOps>SpatialPool"],
        )
        return y

    return function(x)


def changed(**attributes: str | None) -> dict[str, str]:
    return {k: v for k, v in {**ATTRIBUTES, **attributes}.items() if v is not None}


def test_a_custom_call_from_elsewhere_runs():
    """Fails where the tests below do not get as far as the handler."""
    x = tf.random.stateless_normal((2, 3, 4, 5), (1, 2))
    expected = cbam_ops.spatial_pool(x)
    assert_same_bits(custom_call(x).numpy(), expected.numpy(), "descriptors")
    # Planned for more threads than there are.
    y = custom_call(x, attributes=changed(threads="64 : i32"))
    assert_same_bits(y.numpy(), expected.numpy(), "descriptors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operands": f"{OPERANDS}, {OPERANDS}"}, "must have 1 operands, got 2"),
        ({"operands": ""}, "the custom call has no operand for `x`: there are 0"),
        ({"results": "tensor<2x3x4x2xf32>"}, "last result must be scratch memory"),
        ({"results": f"{RESULTS}, tensor<4xui8>"}, "must have 2 results, got 3"),
        ({"results": "tensor<2x3x4x3xf32>, tensor<4000xui8>"}, "[2, 3, 4, 2], got [2, 3, 4, 3]"),
        ({"results": "tensor<2x3x8xf32>, tensor<4000xui8>"}, "[2, 3, 4, 2], got [2, 3, 8]"),
        (
            {"results": "tensor<2x3x4x2xf64>, tensor<4000xui8>"},
            "`descriptors` must have XLA's type",
        ),
        ({"results": "tensor<2x3x4x2xf32>, tensor<100xui8>"}, "compiled with 100"),
        ({"attributes": changed(T="2 : i32")}, "`x` must have XLA's type number"),
        ({"attributes": changed(T="3 : i32")}, "must be half, bfloat16, float or double"),
        ({"attributes": changed(T="1.0 : f32")}, "`T` is missing or of another type"),
        ({"attributes": changed(data_format=None)}, "`data_format` is missing"),
        (
            {"attributes": changed(data_format='"NHCW"')},
            "`data_format` must be one of 'NHWC', 'NCHW', got 'NHCW'",
        ),
        ({"attributes": changed(threads="0 : i32")}, "`threads` must be at least 1, got 0"),
        ({"attributes": changed(threads=None)}, "`threads` is missing"),
        ({"attributes": changed(order='"parallel"')}, "4 attributes, of which only `T`"),
    ],
    ids=str,
)
def test_a_wrong_custom_call_is_an_error(arguments, message):
    """Fails where a handler trusts what a program from a file hands it."""
    x = tf.random.stateless_normal((2, 3, 4, 5), (1, 2))
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        custom_call(x, **arguments)
    assert message in caught.value.message
