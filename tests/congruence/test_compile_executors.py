"""Executors behind one interface: padding, failures, tensors that pass through, many of one program."""

from __future__ import annotations

import dataclasses
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from stepwell_server.engine.executors import litert, load_executor
from stepwell_server.engine.executors.base import ExecutionError, Executor
from stepwell_server.engine.executors.litert import LiteRTExecutor
from stepwell_server.engine.executors.padded import chunks
from stepwell_server.engine.executors.step_function import step_of_executor
from stepwell_server.program import FLATBUFFER, Program
from support.models import programs
from support.models.compiled import Compiled, causal_model, zoo_model
from support.models.programs import compile_model
from support.samples import one_in


@pytest.fixture(scope="module")
def tokens() -> Compiled:
    return zoo_model("fixed_length_tokens")


@pytest.fixture(scope="module")
def tokens_on_tensorflow(tokens: Compiled) -> Compiled:
    from stepwell_server.compile.program import convert

    def refuse(*_: Any) -> None:
        raise convert.ConversionError("no built-in operator for Anything")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "to_litert", refuse)
        program = compile_model(programs.saved(tokens.name).path)
    return Compiled(tokens.name, tokens.model, program)


def _token_step(executor: Executor, tokens: list[int]) -> list[Any]:
    executor.bind(len(tokens))
    executor.inputs()[0][...] = tokens
    for i in range(len(executor.states())):
        executor.states()[i][...] = 0.25
    executor.invoke()
    return [np.array(value) for value in (*executor.outputs(), *executor.next_states())]


@pytest.mark.parametrize("bad", [13, -14, 2**31 - 1])
@pytest.mark.parametrize("kind", ["tokens", "tokens_on_tensorflow"])
def test_a_bad_index_fails_the_pass_and_the_next_one_works(
    kind: str, bad: int, request: pytest.FixtureRequest
) -> None:
    compiled: Compiled = request.getfixturevalue(kind)
    executor = load_executor(compiled.program)
    good = [3, 12, 0, 5]
    expected = _token_step(executor, good)
    with pytest.raises(ExecutionError):
        _token_step(executor, [3, bad, 0, 5])
    for one, two in zip(_token_step(executor, good), expected, strict=True):
        assert one.tobytes() == two.tobytes()


class Resizes:
    """Counts the resizes of an executor's interpreters, and sets what it believes that they and runs take."""

    def __init__(self, executor: LiteRTExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._executor = executor
        resized = executor._resized

        def counted(rows: int) -> Any:
            self.count += 1
            return resized(rows)

        monkeypatch.setattr(executor, "_resized", counted)

    def cost(self, resize_s: float, row_s: float) -> None:
        self._executor._resize_s.value, self._executor._row_s.value = resize_s, row_s


def _steps_like_a_new_executor(executor: LiteRTExecutor, tokens: Compiled, rows: int, seed: int) -> None:
    batch = np.random.default_rng(seed).integers(0, 13, rows).tolist()
    found = _token_step(executor, batch)
    for one, two in zip(found, _token_step(LiteRTExecutor(tokens.program), batch), strict=True):
        assert one.shape == two.shape
        assert one.tobytes() == two.tobytes()


def _executor(tokens: Compiled, monkeypatch: pytest.MonkeyPatch, max_kept: int) -> LiteRTExecutor:
    monkeypatch.setattr(litert, "_MAX_KEPT", max_kept)
    return LiteRTExecutor(tokens.program)


def test_a_smaller_batch_keeps_the_size_where_a_resize_costs_more(
    tokens: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = _executor(tokens, monkeypatch, 1)
    resizes = Resizes(executor, monkeypatch)
    for seed, (rows, is_cheap, resized) in enumerate(
        (
            (8, True, 1),
            (5, True, 1),
            (1, True, 1),
            (8, True, 1),
            (9, True, 2),
            (5, False, 3),
            (6, True, 4),
            *[(rows, True, 4) for rows in (5, 2, 6, 3, 4, 6, 1)],  # by then it holds its views
        )
    ):
        resizes.cost(1.0, 1e-3 if is_cheap else 10.0)
        _steps_like_a_new_executor(executor, tokens, rows, seed)
        assert resizes.count == resized, f"{rows} rows"


def test_sizes_that_recur_are_kept(tokens: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = _executor(tokens, monkeypatch, 3)
    resizes = Resizes(executor, monkeypatch)
    for seed, (rows, is_cheap, resized) in enumerate(
        (
            *[(rows, False, count) for count, rows in enumerate((5, 8, 2), 1)],
            *[(rows, False, 3) for rows in (8, 2, 5) * 10],
            (7, True, 3),  # with 8
            (6, False, 4),  # instead of 2, which was not used for longest
            *[(rows, False, 4) for rows in (5, 8, 6)],
            (2, False, 5),  # instead of 5
            *[(rows, False, 5) for rows in (8, 6, 2)],
        )
    ):
        resizes.cost(1.0, 1e-3 if is_cheap else 10.0)
        _steps_like_a_new_executor(executor, tokens, rows, seed)
        assert resizes.count == resized, f"{rows} rows, the {seed}th"


def test_the_first_resize_of_an_interpreter_is_not_taken_for_the_others(
    tokens: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes longer: an executor that believed in it ran small batches at the size of the largest."""
    executor = _executor(tokens, monkeypatch, 2)
    for rows in (1, 64):
        _token_step(executor, [3] * rows)
    assert executor._resize_s.value == 0
    _token_step(executor, [3] * 9)
    assert executor._resize_s.value > 0


def test_interpreters_of_a_large_program_are_not_kept(
    tokens: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(tokens.program.files[FLATBUFFER])
    monkeypatch.setattr(litert, "_TYPICAL_ROWS", 0)
    for limit, count in ((2 * size - 1, 1), (2 * size, 2), (1 << 40, 8)):
        monkeypatch.setattr(litert, "_MAX_KEPT_BYTES", limit)
        executor = LiteRTExecutor(tokens.program)
        executor._resize_s.value = 1e-9  # a larger size does not do
        for rows in range(1, 12):
            executor._row_s.value = 1.0
            _token_step(executor, [3] * rows)
        assert len(executor._kept) == count


def test_rows_of_a_run_that_failed_run_no_more(tokens: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = LiteRTExecutor(tokens.program)
    resizes = Resizes(executor, monkeypatch)
    with pytest.raises(ExecutionError):
        _token_step(executor, [3, 12, 13])  # in the last row, which the next batch does not fill
    resizes.cost(1.0, 1e-6)
    expected = _token_step(LiteRTExecutor(tokens.program), [3, 12])
    for one, two in zip(_token_step(executor, [3, 12]), expected, strict=True):
        assert one.tobytes() == two.tobytes()
    assert resizes.count == 2
    assert len(executor._kept) == 1


def test_the_reason_for_tensorflow_is_a_sentence(tokens: Compiled, tokens_on_tensorflow: Compiled) -> None:
    assert tokens.program.executor == "litert"
    assert tokens.program.batch_sizes == ()
    assert tokens_on_tensorflow.program.executor == "tensorflow"
    assert tokens_on_tensorflow.program.executor_reason == (
        "LiteRT cannot run this model: no built-in operator for Anything; TensorFlow runs it, which takes longer per step"
    )
    assert tokens_on_tensorflow.program.batch_sizes
    assert all(name.startswith("saved_model/") for name in tokens_on_tensorflow.program.files)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "Some ops in the model are custom ops: AsString, Abs\nmore",
            "it has no operation for AsString, Abs",
        ),
        ("TF Select ops: PrintV2\nDetails:", "it has no operation for PrintV2"),
        (
            "x.py:3:1: error: 'tfl.zeros_like' op operand #0 must be tensor of 32-bit float values, but got 'tensor<?x1xi1>'",
            "its zeros_like takes no bool values",
        ),
        (
            'Could not translate MLIR to FlatBuffer. error: loc(callsite(fused["TensorListReserve:", "f/scan_1"] at callsite(x)))',
            "its converter fails on TensorListReserve",
        ),
        (
            '<unknown>:0: error: loc(fused["TensorListReserve:", "TensorArrayV2"]): failed to legalize something',
            "its converter fails on TensorListReserve",
        ),
    ],
)
def test_a_message_of_the_converter_becomes_a_clause(text: str, says: str) -> None:
    from stepwell_server.compile.graph.tensorflow_setup import tf
    from stepwell_server.compile.program.convert import _complaint

    function = tf.function(lambda: tf.constant(1)).get_concrete_function()
    assert (
        _complaint(text.replace("custom ops", "Custom ops"), function, zoo_model("lstm_dense").model) == says
    )


@pytest.mark.slow
def test_the_layer_that_litert_cannot_run_is_named(tmp_path: Path) -> None:
    import keras

    x = keras.Input((None,), dtype="int32")
    hashed = keras.layers.Hashing(5, name="buckets")(x)
    keras.Model(x, keras.layers.GRU(2)(keras.layers.Embedding(5, 2)(hashed))).save(tmp_path / "model.keras")
    program = compile_model(tmp_path / "model.keras")
    assert program.executor_reason == (
        "LiteRT cannot run this model: it has no operation for AsString, StringToHashBucketFast (the layer 'buckets' "
        "(Hashing)); TensorFlow runs it, which takes longer per step"
    )


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A program with tensors that LiteRT places while it runs, as the compiler makes them of few models."""
    from stepwell_server.compile.program import convert

    path = tmp_path_factory.mktemp("late") / "model.keras"
    _upsampling().save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "with_known_sizes", lambda frozen: frozen)
        program = compile_model(path)
    assert litert.places_tensors_late(program.files[FLATBUFFER])
    return program


def test_a_program_that_places_tensors_late_runs_without_delegates(
    tokens: Compiled, late: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those read tensors where they were before: about one run in a thousand gave wrong values to all rows."""
    made, module = list[dict[str, Any]](), cast("Any", litert)
    interpreter, resolvers = module.Interpreter, module.OpResolverType

    def noted(**options: Any) -> Any:
        made.append(options)
        return interpreter(**options)

    monkeypatch.setattr(litert, "Interpreter", noted)
    for program in (tokens.program, late):
        made.clear()
        executor = LiteRTExecutor(program, is_exact=True)
        for rows in (3, 1, 2):
            executor.bind(rows)
        wanted = resolvers.BUILTIN_WITHOUT_DEFAULT_DELEGATES if program is late else resolvers.AUTO
        assert {options["experimental_op_resolver_type"] for options in made[1:]} == {wanted}
        has_delegates = {options["experimental_delegates"] is not None for options in made[1:]}
        assert has_delegates == {program is not late}


def test_views_of_tensors_that_move_are_never_held(late: Program, tokens: Compiled) -> None:
    for program in (tokens.program, late):
        executor = LiteRTExecutor(program)
        executor.bind(2)
        for view in (*executor.inputs(), *executor.states()):
            view[...] = 0
        del view
        for _ in range(2 * litert._RUNS_UNTIL_HELD):
            executor.invoke()
        is_held = {tensors._held is not None for tensors in executor._now._tensors}
        assert is_held == {program is not late}


def test_a_trial_runs_each_batch_at_its_own_size(tokens: Compiled) -> None:
    """An interpreter of another size may give a row other bits."""
    for is_exact in (False, True):
        executor = LiteRTExecutor(tokens.program, is_exact=is_exact)
        for rows in (64, 3, 64, 17, 3):
            executor._resize_s.value, executor._row_s.value = 1.0, 1e-6
            executor.bind(rows)
            assert executor._now.size == (rows if is_exact else 64)


#: All have transposed convolutions.
_SPREAD = (
    "late",
    "upsampling",
    "transposed_unevenly",
    "transposed_2d",
    "codec",
    "seanet_decoder",
    "transposed",
)


@pytest.mark.parametrize("name", one_in(6, _SPREAD))
def test_a_row_has_the_same_bits_at_each_place_of_a_batch(name: str, late: Program) -> None:
    """The kernels without XNNPACK compute the last rows of a batch in another way than four at a time."""
    program = late if name == "late" else _program(name)
    assert bool(program.batch_sizes) == (name == "late")
    rng, count = np.random.default_rng(2), 40
    specs: list[Any] = [*program.inputs, *program.state]
    given = [rng.standard_normal((count, *spec.shape)).astype(spec.dtype) for spec in specs]
    expected: dict[int, list[bytes]] = {}
    for is_exact in (False, True):
        step = step_of_executor(load_executor(program, is_exact=is_exact))
        for size in range(1, count + 1):
            for _ in range(3):
                chosen = rng.permutation(count)[:size]
                drawn = [value[chosen] for value in given]
                results = [np.asarray(x) for part in step(drawn[:1], drawn[1:]) for x in part]
                for place, row in enumerate(chosen.tolist()):
                    bits = [value[place].tobytes() for value in results]
                    assert bits == expected.setdefault(row, bits), f"place {place} of {size}"


def test_both_executors_compute_the_same(tokens: Compiled, tokens_on_tensorflow: Compiled) -> None:
    rng = np.random.default_rng(3)
    drawn = rng.integers(0, 13, 37).tolist()
    one = _token_step(load_executor(tokens.program), drawn)
    two = _token_step(load_executor(tokens_on_tensorflow.program), drawn)
    for value, other in zip(one, two, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)


_SERVE = """
import pickle, sys
import numpy as np
from stepwell_server.engine.executors import load_executor
program, numbers = pickle.load(sys.stdin.buffer)
executor = load_executor(program)
executor.bind(len(numbers))
executor.inputs()[0][...] = numbers
executor.invoke()
sys.stdout.buffer.write(executor.outputs()[0].tobytes())
"""


@pytest.mark.slow
def test_a_server_on_tensorflow_divides_as_the_compiler_does() -> None:
    """The processes of a server that run programs do not import the compiler, which sets up TensorFlow, too."""
    program = programs.program("whole_quotients")
    assert program.executor == "tensorflow"
    numbers = np.random.default_rng(4).integers(1, 60_000, (64, 1)).astype(np.float32)
    done = subprocess.run(
        [sys.executable, "-c", _SERVE],
        input=pickle.dumps((program, numbers)),
        capture_output=True,
        check=True,
        timeout=250,
    )
    expected = np.floor(numbers / np.arange(1, 9, dtype=np.float32))
    np.testing.assert_array_equal(np.frombuffer(done.stdout, np.float32), expected.ravel())


def test_two_executors_of_one_program_are_independent(tokens: Compiled) -> None:
    first, second = load_executor(tokens.program), load_executor(tokens.program)
    expected = _token_step(first, [1, 2, 3])
    _token_step(second, [7, 8])
    for value, other in zip((*first.outputs(), *first.next_states()), expected, strict=True):
        assert np.array_equal(value, other)


def test_tensors_that_pass_through_survive_new_inputs_and_the_carry() -> None:
    """The swapper's next state is its input and its other state: filling the inputs must not change them."""
    executor = load_executor(zoo_model("swapper").program)
    executor.bind(2)
    drawn = np.random.default_rng(4).standard_normal((6, 2, 3)).astype("float32")
    for i in range(2):
        executor.states()[i][...] = 0
    for time, now in enumerate(drawn):
        executor.inputs()[0][...] = now
        if time:
            executor.carry()
        executor.invoke()
        expected = drawn[time - 2] if time >= 2 else np.zeros_like(now)
        np.testing.assert_array_equal(executor.outputs()[0], expected)


def test_a_view_kept_over_a_step_is_a_mistake_of_the_caller(tokens: Compiled) -> None:
    executor = load_executor(tokens.program)
    executor.bind(2)
    kept = executor.states()[0]
    with pytest.raises(RuntimeError, match="reference to internal data"):
        executor.invoke()
    del kept
    _token_step(executor, [1, 2])


def test_a_damaged_artefact_is_a_value_error(tokens: Compiled) -> None:
    damaged = dataclasses.replace(tokens.program, files={"program.tflite": b"nonsense"})
    with pytest.raises(ValueError, match=r"."):
        load_executor(damaged)
    with pytest.raises(ValueError, match="cannot be read"):
        load_executor(dataclasses.replace(damaged, executor="tensorflow"))


def _upsampling() -> Any:
    """Transposed convolutions, whose sizes LiteRT finds in each run if they are left to it."""
    from stepwell_server.compile.graph.tensorflow_setup import keras
    from support.models.zoo import randomize

    x = keras.Input((None, 6), name="x")
    y = keras.layers.Dense(8, activation="elu")(keras.layers.GRU(7, return_sequences=True)(x))
    y = keras.layers.Reshape((-1, 2, 4))(y)
    for filters, ratio in ((6, 4), (4, 2)):
        spread = keras.layers.Conv1DTranspose(filters, 2 * ratio, strides=ratio, activation="elu")
        y = keras.layers.TimeDistributed(spread)(y)
    y = keras.layers.Reshape((-1, math.prod(y.shape[2:])))(y)
    model = keras.Model(x, keras.layers.Dense(6)(y))
    randomize(model, 1)
    return model


def _program(name: str) -> Program:
    if name == "upsampling":
        return programs.program(name, _upsampling, kept=programs.kept_with(__file__))
    return causal_model(name).program


@pytest.mark.parametrize(
    "name",
    [
        "late",
        "around_an_lstm",
        pytest.param("upsampling", marks=pytest.mark.slow),
        pytest.param("seanet_units", marks=pytest.mark.slow),
    ],
)
def test_runs_compute_the_same_at_sizes_that_change(name: str, late: Program) -> None:
    program = late if name == "late" else _program(name)
    assert litert.places_tensors_late(program.files[FLATBUFFER]) == (name == "late")
    assert program.executor == "litert", program.executor_reason
    rng, sizes = np.random.default_rng(1), (2, 3, 5, 6, 7, 8, 9, 12, 16, 17, 33, 64)
    specs = [(spec.shape, spec.dtype) for spec in program.inputs] + [
        (spec.shape, spec.dtype) for spec in program.state
    ]
    x, *states = (rng.standard_normal((64, *shape)).astype(dtype) for shape, dtype in specs)

    def run(executor: Executor, size: int) -> list[Any]:
        outputs, after = step_of_executor(executor)([x[:size]], [state[:size] for state in states])
        return [np.array(value) for value in (*outputs, *after)]

    expected = run(load_executor(program), 64)
    for _ in range(30):
        executor = load_executor(program)
        for size in rng.permutation(sizes):
            for one, two in zip(run(executor, int(size)), expected, strict=True):
                np.testing.assert_allclose(one, two[:size], rtol=0, atol=2e-5)


def test_padding_runs_only_the_listed_sizes() -> None:
    compiled = zoo_model("lstm_dense")
    plain = load_executor(compiled.program)
    padded = load_executor(dataclasses.replace(compiled.program, batch_sizes=(2, 8)))
    drawn = np.random.default_rng(5).standard_normal((19, 3)).astype("float32")
    results = []
    for executor in (plain, padded):
        executor.bind(19)
        for i in range(2):
            executor.states()[i][...] = 0.5
        for _ in range(3):
            executor.inputs()[0][...] = drawn
            executor.invoke()
            executor.carry()
        results.append([np.array(value) for value in (*executor.outputs(), *executor.next_states())])
    for one, two in zip(*results, strict=True):
        assert one.tobytes() == two.tobytes()


@pytest.mark.parametrize(
    ("rows", "sizes", "expected"),
    [
        (5, (), [(0, 5, 5)]),
        (5, (1,), [(0, 1, 1), (1, 2, 1), (2, 3, 1), (3, 4, 1), (4, 5, 1)]),
        (5, (2, 4, 8), [(0, 5, 8)]),
        (19, (2, 8), [(0, 8, 8), (8, 16, 8), (16, 19, 8)]),
        (18, (2, 8), [(0, 8, 8), (8, 16, 8), (16, 18, 2)]),
        (1, (4,), [(0, 1, 4)]),
    ],
)
def test_rows_are_cut_into_the_listed_sizes(
    rows: int, sizes: tuple[int, ...], expected: list[tuple[int, int, int]]
) -> None:
    assert list(chunks(rows, sizes)) == expected


@pytest.mark.parametrize("name", ["lstm_dense", "lstm_last_only", "gru_reset_after"])
def test_the_step_is_lean(name: str) -> None:
    """No reshaping between layers and no product over shapes unknown: one delegate takes the whole step."""
    from ai_edge_litert.interpreter import Interpreter

    program = zoo_model(name).program
    interpreter = Interpreter(model_content=program.files["program.tflite"], num_threads=1)
    interpreter.allocate_tensors()
    operations = [item["op_name"] for item in interpreter._get_ops_details()]
    assert operations.count("DELEGATE") == 1, operations
    assert not {"EXPAND_DIMS", "RESHAPE", "SHAPE", "TRANSPOSE", "BATCH_MATMUL"} & set(operations), operations
