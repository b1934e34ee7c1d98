"""The choice of implementation, and the report on the installation."""

from __future__ import annotations

import json
import threading
import warnings

import pytest

import cbam_ops
from cbam_ops import _loader, options
from cbam_ops._loader import Cause

pytestmark = pytest.mark.usefixtures("fresh_options")

CAUSE = Cause("not_built", "The ops are missing.", "Build them: pip install .")


def _pretend(monkeypatch: pytest.MonkeyPatch, loaded: object) -> None:
    monkeypatch.setattr(_loader, "_loaded", (loaded, None))


def test_auto_is_the_initial_choice():
    assert options.implementation() == "auto"


def test_called_it_sets_the_choice_of_every_thread():
    seen = []
    cbam_ops.use_implementation("reference")
    thread = threading.Thread(target=lambda: seen.append(options.implementation()))
    thread.start()
    thread.join()
    assert (options.implementation(), seen) == ("reference", ["reference"])


def test_a_block_restores_the_choice_also_after_an_error():
    cbam_ops.use_implementation("native")
    with pytest.raises(KeyError), cbam_ops.use_implementation("reference"):
        assert options.implementation() == "reference"
        raise KeyError
    assert options.implementation() == "native"


def test_blocks_nest():
    with cbam_ops.use_implementation("reference"):
        with cbam_ops.use_implementation("native"):
            assert options.implementation() == "native"
        assert options.implementation() == "reference"
    assert options.implementation() == "auto"


def test_one_object_can_be_entered_more_than_once():
    reference = cbam_ops.use_implementation("reference")
    for _ in range(2):
        with reference:
            assert options.implementation() == "reference"
        assert options.implementation() == "auto"


def test_a_choice_made_inside_a_block_for_the_process_survives_the_block():
    with cbam_ops.use_implementation("reference"):
        cbam_ops.use_implementation("native")
        assert options.implementation() == "reference"  # the block's, in this thread
    assert options.implementation() == "native"


def test_blocks_of_two_threads_do_not_meet():
    """Overlapping blocks that end in another order than they began must not leak a choice."""
    both_inside = threading.Barrier(2, timeout=60)
    first_has_left = threading.Event()
    seen = {}

    def first() -> None:
        with cbam_ops.use_implementation("reference"):
            both_inside.wait()
            seen["first"] = options.implementation()
            both_inside.wait()
        first_has_left.set()

    def second() -> None:
        with cbam_ops.use_implementation("native"):
            both_inside.wait()
            seen["second"] = options.implementation()
            both_inside.wait()
            first_has_left.wait(60)
            seen["second, first gone"] = options.implementation()

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "reference", "second": "native", "second, first gone": "native"}
    assert options.implementation() == "auto"


@pytest.mark.parametrize("name", ["fast", "", None, "Native", 1])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match='`name` must be one of "auto", "native", "ref'):
        cbam_ops.use_implementation(name)
    assert options.implementation() == "auto"


def test_the_environment_variable_is_the_initial_choice(monkeypatch):
    monkeypatch.setenv("CBAM_OPS_IMPLEMENTATION", "reference")
    assert options.implementation() == "reference"
    monkeypatch.setenv("CBAM_OPS_IMPLEMENTATION", "native")
    assert options.implementation() == "reference", "it is read once"


def test_an_unknown_word_in_the_environment_variable_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setenv("CBAM_OPS_IMPLEMENTATION", "fast")
    with pytest.raises(ValueError, match="CBAM_OPS_IMPLEMENTATION must be one of .* got 'fast'"):
        options.native_ops()


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
    with pytest.warns(RuntimeWarning, match="They are damaged"):
        options.native_ops()


def test_native_raises_the_cause_and_the_cure(monkeypatch):
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
