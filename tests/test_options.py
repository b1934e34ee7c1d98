"""The choice of implementation, and the report on the installation."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from programs import HANGS

import cbam_ops
from cbam_ops import _loader, options
from cbam_ops._loader import Cause
from cbam_ops.exporting import ExportError

pytestmark = pytest.mark.usefixtures("fresh_options")

CAUSE = Cause("not_built", "The ops are missing.", "Build them: pip install .")


def _pretend(monkeypatch: pytest.MonkeyPatch, loaded: object) -> None:
    monkeypatch.setattr(_loader, "_loaded", (loaded, None))


def test_auto_is_the_initial_choice():
    assert options.implementation() == "auto"


def in_a_thread(function: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(60)


def test_the_process_s_choice_is_every_thread_s():
    cbam_ops.set_implementation("reference")
    assert options.implementation() == in_a_thread(options.implementation) == "reference"


def test_a_block_is_its_thread_s_alone():
    with cbam_ops.use_implementation("reference"):
        assert options.implementation() == "reference"
        assert in_a_thread(options.implementation) == "auto"


def test_a_block_that_is_not_entered_changes_nothing():
    """Fails where making one sets the choice, and two made ahead leave it to the process."""
    blocks = [cbam_ops.use_implementation(name) for name in ("reference", "native")]
    assert options.implementation() == "auto"
    with blocks[0], blocks[1]:
        assert options.implementation() == "native"
    assert options.implementation() == "auto"


def test_a_block_restores_the_choice_also_after_an_error():
    cbam_ops.set_implementation("native")
    with pytest.raises(KeyError), cbam_ops.use_implementation("reference"):
        assert options.implementation() == "reference"
        raise KeyError
    assert options.implementation() == "native"


def test_blocks_nest_and_one_can_be_entered_again():
    reference = cbam_ops.use_implementation("reference")
    for _ in range(2):
        with reference:
            with cbam_ops.use_implementation("native"), reference:
                assert options.implementation() == "reference"
            with cbam_ops.use_implementation("native"):
                assert options.implementation() == "native"
            assert options.implementation() == "reference"
        assert options.implementation() == "auto"


def test_the_process_s_choice_made_inside_a_block_holds_after_it():
    with cbam_ops.use_implementation("reference"):
        cbam_ops.set_implementation("native")
        assert options.implementation() == "reference"
    assert options.implementation() == "native"


def test_overlapping_blocks_of_many_threads_do_not_meet():
    """Blocks that end in another order than they began must not leak a choice."""
    count = 16
    all_inside = threading.Barrier(count, timeout=HANGS)
    left = [threading.Event() for _ in range(count)]

    def work(i: int) -> list[str]:
        name = options.IMPLEMENTATIONS[i % 3]
        with cbam_ops.use_implementation(name):
            all_inside.wait()
            seen = [options.implementation()]
            with cbam_ops.use_implementation("native"):
                all_inside.wait()
            # The first to come are the first to go.
            assert i == 0 or left[i - 1].wait(HANGS)
            seen.append(options.implementation())
        left[i].set()
        return [*seen, options.implementation()]

    with ThreadPoolExecutor(count) as pool:
        seen = list(pool.map(work, range(count)))
    names = [options.IMPLEMENTATIONS[i % 3] for i in range(count)]
    assert seen == [[name, name, "auto"] for name in names]
    assert options.implementation() == "auto"


def test_overlapping_blocks_of_asyncio_tasks_do_not_meet():
    """Fails where a block is its thread's: tasks of one thread take turns inside their blocks."""

    async def work(name: str, pauses: int) -> list[str]:
        seen = []
        with cbam_ops.use_implementation(name):
            for _ in range(pauses):
                await asyncio.sleep(0)
                seen.append(options.implementation())
            seen.append(await asyncio.create_task(inherited()))
        return [*seen, options.implementation()]

    async def inherited() -> str:
        return options.implementation()

    async def both() -> list[list[str]]:
        return await asyncio.gather(work("reference", 2), work("native", 4), work("auto", 3))

    assert asyncio.run(both()) == [
        [*["reference"] * 3, "auto"],
        [*["native"] * 5, "auto"],
        [*["auto"] * 4, "auto"],
    ]
    assert options.implementation() == "auto"


def test_blocks_that_generators_hold_open_end_in_any_order():
    def generator() -> Iterator[str]:
        with cbam_ops.use_implementation("reference"):
            yield options.implementation()

    held = generator()
    assert next(held) == "reference"
    with cbam_ops.use_implementation("native"):
        held.close()
        assert options.implementation() == "native"
    assert options.implementation() == "auto"
    held = generator()
    in_a_thread(lambda: next(held))
    held.close()  # in another thread than it was entered in
    assert options.implementation() == "auto"


@pytest.mark.parametrize("name", ["fast", "", None, "Native", 1])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match='`name` must be one of "auto", "native", "ref'):
        cbam_ops.use_implementation(name)
    with pytest.raises(ValueError, match='`name` must be one of "auto", "native", "ref'):
        cbam_ops.set_implementation(name)
    assert options.implementation() == "auto"


def test_the_environment_variable_is_the_initial_choice(monkeypatch):
    monkeypatch.setenv("CBAM_OPS_IMPLEMENTATION", "reference")
    assert options.implementation() == "reference"
    monkeypatch.setenv("CBAM_OPS_IMPLEMENTATION", "native")
    assert options.implementation() == "reference", "it is read once"


def test_an_unknown_word_in_the_environment_variable_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("CBAM_OPS_IMPLEMENTATION", "fast")
    for _ in range(2):
        with pytest.raises(ValueError, match="CBAM_OPS_IMPLEMENTATION must be one of .* 'fast'"):
            cbam_ops.spatial_pool(np.zeros((1, 1, 1, 1)))
    cbam_ops.set_implementation("reference")
    assert options.implementation() == "reference"


def test_reference_does_not_even_look_for_the_library(monkeypatch):
    monkeypatch.setattr(_loader, "load_ops", lambda: pytest.fail("looked for the library"))
    with cbam_ops.use_implementation("reference"):
        assert options.native_ops() is None


def test_auto_falls_back_with_one_warning_per_cause(monkeypatch):
    _pretend(monkeypatch, CAUSE)
    with pytest.warns(RuntimeWarning, match=r"The ops are missing\. Build them: pip install \."):
        assert options.native_ops() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert options.native_ops() is None, "the same cause must not warn again"
    _pretend(monkeypatch, Cause("corrupt", "They are damaged.", "Build them: pip install ."))
    with pytest.warns(RuntimeWarning, match="They are damaged") as caught:
        cbam_ops.spatial_pool(np.zeros((1, 1, 1, 1)))
    assert caught[0].filename == __file__, "it points at the code that called the package"


def test_native_raises_the_cause_and_the_fix(monkeypatch):
    _pretend(monkeypatch, CAUSE)
    with cbam_ops.use_implementation("native"):
        with pytest.raises(cbam_ops.NativeUnavailableError, match="missing.*pip install") as caught:
            options.native_ops()
    assert isinstance(caught.value, RuntimeError)
    assert caught.value.cause == CAUSE


@pytest.mark.parametrize("choice", ["auto", "native"])
def test_the_native_ops_are_used_where_they_load(choice):
    with cbam_ops.use_implementation(choice):
        assert options.native_ops() is _loader.load_ops()


@pytest.mark.parametrize(
    "error", [cbam_ops.NativeUnavailableError(CAUSE), ExportError("It differs.", Path("left"))]
)
def test_errors_come_back_from_processes(error):
    """Fails where a pool of processes would wait for ever for what one of them raised."""
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), vars(again)) == (str(error), vars(error))


def test_build_info_says_what_is_installed():
    info = cbam_ops.build_info()
    json.dumps(info)  # plain values only
    assert info["native"] is True and info["native_off_because"] is None
    assert info["version"] == cbam_ops.__version__ == info["build"]["version"]
    assert info["build"]["tensorflow"]["version"] == info["tensorflow"]
    assert info["instruction_set"]["active"] in info["instruction_set"]["available"]
    assert "baseline" in info["instruction_set"]["available"]
    assert any("CPU" in device for device in info["devices"])
    cuda = info["build"]["cuda"]
    assert cuda["enabled"] or cuda["why_not"], "a build without CUDA says why"


def test_build_info_says_why_native_is_off(monkeypatch):
    _pretend(monkeypatch, CAUSE)
    info = cbam_ops.build_info()
    assert info["native"] is False
    assert info["native_off_because"] == str(CAUSE)
