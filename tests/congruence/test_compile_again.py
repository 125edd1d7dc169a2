"""Recompiling a model with other weights, without a new trace, equals a fresh compilation, or becomes one."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.host import compiler
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.program import Architecture, Declaration, Program, ProofOptions
from support import samples
from support.models import causal, decoders, programs, zoo
from support.models.programs import compile_model
from support.processes import descriptors, home_of, is_there, until

#: Of the zoo, each for its own reason: what the proof looks at weights for, layers of others, what is kept outside of
#: variables, what LiteRT does not run.
ANEW = {
    "time_distributed_inner_lstm": "the proof looks at weights",
    "layer_in_a_block": "a layer that is not Keras's own",
    "preprocessing": "constants that a layer makes of its weights",
    "not_convertible": "LiteRT does not run it",
    "lookup_table": "LiteRT does not run it",
    "subclassed": "a model that is not Keras's own",
    "accumulator": "a cell that is not Keras's own",
}
AGAIN = (
    "lstm_dense",
    "gru_reset_before",
    "stacked_rnn_cells_with_state",
    "conv_lstm_1d",
    "deep_with_normalization",
    "stateful_fixed_batch",
    "nested_same_names",
    "shared_layer",
    "several_inputs_and_outputs",
    "float_tokens",
    "mask_over_stacked_cells",
    "embedding_mask_zero",
    "stateless_without_time",
)


def assert_same(one: Program, two: Program) -> None:
    """All of two programs is the same, bit for bit, but for when they were compiled."""
    for field in dataclasses.fields(Program):
        first, second = getattr(one, field.name), getattr(two, field.name)
        if field.name == "initial":
            assert_same_arrays(first, second)
        elif field.name == "trial":
            assert_same_arrays((*first.inputs, *first.outputs), (*second.inputs, *second.outputs))
            assert (first.tolerance, first.sizes) == (second.tolerance, second.sizes)
        elif field.name == "provenance":
            assert dataclasses.replace(first, compiled_time=0) == dataclasses.replace(second, compiled_time=0)
        else:
            assert first == second, field.name


def assert_same_arrays(one: tuple[Any, ...], two: tuple[Any, ...]) -> None:
    assert [(x.dtype, x.shape, x.tobytes()) for x in one] == [(x.dtype, x.shape, x.tobytes()) for x in two]


def silent(_stage: str) -> None:
    return None


@pytest.mark.slow
@pytest.mark.parametrize("name", samples.some(AGAIN))
def test_a_recompiled_model_equals_a_fresh_compilation(name: str, tmp_path: Path) -> None:
    from stepwell_server.compile.program.pipeline import compile_traced
    from stepwell_server.compile.program.recompile import compile_again, may_be_reused

    model = zoo.build(name)
    model.save(tmp_path / "first.keras")
    program, traced = compile_traced(tmp_path / "first.keras")
    assert may_be_reused(traced, program)
    for seed in range(samples.examples(4)):
        zoo.randomize(model, 1 + seed)
        model.save(tmp_path / "other.keras")
        again = compile_again(traced, architecture_of(program), tmp_path / "other.keras", silent)
        assert_same(again, compile_model(tmp_path / "other.keras"))


#: Decoders with the initial values of states that are declared, and models whose first states depend on weights.
LOOKS_BACK: dict[str, dict[str, Any]] = {
    "transposed_unevenly": {},
    "codec": {},
    "samples_of_padding_with_bias": {},
    "first_of_padded": {},
    "tutorial": {"state_h": 0.5, "state_c": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]},
    "behind_a_convolution": {"state": 0.25},
    "nested": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKS_BACK)
def test_models_that_look_back_and_decoders_are_recompiled(name: str, tmp_path: Path) -> None:
    from stepwell_server.compile.graph.tensorflow_setup import keras
    from stepwell_server.compile.program.pipeline import compile_traced
    from stepwell_server.compile.program.recompile import compile_again, may_be_reused

    keras.backend.clear_session()
    model = (decoders if name in decoders.DECODERS else causal).build(name, 1)
    options = ProofOptions(declaration=Declaration(initial=LOOKS_BACK[name]))
    model.save(tmp_path / "first.keras")
    zoo.randomize(model, 2)
    model.save(tmp_path / "other.keras")
    program, traced = compile_traced(tmp_path / "first.keras", options=options)
    assert may_be_reused(traced, program)
    again = compile_again(traced, architecture_of(program), tmp_path / "other.keras", silent)
    anew = compile_model(tmp_path / "other.keras", options=options)
    # A flatbuffer has names of its own, of its operations; the trials of both hold the same bits.
    assert_same(dataclasses.replace(again, files=anew.files), anew)
    assert again.fingerprint != program.fingerprint


def unnamed() -> Any:
    """A model whose layers Keras names, differently each time."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    layers = keras.layers
    inner = keras.Sequential([keras.Input((None, 4)), layers.GRU(3, return_sequences=True)])
    x = keras.Input((None, 2))
    y = inner(layers.LSTM(4, return_sequences=True)(x))
    return keras.Model(x, [layers.Dense(1)(y), layers.Dense(2)(y)])


@pytest.mark.slow
def test_names_that_keras_made_up_are_those_of_the_file(tmp_path: Path) -> None:
    from stepwell_server.compile.program.pipeline import compile_traced
    from stepwell_server.compile.program.recompile import compile_again, may_be_reused

    for name in ("first", "other"):
        unnamed().save(tmp_path / f"{name}.keras")
    program, traced = compile_traced(tmp_path / "first.keras")
    assert may_be_reused(traced, program)
    again = compile_again(traced, architecture_of(program), tmp_path / "other.keras", silent)
    anew = compile_model(tmp_path / "other.keras")
    assert program.names != anew.names
    # A flatbuffer has names of its own, of its operations.
    assert_same(dataclasses.replace(again, files=anew.files), anew)


def architecture_of(program: Program) -> Architecture:
    assert program.architecture is not None
    return program.architecture


@pytest.mark.slow
@pytest.mark.parametrize("name", samples.some(list(ANEW)))
def test_some_models_must_be_traced_again(name: str, tmp_path: Path) -> None:
    from stepwell_server.compile.program.pipeline import compile_traced
    from stepwell_server.compile.program.recompile import may_be_reused

    zoo.build(name).save(tmp_path / "model.keras")
    program, traced = compile_traced(tmp_path / "model.keras")
    assert not may_be_reused(traced, program), ANEW[name]


def by_length(scale: float) -> Any:
    """A model whose outputs depend on the number of all time steps, except for a weight that is 0."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    x = keras.Input((None, 3), name="x")
    length = keras.ops.sum(keras.ops.ones_like(x[:, :, :1]), axis=1, keepdims=True)
    added = keras.layers.Dense(3, use_bias=False, kernel_initializer=keras.initializers.Constant(scale))(
        length
    )
    return keras.Model(x, keras.layers.LSTM(4, return_sequences=True)(x + added))


def test_a_proof_that_only_holds_for_these_weights_is_not_reused(tmp_path: Path) -> None:
    from stepwell_server.compile.program.pipeline import compile_traced
    from stepwell_server.compile.program.recompile import may_be_reused

    by_length(0.0).save(tmp_path / "none.keras")
    by_length(1.0).save(tmp_path / "some.keras")
    program, traced = compile_traced(tmp_path / "none.keras")
    assert not may_be_reused(traced, program)
    with pytest.raises(ModelError, match="depends on the number of time steps"):
        compile_model(tmp_path / "some.keras")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCompiler]:
    with WarmCompiler(tmp_path_factory.mktemp("kept")) as compiler:
        yield compiler


@pytest.fixture
def lstm(tmp_path: Path) -> Path:
    """A folder with versions of one model: the same configuration, other weights."""
    model = zoo.build("lstm_dense")
    for seed in range(1, 4):
        zoo.randomize(model, seed)
        model.save(tmp_path / f"{seed}.keras")
    return tmp_path


@pytest.mark.slow
def test_one_worker_compiles_what_has_the_same_configuration(lstm: Path, kept: WarmCompiler) -> None:
    known = [compile_model(lstm / f"{seed}.keras") for seed in (1, 2, 3)]
    assert_same(kept.compile(lstm / "1.keras"), known[0])
    (server, worker) = kept.pids
    stages: list[str] = []
    assert_same(kept.compile(lstm / "2.keras", stages.append), known[1])
    assert stages == ["load", "trace", "probe", "convert", "check"]
    assert kept.pids == [server, worker]
    kept.compile(lstm / "1.keras")  # from the cache
    kept.compile(programs.saved("gru_reset_after").path)
    assert kept.pids[0] == server
    assert kept.pids[1] != worker
    assert_same(kept.compile(lstm / "3.keras"), known[2])  # a fresh compilation: another model was in between


@pytest.mark.slow
def test_a_failed_recompilation_falls_back_to_a_fresh_one(
    lstm: Path, kept: WarmCompiler, tmp_path: Path
) -> None:
    kept.compile(lstm / "1.keras")
    server, _ = kept.pids
    mixed = lstm / "mixed.keras"
    _mix(
        lstm / "2.keras", programs.saved("gru_reset_after").path, mixed
    )  # the configuration of one, the weights of another
    with pytest.raises(ModelError) as caught:
        kept.compile(mixed)
    with WarmCompiler(tmp_path / "cache") as cold, pytest.raises(ModelError) as known:
        cold.compile(mixed)
    assert str(caught.value) == str(known.value)
    assert str(mixed) in str(caught.value)
    assert kept.pids == [server]  # the worker that has seen it is not used again
    kept.compile(lstm / "3.keras")
    assert kept.pids[0] == server


def _mix(configuration: Path, weights: Path, target: Path) -> None:
    with (
        zipfile.ZipFile(configuration) as one,
        zipfile.ZipFile(weights) as two,
        zipfile.ZipFile(target, "w") as mixed,
    ):
        for name in one.namelist():
            mixed.writestr(name, (two if name == "model.weights.h5" else one).read(name))


@pytest.mark.slow
def test_reloads_leave_nothing_behind(lstm: Path, kept: WarmCompiler) -> None:
    content = (lstm / "1.keras").read_bytes()
    kept.compile(lstm / "1.keras")
    kept.compile(lstm / "2.keras")
    pids, before = kept.pids, [descriptors(pid) for pid in kept.pids]
    own_files, own_threads = descriptors(), _threads()
    for number in range(samples.examples(20)):
        (lstm / "next.keras").write_bytes(content + bytes([number]))
        kept.compile(lstm / "next.keras")
    assert kept.pids == pids
    assert [descriptors(pid) for pid in pids] == before
    # what other tests have left in this process may go meanwhile
    assert descriptors() <= own_files
    assert not _threads() - own_threads
    assert list(home_of(pids[0]).glob("*/given/*")) == []
    assert list(home_of(pids[0]).glob("*/home/*.stepwell")) == []


def _threads() -> Counter[str]:
    return Counter(thread.name for thread in threading.enumerate())


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "fork server"])
def test_a_kept_worker_that_is_gone_is_replaced(who: str, lstm: Path, kept: WarmCompiler) -> None:
    model = zoo.build("lstm_dense", 7)
    names = [lstm / f"gone-{number}.keras" for number in (0, 1)]
    for number, name in enumerate(names):
        zoo.randomize(model, 10 + number + 2 * (who == "worker"))
        model.save(name)
    kept.compile(names[0])
    server, worker = kept.pids
    os.kill(worker if who == "worker" else server, signal.SIGKILL)
    until(lambda: not is_there(worker))
    program = kept.compile(names[1])
    assert kept.pids[1] != worker
    assert (kept.pids[0] == server) == (who == "worker")
    assert program.fingerprint


@pytest.mark.slow
def test_a_worker_that_keeps_growing_is_not_kept(
    lstm: Path, kept: WarmCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.compile(lstm / "1.keras")
    monkeypatch.setattr(compiler, "_MAX_GROWTH_BYTES", -(1 << 40))
    (lstm / "more.keras").write_bytes((lstm / "2.keras").read_bytes() + b"more")
    server, worker = kept.pids
    kept.compile(lstm / "more.keras")
    assert kept.pids == [server]
    assert not is_there(worker)
