"""The folders of the native front: each uses those that `lib.rs` lists above it, and no modules use each other."""

from __future__ import annotations

import graphlib
import re
from collections.abc import Mapping

import repository

CRATE = repository.ROOT / "server" / "front" / "src"
USE = re.compile(r"\bcrate::(\w+)(?:::(\w+))?")


def floors() -> list[str]:
    """The modules and folders at the top, in the order of `lib.rs`."""
    return re.findall(r"^mod (\w+)", (CRATE / "lib.rs").read_text(), re.MULTILINE)


def arrows() -> Mapping[str, set[str]]:
    """What each module uses outside its tests, by its path: `limits/load`."""
    found: dict[str, set[str]] = {}
    for path in CRATE.rglob("*.rs"):
        name = path.relative_to(CRATE).with_suffix("").as_posix()
        code = re.split(r"^#\[cfg\(test\)\]\n(?:pub )?mod ", path.read_text(), flags=re.MULTILINE)[0]
        code = re.sub(r"^\s*//.*", "", code, flags=re.MULTILINE)
        found[name] = {
            f"{folder}/{module}" if (CRATE / folder).is_dir() else folder
            for folder, module in USE.findall(code)
        }
    return found


def test_folders_use_only_those_above_them() -> None:
    order = {name: place for place, name in enumerate(floors())}
    wrong = [
        (name, used)
        for name, uses in arrows().items()
        for used in uses
        if name != "lib" and order[used.partition("/")[0]] > order[name.partition("/")[0]]
    ]
    assert not wrong


def test_no_modules_use_each_other() -> None:
    graphlib.TopologicalSorter(arrows()).prepare()  # raises CycleError
