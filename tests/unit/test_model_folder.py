"""A folder of models: what of it is served, what is left out and why, and that nothing half written is taken."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from stepwell_server.catalog.files.folder import FolderError, Look, ModelFolder, require_inside
from stepwell_server.core.version_policy import LATEST, VersionPolicy


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def folder(root: Path) -> ModelFolder:
    return ModelFolder(root)


def put(root: Path, *files: str) -> None:
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def files_of(root: Path, look: Look) -> dict[str, dict[int, str]]:
    return {
        name: {version: os.path.relpath(file.path, root) for version, file in sorted(versions.items())}
        for name, versions in sorted(look.versions.items())
    }


def problems_of(root: Path, look: Look) -> dict[str, str]:
    return {os.path.relpath(path, root): why for path, why in look.problems.items()}


def settled(folder: ModelFolder) -> Look:
    folder.look()
    return folder.look()


def test_both_layouts_and_both_kinds_of_file(root: Path, folder: ModelFolder) -> None:
    put(root, "forecast/1.keras", "forecast/3.stepwell", "forecast/12/any.keras", "words/2/model.stepwell")
    put(root, "forecast/12/README.md", "forecast/config.pbtxt", "README.md", "words/labels.txt")
    look = settled(folder)
    assert files_of(root, look) == {
        "forecast": {1: "forecast/1.keras", 3: "forecast/3.stepwell", 12: "forecast/12/any.keras"},
        "words": {2: "words/2/model.stepwell"},
    }
    assert look.problems == {}


def test_nothing_is_taken_at_the_first_look(root: Path, folder: ModelFolder) -> None:
    put(root, "forecast/1.keras")
    assert folder.look().versions == {}
    assert files_of(root, folder.look()) == {"forecast": {1: "forecast/1.keras"}}


def test_a_file_that_is_being_written_is_taken_when_two_looks_find_it_the_same(
    root: Path, folder: ModelFolder
) -> None:
    put(root, "forecast/1.keras")
    settled(folder)
    with open(root / "forecast" / "2.keras", "wb", buffering=0) as file:
        for piece in (b"a", b"bc"):
            file.write(piece)
            assert files_of(root, folder.look()) == {"forecast": {1: "forecast/1.keras"}}
    assert sorted(folder.look().versions["forecast"]) == [1, 2]


def test_an_overwritten_file_has_another_stamp_once_it_is_whole(root: Path, folder: ModelFolder) -> None:
    put(root, "forecast/1.keras")
    first = settled(folder).versions["forecast"][1]
    (root / "forecast/1.keras").write_bytes(b"something longer")
    assert folder.look().versions["forecast"][1] == first
    assert folder.look().versions["forecast"][1].stamp != first.stamp


@pytest.mark.parametrize("name", ["1.toml", "model.toml"])
def test_the_declaration_of_a_step_function_is_part_of_its_stamp(
    name: str, root: Path, folder: ModelFolder
) -> None:
    put(root, "vad/1.onnx", "vad/2.stepwell")
    stamps = [settled(folder).versions["vad"]]
    for text in ("[state]", "[context]\nx = 3", None):
        if text is None:
            (root / "vad" / name).unlink()
        else:
            (root / "vad" / name).write_text(text)
        assert folder.look().versions["vad"] == stamps[-1]
        stamps.append(folder.look().versions["vad"])
        assert stamps[-1][1] != stamps[-2][1]
    assert stamps[0][1] == stamps[-1][1]
    assert len({each[2] for each in stamps}) == 1  # a compiled file holds what was declared


@pytest.mark.parametrize(
    "name", ["forecast/.2.keras.x1", "forecast/2.keras.tmp", "forecast/.2.keras", ".x/1.keras"]
)
def test_hidden_and_temporary_files_are_passed_over(root: Path, folder: ModelFolder, name: str) -> None:
    put(root, "forecast/1.keras", name)
    look = settled(folder)
    assert files_of(root, look) == {"forecast": {1: "forecast/1.keras"}}
    assert look.problems == {}


def test_a_version_is_gone_when_two_looks_miss_it(root: Path, folder: ModelFolder) -> None:
    put(root, "forecast/1.keras", "forecast/2/model.keras")
    settled(folder)
    (root / "forecast/1.keras").unlink()
    (root / "forecast/2/model.keras").unlink()
    assert sorted(folder.look().versions["forecast"]) == [1, 2]
    assert folder.look().versions == {}


@pytest.mark.parametrize(
    ("files", "at", "why"),
    [
        (["x.keras"], "x.keras", r"must be in a folder with the model's name: NAME/VERSION.keras, .*"),
        (
            ["forecast/last.keras"],
            "forecast/last.keras",
            r"must be named by its version, a whole number from 1 .*",
        ),
        (
            ["forecast/01.keras"],
            "forecast/01.keras",
            r"must be named by its version, .* without leading zeros",
        ),
        (["forecast/0.keras"], "forecast/0.keras", r"must be named by its version, .*"),
        ([f"forecast/{2**63}.keras"], f"forecast/{2**63}.keras", r"must be named by its version, .*"),
        (["forecast/old/1.keras"], "forecast/old", r"must be named by its version, .*"),
        (["a b/1.keras"], "a b", r"must be named as a model, by a name of 1 to 128 letters, .*"),
        (["a@2/1.keras"], "a@2", r"must be named as a model, by a name of 1 to 128 letters, .*"),
        (
            ["forecast/1/notes.txt"],
            "forecast/1",
            r"must hold a .keras, .onnx or .stepwell file; it holds none",
        ),
        (
            ["forecast/1/a.keras", "forecast/1/b.stepwell"],
            "forecast/1",
            r"must hold one .keras, .onnx or .stepwell file; it holds a.keras, b.stepwell",
        ),
        (
            ["forecast/1.keras", "forecast/1.stepwell"],
            "forecast/1.stepwell",
            r"must be the only file of its version; 1.keras is there too",
        ),
        (
            ["forecast/1/a.keras", "forecast/1.stepwell"],
            "forecast/1.stepwell",
            r"must be the only file of its version; a.keras is there too",
        ),
    ],
)
def test_unusable_files_are_left_out_with_the_reason(
    root: Path, folder: ModelFolder, files: list[str], at: str, why: str
) -> None:
    put(root, "other/7.keras", *files)
    look = settled(folder)
    assert files_of(root, look) == {"other": {7: "other/7.keras"}}
    assert list(problems_of(root, look)) == [at]
    assert re.fullmatch(why, look.problems[str(root / at)])
    assert look.new_problems == look.problems
    # reported once
    again = folder.look()
    assert (again.problems, again.new_problems) == (look.problems, {})


def test_a_problem_that_returns_is_reported_again(root: Path, folder: ModelFolder) -> None:
    put(root, "x.keras")
    settled(folder)
    (root / "x.keras").unlink()
    assert settled(folder).problems == {}
    put(root, "x.keras")
    assert folder.look().new_problems == {}
    assert list(folder.look().new_problems) == [str(root / "x.keras")]


def test_a_momentary_problem_is_not_reported(root: Path, folder: ModelFolder) -> None:
    settled(folder)
    (root / "forecast" / "1").mkdir(parents=True)
    assert folder.look().problems == {}
    put(root, "forecast/1/model.keras")
    look = settled(folder)
    assert (files_of(root, look), look.problems) == ({"forecast": {1: "forecast/1/model.keras"}}, {})


def test_a_second_file_leaves_the_version_that_was_there(root: Path, folder: ModelFolder) -> None:
    put(root, "forecast/1.keras")
    before = settled(folder)
    put(root, "forecast/1.stepwell")
    after = settled(folder)
    assert after.versions == before.versions
    assert list(problems_of(root, after)) == ["forecast/1.stepwell"]


def test_links_within_the_folder_are_followed(root: Path, folder: ModelFolder) -> None:
    put(root, ".data/1.keras", ".data/2/model.keras", "real/1.keras")
    (root / "forecast").mkdir()
    (root / "forecast/1.keras").symlink_to("../.data/1.keras")
    (root / "forecast/2").symlink_to("../.data/2")
    (root / "alias").symlink_to("real")
    assert files_of(root, settled(folder)) == {
        "alias": {1: "alias/1.keras"},
        "forecast": {1: "forecast/1.keras", 2: "forecast/2/model.keras"},
        "real": {1: "real/1.keras"},
    }


def test_the_folder_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    put(root, "forecast/1.keras")
    (root / "forecast/2.keras").symlink_to("1.keras")
    (tmp_path / "current").symlink_to(root)
    look = settled(ModelFolder(tmp_path / "current"))
    assert (sorted(look.versions["forecast"]), look.problems) == ([1, 2], {})


@pytest.mark.parametrize(
    ("link", "leads_to"),
    [
        ("forecast/1.keras", "m.keras"),
        ("forecast/1", "."),
        ("forecast/1/m.keras", "m.keras"),
        ("forecast", "v"),
    ],
)
def test_a_link_out_of_the_folder_is_refused(
    root: Path, folder: ModelFolder, tmp_path: Path, link: str, leads_to: str
) -> None:
    outside = tmp_path / "outside"
    put(outside, "m.keras", "v/1.keras")
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(outside / leads_to)
    look = settled(folder)
    assert look.versions == {}
    target = os.path.realpath(outside / leads_to)
    assert problems_of(root, look) == {link: f"must not lead out of {root}; it leads to {target}"}


def test_a_served_version_that_is_replaced_by_a_link_outside_stays_what_it_was(
    root: Path, folder: ModelFolder, tmp_path: Path
) -> None:
    put(root, "forecast/1.keras")
    before = settled(folder)
    (root / "forecast/1.keras").unlink()
    (root / "forecast/1.keras").symlink_to(tmp_path)
    assert settled(folder).versions == before.versions


def test_broken_links_and_special_files_are_left_out(root: Path, folder: ModelFolder) -> None:
    (root / "forecast").mkdir()
    (root / "forecast/1.keras").symlink_to("gone.keras")
    os.mkfifo(root / "forecast/2.keras")
    look = settled(folder)
    assert look.versions == {}
    assert problems_of(root, look) == {
        "forecast/1.keras": "cannot be read: No such file or directory",
        "forecast/2.keras": "must be a file",
    }


def test_a_folder_that_cannot_be_read_changes_nothing(root: Path, folder: ModelFolder) -> None:
    put(root, "forecast/1.keras", "words/1.keras")
    before = settled(folder)
    away = root.with_name("away")
    root.rename(away)
    look = settled(folder)
    assert look.versions == before.versions
    assert look.problems == {str(root): "cannot be read: No such file or directory"}
    away.rename(root)
    assert settled(folder).problems == {}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_name_that_cannot_be_read_changes_nothing_of_it(root: Path, folder: ModelFolder) -> None:
    put(root, "forecast/1.keras", "words/1.keras")
    before = settled(folder)
    (root / "forecast").chmod(0)
    try:
        look = settled(folder)
    finally:
        (root / "forecast").chmod(0o700)
    assert look.versions == before.versions
    assert problems_of(root, look) == {"forecast": "cannot be read: Permission denied"}


def test_whether_a_path_leads_out(root: Path, tmp_path: Path) -> None:
    put(root, "forecast/1.keras")
    require_inside(root, root / "forecast/1.keras")
    require_inside(root, root / "forecast/../forecast/1.keras")
    for path in (root / "../x.keras", tmp_path / "models2/1.keras", Path("/")):
        with pytest.raises(FolderError, match=f"^must not lead out of {re.escape(str(root))}; it leads to /"):
            require_inside(root, path)


@pytest.mark.parametrize(
    ("text", "chosen", "written"),
    [
        ("latest", {9}, "latest 1"),
        ("latest 1", {9}, "latest 1"),
        (" latest  2 ", {5, 9}, "latest 2"),
        ("latest 7", {1, 3, 5, 9}, "latest 7"),
        ("all", {1, 3, 5, 9}, "all"),
        ("3", {3}, "3"),
        ("5, 3,7", {3, 5}, "3,5,7"),
        ("2", set(), "2"),
    ],
)
def test_policies_choose_versions(text: str, chosen: set[int], written: str) -> None:
    policy = VersionPolicy.parse(text)
    assert policy.choose([3, 9, 1, 5]) == chosen
    assert str(policy) == written
    assert VersionPolicy.parse(written) == policy


@pytest.mark.parametrize(
    "text", ["", "latest 0", "latest two", "latest 1 2", "newest", "1,", "1,1", "0", "01", "1;2"]
)
def test_invalid_policies_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^must be 'latest N' .* got ") as caught:
        VersionPolicy.parse(text)
    assert str(caught.value).endswith(repr(text))


def test_the_policy_by_default() -> None:
    assert VersionPolicy.parse("latest") == LATEST
    assert LATEST.choose([]) == set()
