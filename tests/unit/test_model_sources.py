"""Which files a server begins with, and what it reports where they differ from what the operator expects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepwell_server.catalog.files.folder import ModelFolder
from stepwell_server.catalog.files.sources import Candidates, StoredModel, begin_with
from stepwell_server.core.version_policy import VersionPolicy
from stepwell_server.errors import StartError
from stepwell_server.settings import Settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for file in ("forecast/1.keras", "forecast/2.keras", "forecast/10.keras", "words/3.stepwell"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


def begin(root: Path, kept: dict[str, StoredModel] | None = None, **settings: Any) -> list[Candidates]:
    given = Settings(models_dir=root, store="memory", **settings)
    return begin_with(given, ModelFolder(root), kept)


def logged(caplog: pytest.LogCaptureFixture) -> dict[str, dict[str, str]]:
    """The fields of what was logged, by the event."""
    return {record.getMessage(): record.fields for record in caplog.records}  # type: ignore[attr-defined]


def sources(found: list[Candidates]) -> list[tuple[str, int, str, str]]:
    return [
        (source.name, source.version, source.path.name, source.display_name)
        for each in found
        for version in each.choice(())
        for source in [each.source(version)]
    ]


def test_the_policy_chooses_the_highest_first(root: Path) -> None:
    policies = {"": VersionPolicy.parse("latest 2"), "words": VersionPolicy.parse("all")}
    found = begin(root, version_policy=policies)
    assert sources(found) == [
        ("forecast", 10, "10.keras", "forecast@10"),
        ("forecast", 2, "2.keras", "forecast@2"),
        ("words", 3, "3.stepwell", "words"),
    ]
    assert found[0].choice({10}) == [2, 1]
    assert sources(begin(root)) == [
        ("forecast", 10, "10.keras", "forecast@10"),
        ("words", 3, "3.stepwell", "words"),
    ]


def test_all_versions_of_the_command_line_are_served_with_those_of_the_folder(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = root / "words/3.stepwell"
    assert sources(begin(root, models={"words": other, "words@9": other, "more@2": other})) == [
        ("words", 9, "3.stepwell", "words@9"),
        ("words", 3, "3.stepwell", "words@3"),
        ("more", 2, "3.stepwell", "more"),
        ("forecast", 10, "10.keras", "forecast@10"),
    ]
    told = "models of the command line replace those of the same name in --models"
    assert logged(caplog)[told] == {"models": "words"}


def test_without_a_folder_nothing_is_looked_for(root: Path) -> None:
    settings = Settings(models={"a": root / "forecast/1.keras"}, store="memory")
    assert sources(begin_with(settings, None)) == [("a", 1, "1.keras", "a")]


@pytest.mark.parametrize(
    ("had", "default", "chosen", "is_default_chosen"),
    [
        ([1, 2], 2, [10, 2], False),  # what is new becomes the default
        ([1, 2], 1, [10, 1], True),  # somebody had gone back to it
        ([2, 10], 2, [10, 2], True),
        ([3], 3, [10], False),  # its file is gone
        ([], 0, [10], False),
    ],
)
def test_the_default_of_before_is_loaded_whatever_the_policy_says(
    root: Path, had: list[int], default: int, chosen: list[int], is_default_chosen: bool
) -> None:
    forecast, _ = begin(root, {"forecast": StoredModel(had, default)})
    assert forecast.choice(()) == chosen
    assert forecast.is_default_chosen is is_default_chosen


@pytest.mark.parametrize(
    ("had", "default", "from_elsewhere", "is_default_chosen"),
    [
        ([1, 2, 10, 11], 11, [11], True),  # it comes back
        ([11], 11, [11], True),
        ([1, 2, 10, 11], 11, [], False),  # its file was taken away
        ([1, 2, 5], 5, [5], False),  # 10 is new, and higher
        ([1, 2, 5, 10], 5, [5], True),  # somebody had gone back to it
    ],
)
def test_the_default_that_was_loaded_by_a_call_stays_it(
    root: Path, had: list[int], default: int, from_elsewhere: list[int], is_default_chosen: bool
) -> None:
    forecast, _ = begin(root, {"forecast": StoredModel(had, default, from_elsewhere)})
    assert forecast.is_default_chosen is is_default_chosen
    assert forecast.choice(()) == [10]


def test_omissions_are_reported(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "forecast/last.keras").touch()
    assert len(begin(root)) == 2
    told = logged(caplog)["a part of --models is not served"]
    assert told["path"] == str(root / "forecast/last.keras")
    assert "must be named by its version" in told["reason"]


def test_a_folder_without_models_is_refused_with_its_problems(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "1.keras").touch()
    says = f"--models: must hold NAME/VERSION.keras, .*; {tmp_path} holds no model; {tmp_path}/1.keras must be in a folder"
    with pytest.raises(StartError, match=f"^{says} "):
        begin(tmp_path)
    # more may come
    assert begin(tmp_path, watch_models=True) == []
    assert any("holds no model" in event for event in logged(caplog))
    tmp_path.joinpath("1.keras").unlink()
    with pytest.raises(StartError, match=r"--models: .* cannot be read: No such file or directory"):
        begin(tmp_path / "gone", watch_models=True)


@pytest.mark.parametrize(
    ("option", "settings"),
    [
        ("--probe-steps", {"probe_steps": {"other": 600}}),
        ("--trust-causality", {"trust_causality": ["other"]}),
        ("--version-policy", {"version_policy": {"other": VersionPolicy()}}),
    ],
)
def test_an_option_about_a_model_that_is_not_there(
    root: Path, option: str, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    told = f"{option}: there is no model 'other'; the models are forecast, words"
    with pytest.raises(StartError, match=f"^{told}$"):
        begin(root, **settings)
    assert len(begin(root, watch_models=True, **settings)) == 2
    assert told in logged(caplog)
