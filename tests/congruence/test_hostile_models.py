"""Files that somebody made to do harm: each is refused before Keras makes anything of it, and none does what it is for."""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stepwell_server import program_file
from stepwell_server.compile.errors import ModelError
from stepwell_server.compile.host.compiler import WarmCompiler
from stepwell_server.compile.keras_file import configuration
from stepwell_server.compile.keras_file.sizes import check_sizes
from stepwell_server.program_file import ProgramFileError

MIB = 1 << 20
Node = dict[str, Any]


def loaded(file: Path) -> Any:
    """The model, by the way of the compiling process."""
    from stepwell_server.compile.keras_file.archive import load_model

    check_sizes(file, 64 * MIB)
    return load_model(file)


def refused(file: Path) -> str:
    with pytest.raises(ModelError) as caught:
        loaded(file)
    said = str(caught.value)
    assert "\n" not in said
    return said


# ---------------------------------------------------------------------------------------------------- what it names


def function(module: str, name: str) -> Node:
    return {"module": module, "class_name": "function", "config": name, "registered_name": name}


def made(module: str | None, kind: str, /, **config: Any) -> Node:
    return {"module": module, "class_name": kind, "config": config, "registered_name": None}


def lambda_of(called: Node, /, **arguments: Any) -> Node:
    """A layer that calls a function that is found by its name: how the first published attacks ran what they liked."""
    return made("keras.layers", "Lambda", name="evil", function=called, arguments=arguments)


LAMBDA = {"class_name": "__lambda__", "config": {"code": "4wAAAAA=", "defaults": None, "closure": None}}
ATTACKS: dict[str, tuple[Node, str]] = {
    "CVE-2024-3660 a lambda's code": (lambda_of(LAMBDA), "refused by Keras's safe mode"),
    "CVE-2025-1550 a function of any module": (
        lambda_of(function("os", "system"), command="touch {marker}"),
        r"unknown function .system.|refused by Keras.s safe mode",
    ),
    "CVE-2025-1550 as a class": (
        made("subprocess", "Popen", args=["touch", "{marker}"]),
        "unknown class 'Popen'",
    ),
    "CVE-2025-8747 a download": (
        lambda_of(function("keras.utils", "get_file"), origin="file://{secret}", cache_dir="{folder}"),
        r"it names keras\.utils\.get_file",
    ),
    "CVE-2025-8747 by its own module": (
        lambda_of(function("keras.src.utils.file_utils", "get_file"), origin="file://{secret}"),
        r"it names keras\.src\.utils\.file_utils\.get_file",
    ),
    "CVE-2025-9906 safe mode off": (
        lambda_of(function("keras.config", "enable_unsafe_deserialization")),
        r"it names keras\.config\.enable_unsafe_deserialization",
    ),
    "a model loaded by a model": (
        lambda_of(function("keras.models", "load_model"), filepath="{secret}", safe_mode=False),
        r"it names keras\.models\.load_model",
    ),
    "deserialising by a function": (
        lambda_of(function("keras.losses", "deserialize")),
        r"it names keras\.losses\.deserialize",
    ),
    "a function named as a class": (
        made("keras.saving", "load_model"),
        r"it names keras\.saving\.load_model",
    ),
    "a builtin of Keras's": (lambda_of(function("builtins", "get_file")), r"it names builtins\.get_file"),
    "a path as a name": (lambda_of(function("keras", "src.utils.get_file")), r"it names keras\.src\.utils"),
    "an object of the package": (made("keras", "device"), r"it names keras\.device"),
    "CVE-2025-12058 a vocabulary elsewhere": (
        made("keras.layers", "StringLookup", name="words", vocabulary="{secret}"),
        r"layer 'words' must have its vocabulary in the model's file; it names another file, '/",
    ),
    "CVE-2025-12058 from the network": (
        made(None, "TextVectorization", vocabulary="http://127.0.0.1:9/x"),
        "must have its vocabulary in the model's file",
    ),
    "weights of a vocabulary elsewhere": (
        made("keras.layers", "IntegerLookup", vocabulary=[1], idf_weights="{secret}"),
        "must have its idf_weights in",
    ),
    "CVE-2025-49655 a pickle in a layer": (
        made(
            "keras.layers",
            "TorchModuleWrapper",
            module={"class_name": "__bytes__", "config": {"value": "gA=="}},
        ),
        "must contain only Keras's own layers that load nothing else; TorchModuleWrapper does",
    ),
    "a graph in another folder": (
        made("keras.layers", "TFSMLayer", filepath="{folder}"),
        "must contain only Keras's own layers that load nothing else; TFSMLayer does",
    ),
    "code of JAX": (
        made("keras.layers", "JaxLayer", call_fn=LAMBDA),
        "JaxLayer does|refused by Keras's safe mode",
    ),
    "a package that Keras imports": (
        made("keras_hub.src.tokenizers", "BytePairTokenizer", vocabulary=[], merges=[]),
        "name its module with --import keras_hub",
    ),
    "a module that is no text": ({"module": 5, "class_name": "Dense", "config": {}}, "must be text; got 5"),
}


def with_config(model: Path, folder: Path, change: Callable[[Node], None], name: str = "evil.keras") -> Path:
    file = folder / name
    with zipfile.ZipFile(model) as source, zipfile.ZipFile(file, "w") as target:
        for member in source.namelist():
            content = source.read(member)
            if member == "config.json":
                config = json.loads(content)
                change(config)
                content = json.dumps(config).encode()
            target.writestr(member, content)
    return file


def filled(value: Any, **places: Path) -> Any:
    text = json.dumps(value)
    for name, path in places.items():
        text = text.replace(f"{{{name}}}", str(path))
    return json.loads(text)


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_a_configuration_that_names_more_than_a_model_is_refused(
    attack: str, lstm: Path, tmp_path: Path
) -> None:
    marker, secret = tmp_path / "marker", tmp_path / "secret"
    secret.write_text("secret")
    node, says = ATTACKS[attack]
    node = filled(node, marker=marker, secret=secret, folder=tmp_path)

    def as_layer(config: Node) -> None:
        layers = config["config"]["layers"]
        layers.append(node | {"name": "evil", "inbound_nodes": layers[-1]["inbound_nodes"]})

    def as_argument(config: Node) -> None:
        config["config"]["layers"][-1]["config"]["activation"] = node

    before = sorted(tmp_path.iterdir())
    for change in (as_layer, as_argument):
        said = refused(with_config(lstm, tmp_path, change))

        assert re.search(says, said), said
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "evil.keras"])


def test_a_name_that_is_registered_vouches_for_no_other() -> None:
    node = function("keras.saving", "load_model") | {"registered_name": "mine>f"}
    with pytest.raises(ModelError, match=r"it names keras\.saving\.load_model"):
        configuration.check(json.dumps(node).encode(), {"mine>f"}.__contains__)
    for mine in (function("keras.mine", "mine>f"), made("keras.mine", "F") | {"registered_name": "mine>f"}):
        configuration.check(json.dumps(mine).encode(), {"mine>f"}.__contains__)


def test_deep_nesting_and_large_content_are_refused(lstm: Path, tmp_path: Path) -> None:
    def nested(depth: int) -> Callable[[Node], None]:
        def change(config: Node) -> None:
            node: Any = {}
            for _ in range(depth):
                node = {"a": node}
            config["config"]["more"] = node

        return change

    assert "config.json must be nested at most 200 deep" in refused(with_config(lstm, tmp_path, nested(250)))
    file = with_members(lstm, tmp_path, {"config.json": b'{"class_name":' + b"[" * 300_000})
    assert "config.json must be nested at most 200 deep" in refused(file)
    with pytest.raises(ModelError, match=r"config\.json must be at most 33554432 bytes; it is 33554433"):
        configuration.check(b" " * (configuration.MAX_BYTES + 1), lambda _name: False)


# -------------------------------------------------------------------------------------------------- what it consists of


def with_members(model: Path, folder: Path, others: dict[str, bytes], name: str = "evil.keras") -> Path:
    """The same model with other members, in the place of its own or beside them."""
    file = folder / name
    with zipfile.ZipFile(model) as source, zipfile.ZipFile(file, "w") as target:
        for member in source.namelist():
            if member not in others:
                target.writestr(member, source.read(member))
        for member, content in others.items():
            target.writestr(member, content)
    return file


BAD_NAMES = ["../x", "/etc/x", "assets/../../x", "a//b", "C:\\x", "assets/\x1b", "./x", "assets/" + "x" * 600]


def patched(file: Path, name: bytes, place: int, layout: str, value: int) -> None:
    """Change a field of a member in the directory of an archive."""
    content = bytearray(file.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    while content[at + 46 : at + 46 + len(name)] != name:
        at = content.rindex(b"PK\x01\x02", 0, at)
    struct.pack_into(layout, content, at + place, value)
    file.write_bytes(content)


def _twice(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("config.json", "{}")


def _other_case(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("CONFIG.json", "{}")


def _link(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        entry = zipfile.ZipInfo("assets/link")
        entry.create_system, entry.external_attr = 3, 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")


def _overlapping(file: Path) -> None:
    patched(file, b"config.json", 42, "<L", 0)


def _many(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(10_001):
            archive.writestr(f"assets/{number}", b"")


def _huge_directory(file: Path) -> None:
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(70):
            entry = zipfile.ZipInfo(f"assets/{number}")
            entry.comment = b"x" * 65_000
            archive.writestr(entry, b"")


HARM: list[tuple[Callable[[Path], None], str]] = [
    (_twice, "its members must have different names; 'config.json' appears twice"),
    (_other_case, "its members must have different names; 'CONFIG.json' appears twice"),
    (_link, "its members must be files; 'assets/link' is a link or a device"),
    (lambda file: patched(file, b"config.json", 8, "<H", 1), "must not be encrypted; 'config.json' is"),
    (_overlapping, "its members must not overlap"),
    (lambda file: patched(file, b"model.weights.h5", 20, "<L", 1 << 30), "must end before its directory"),
    (_many, "it must have at most 10000 members; it has 100"),
    (_huge_directory, "its directory must be at most 4194304 bytes; it is 45"),
]


@pytest.mark.parametrize(("harm", "says"), HARM)
def test_an_archive_that_tools_read_differently_is_refused(
    harm: Callable[[Path], None], says: str, lstm: Path, tmp_path: Path
) -> None:
    file = with_members(lstm, tmp_path, {})
    loaded(file)
    harm(file)
    assert says in refused(file)
    with pytest.raises(ProgramFileError) as caught:  # A compiled model is an archive as well.
        program_file.load(file)
    assert says in str(caught.value)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_elsewhere_are_refused(name: str, lstm: Path, tmp_path: Path) -> None:
    file = with_members(lstm, tmp_path, {name: b"x"})
    assert "its members must have plain names that do not lead outside; got" in refused(file)


def test_an_archive_holds_what_keras_writes_and_no_other_archive(lstm: Path, tmp_path: Path) -> None:
    loaded(with_members(lstm, tmp_path, {"assets/": b"", "assets/vocabulary.txt": b"a\nb\n"}))
    file = with_members(lstm, tmp_path, {"layer.py": b"import os"})
    assert "it must contain only members that Keras writes; it contains 'layer.py'" in refused(file)
    file = with_members(lstm, tmp_path, {"assets/more": lstm.read_bytes()})
    assert "it must not contain another archive; 'assets/more' is one" in refused(file)


# ------------------------------------------------------------------------------------------------------- its weights


def _external_link(file: h5py.File, secret: Path) -> None:
    file["layers"]["evil"] = h5py.ExternalLink(str(secret), "/")


def _soft_link(file: h5py.File, _secret: Path) -> None:
    file["evil"] = h5py.SoftLink("/layers")


def _external_storage(file: h5py.File, secret: Path) -> None:  # CVE-2026-1669
    file.create_dataset("evil", (6,), "u1", external=[(str(secret), 0, 6)])


def _virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((2,), "f4")
    layout[:] = h5py.VirtualSource(str(secret), "x", (2,))
    file.create_virtual_dataset("evil", layout)


def _objects(file: h5py.File, _secret: Path) -> None:
    file.create_dataset("evil", data=["text"], dtype=h5py.string_dtype())


def _filter(file: h5py.File, _secret: Path) -> None:
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((1,))
    settings.set_filter(32_001, h5py.h5z.FLAG_OPTIONAL, (0,))  # a library that HDF5 would look for
    h5py.h5d.create(file.id, b"evil", h5py.h5t.NATIVE_FLOAT, h5py.h5s.create_simple((1,)), settings)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_external_link, "must contain its weights itself; 'layers/evil' is a link"),
        (_soft_link, "must contain its weights itself; 'evil' is a link"),
        (_external_storage, "must contain its weights itself; 'evil' is in another file"),
        (_virtual, "must contain its weights itself; 'evil' is in another file"),
        (_objects, "must contain plain numbers; 'evil' is something else"),
        (_filter, "must contain plain numbers; 'evil' is something else"),
    ],
)
def test_weights_that_are_elsewhere_or_no_numbers_are_refused(
    harm: Callable[[h5py.File, Path], None], says: str, lstm: Path, tmp_path: Path
) -> None:
    secret, weights = tmp_path / "secret.h5", tmp_path / "weights.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = np.ones(2, np.float32)
    with zipfile.ZipFile(lstm) as source:
        weights.write_bytes(source.read("model.weights.h5"))
    with h5py.File(weights, "a") as file:
        harm(file, secret)
    assert says in refused(with_members(lstm, tmp_path, {"model.weights.h5": weights.read_bytes()}))


@pytest.mark.filterwarnings(
    "ignore:.*HDF5 file via:UserWarning", "ignore:The object being serialized:UserWarning"
)
def test_a_file_that_is_an_archive_and_hdf5_is_not_loaded_as_the_other(lstm: Path, tmp_path: Path) -> None:
    """CVE-2025-9905: legacy HDF5 knows no safe mode. Keras goes by the name, zip archives may begin with anything."""
    from stepwell_server.compile.graph.tensorflow_setup import keras

    marker = tmp_path / "marker"
    x = keras.Input((2,))
    evil = keras.layers.Lambda(
        lambda y, path=str(marker): (Path(path).write_text(""), y)[1], output_shape=(2,)
    )
    layer = keras.Model(x, evil(x))
    marker.unlink(missing_ok=True)
    layer.save(tmp_path / "evil.h5")
    assert "a legacy HDF5 file" in refused(tmp_path / "evil.h5")
    with (tmp_path / "evil.h5").open("ab") as file:
        file.write(lstm.read_bytes())
    assert zipfile.is_zipfile(tmp_path / "evil.h5")
    assert "must have a name that ends in .keras: rename it to evil.keras" in refused(tmp_path / "evil.h5")
    assert not marker.exists()


@pytest.mark.slow
def test_processes_that_are_kept_refuse_them_all_and_are_as_good_as_new(lstm: Path, tmp_path: Path) -> None:
    """What is refused above without a process is refused by a server's too, one after the other."""
    marker, secret = tmp_path / "marker", tmp_path / "secret"
    secret.write_text("secret")
    known: list[str] = []
    with WarmCompiler(tmp_path / "cache") as compiler:
        for number, (node, says) in enumerate(ATTACKS.values()):
            evil = filled(node, marker=marker, secret=secret, folder=tmp_path)

            def as_argument(config: Node, evil: Node = evil) -> None:
                config["config"]["layers"][-1]["config"]["activation"] = evil

            file = with_config(lstm, tmp_path, as_argument, f"evil-{number}.keras")
            with pytest.raises(ModelError, match=says) as caught:
                compiler.compile(file)
            assert str(caught.value) == refused(file)
            known += map(str, compiler.pids)
        compiler.compile(lstm, keep=False)
        assert set(known) == set(map(str, compiler.pids))
    assert not marker.exists()
    assert [file.suffix for file in (tmp_path / "cache").iterdir() if file.name != ".key"] == [".stepwell"]
