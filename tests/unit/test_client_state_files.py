"""A file handed to `State.load` is a saved state, or is refused with `InvalidInputError`: whatever is in it."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepwell import errors
from stepwell._state.state import State
from support.samples import examples

METADATA = {
    "format": "stepwell-state/2",
    "model": "m",
    "fingerprint": "f00d",
    "batch_size": "2",
    "revision": "7",
    "position": "9",
    "structure": "5ca1ab1e",
    "names": '["h"]',
}


def tensor(dtype: str, shape: list[int], end: int, begin: int = 0) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """A safetensors file: the length of the header, the header, the tensors' bytes."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def saved(metadata: Mapping[str, str] = {}, dtype: str = "F32", shape: tuple[int, ...] = (2, 2)) -> bytes:
    """A saved state of one tensor, with some of its metadata replaced."""
    bits = {"BF16": 16, "BOOL": 8, "C64": 64, "F16": 16, "F32": 32, "F4": 4, "I64": 64}.get(dtype, 8)
    size = int(np.prod(shape)) * bits // 8
    header = {"__metadata__": {**METADATA, **metadata}, "h": tensor(dtype, list(shape), size)}
    return file_bytes(header, bytes(size))


HOSTILE = {
    "the structure is not printable": saved({"structure": "\n"}),
    "names are a number": saved({"names": "5"}),
    "names are a string": saved({"names": '"h"'}),
    "names are a mapping": saved({"names": '{"h": 1}'}),
    "names hold null": saved({"names": "[null]"}),
    "names hold a list": saved({"names": '[["h"]]'}),
    "names hold one twice": saved({"names": '["h", "h"]'}),
    "names hold one that is not there": saved({"names": '["h", "c"]'}),
    "names leave one out": saved({"names": "[]"}),
    "names are nested deeply": saved({"names": "[" * 100_000}),
    "names are no JSON": saved({"names": "h"}),
    "names hold half a surrogate pair": saved({"names": '["\\ud800"]'}),
    "a name is empty": file_bytes(
        {"__metadata__": METADATA | {"names": '[""]'}, "": tensor("F32", [2, 2], 16)}, bytes(16)
    ),
    "a name moves the cursor": file_bytes(
        {"__metadata__": METADATA | {"names": '["\\u001b[2J"]'}, "\x1b[2J": tensor("F32", [2, 2], 16)},
        bytes(16),
    ),
    "bfloat16": saved(dtype="BF16"),
    "float8": saved(dtype="F8_E4M3"),
    "float4": saved(dtype="F4"),
    "complex": saved(dtype="C64"),
    "an unknown type": saved(dtype="F33"),
    "a boolean that is 2": file_bytes({"__metadata__": METADATA, "h": tensor("BOOL", [2], 2)}, b"\x01\x02"),
    "batch_size -1": saved({"batch_size": "-1"}),
    "batch_size 0": saved({"batch_size": "0"}, shape=(0, 2)),
    "batch_size of another tensor": saved({"batch_size": "3"}),
    "batch_size with a sign": saved({"batch_size": "+2"}),
    "batch_size with a space": saved({"batch_size": " 2"}),
    "batch_size in other digits": saved({"batch_size": "٢"}),
    "batch_size of 5,000 digits": saved({"batch_size": "9" * 5000}),
    "batch_size over 32 bits": saved({"batch_size": str(2**32)}),
    "revision -1": saved({"revision": "-1"}),
    "revision over 64 bits": saved({"revision": str(2**64)}),
    "position -1": saved({"position": "-1"}),
    "position over 64 bits": saved({"position": str(2**64)}),
    "a model without a name": saved({"model": ""}),
    "a model that moves the cursor": saved({"model": "\x1b[2J"}),
    "no fingerprint": saved({"fingerprint": ""}),
    "a scalar": file_bytes({"__metadata__": METADATA, "h": tensor("F32", [], 4)}, bytes(4)),
    "an empty tensor": saved(shape=(2, 0)),
    "a tensor of 2^63 rows": saved(shape=(0, 2**63)),
    "a tensor of 100 axes": saved(shape=(2,) + (1,) * 99),
    "rows that differ": file_bytes(
        {
            "__metadata__": METADATA | {"names": '["h", "c"]'},
            "h": tensor("F32", [2, 1], 8),
            "c": tensor("F32", [3, 1], 20, 8),
        },
        bytes(20),
    ),
    "metadata that is no text": file_bytes({"__metadata__": METADATA | {"batch_size": 2}}),
    "metadata that is a list": file_bytes({"__metadata__": ["format"]}),
    "a header nested deeply": file_bytes(b'{"a":' * 100_000),
    "a header that is no text": file_bytes(b'{"__metadata__": {"format": "\xff"}}'),
    "a header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "nothing at all": b"",
    "something else": b"no safetensors at all, and longer than a header",
    "a file that was cut off": saved()[:-3],
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused_by_its_path(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        errors.InvalidInputError, match=r"path must be a state saved by State\.save; .*s\.safetensors"
    ):
        State.load(path)


@pytest.mark.parametrize("missing", ["format", "model"])
def test_a_file_without_its_metadata_is_refused_by_what_is_missing(missing: str, tmp_path: Path) -> None:
    metadata = {name: value for name, value in METADATA.items() if name != missing}
    (tmp_path / "s").write_bytes(
        file_bytes({"__metadata__": metadata, "h": tensor("F32", [2, 2], 16)}, bytes(16))
    )
    with pytest.raises(errors.InvalidInputError, match=missing):
        State.load(tmp_path / "s")


def test_a_refusal_stays_short_whatever_the_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for metadata in (
        {"names": json.dumps(["x" * 100_000])},
        {"model": "\n" * 100_000},
        {"format": "f" * 100_000},
    ):
        path.write_bytes(saved(metadata))
        with pytest.raises(errors.InvalidInputError) as caught:
            State.load(path)
        assert len(caught.value.message) < 1000 + len(str(path))


@pytest.mark.parametrize(
    ("arrays", "batch_size", "rule"),
    [
        ({"h": np.ones((2, 1))}, 3, "batch_size = 3"),
        ({"h": np.float32(1.0)}, 1, "batch_size = 1"),
        ({"h": np.ones((1, 2), np.complex64)}, 1, "complex64"),
        ({"h": np.ones((1, 0))}, 1, "must not be empty"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    arrays: dict[str, Any], batch_size: int, rule: str, tmp_path: Path
) -> None:
    with pytest.raises(errors.InvalidInputError, match=rule):
        State(arrays, model="m", fingerprint="f", batch_size=batch_size).save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def loaded_or_refused(path: Path) -> State | None:
    """What `load` makes of a file; any error but its own goes on to the test."""
    try:
        return State.load(path)
    except errors.InvalidInputError:
        return None


def check(state: State, path: Path) -> None:
    """What was loaded keeps every rule: it is saved and loaded again as the same state."""
    assert len(state) >= 1
    assert state.batch_size >= 1
    assert all(array.shape[0] == state.batch_size for array in state.values())
    for count in (state.revision, state.position):
        assert count is None or 0 <= count < 2**64
    state.save(path)
    again = State.load(path)
    assert again == state
    assert (again.revision, again.position) == (state.revision, state.position)
    assert list(again) == list(state)


def test_a_state_of_many_sessions_has_no_revision_in_its_file_either(tmp_path: Path) -> None:
    many = State({"h": np.ones((3, 2), np.float32)}, model="m", fingerprint="f00d", batch_size=3)
    assert "revision" not in repr(many)
    assert "position" not in many._repr_html_()
    assert many.to_dataframe().attrs == {"model": "m", "fingerprint": "f00d"}
    path = tmp_path / "many.safetensors"
    check(many, path)
    again = State.load(path)
    assert (again.revision, again.position, again[1].revision) == (None, None, None)


def test_no_byte_of_a_saved_file_changes_unnoticed(tmp_path: Path) -> None:
    arrays = {"h": np.linspace(0, 1, 6).reshape(2, 3).astype(">f4"), "b": np.array([[True], [False]])}
    state = State(arrays, model="m", fingerprint="f00d", batch_size=2, revision=7, position=9)
    state.save(path := tmp_path / "s")
    content = path.read_bytes()
    again = State.load(path)
    assert np.array_equal(again["h"], arrays["h"])
    for at, bit in itertools.product(range(len(content)), (0, 5)):
        changed = bytearray(content)
        changed[at] ^= 1 << bit
        path.write_bytes(changed)
        if (found := loaded_or_refused(path)) is not None:  # the name of the checksum, or a space
            assert (found, found.revision, found.position) == (again, 7, 9), f"byte {at}"
            assert (found.model, found.fingerprint) == ("m", "f00d")


fuzzed = settings(max_examples=examples(300))

JUNK_TEXT = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.sampled_from(
        ["", "-1", "0", "1e3", "NaN", "[]", "{}", "null", "[[]]", '["h","h"]', '["c"]', "[" * 2000]
    ),
)


@fuzzed
@given(data=st.data())
def test_a_file_of_changed_bytes_is_a_state_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(saved())
    for _ in range(data.draw(st.integers(1, 8), label="changes")):
        at = data.draw(st.integers(0, len(content)), label="at")
        kind = data.draw(st.sampled_from(["replace", "insert", "delete", "cut off"]), label="kind")
        if kind == "cut off":
            del content[at:]
        else:
            new = b"" if kind == "delete" else data.draw(st.binary(min_size=1, max_size=4), label="bytes")
            content[at : at + (0 if kind == "insert" else max(1, len(new)))] = new
    path = tmp_path / "s"
    path.write_bytes(bytes(content))
    if (state := loaded_or_refused(path)) is not None:
        check(state, path)


@fuzzed
@given(
    metadata=st.dictionaries(st.sampled_from(sorted(METADATA)), JUNK_TEXT, max_size=4),
    dtype=st.sampled_from(["BF16", "BOOL", "C64", "F16", "F32", "F4", "F8_E5M2", "I64", "U8"]),
    shape=st.lists(st.sampled_from([0, 1, 2, 3]), max_size=4),
    left_out=st.sets(st.sampled_from(sorted(METADATA)), max_size=1),
)
def test_a_file_of_changed_fields_is_a_state_or_refused(
    tmp_path: Path, metadata: dict[str, str], dtype: str, shape: list[int], left_out: set[str]
) -> None:
    content = saved(metadata, dtype, tuple(shape))
    length = struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8 : 8 + length])
    for name in left_out:
        del header["__metadata__"][name]
    path = tmp_path / "s"
    path.write_bytes(file_bytes(header, content[8 + length :]))
    if (state := loaded_or_refused(path)) is not None:
        check(state, path)
