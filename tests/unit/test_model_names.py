"""What models, versions and labels may be called, and how a reference is read."""

from __future__ import annotations

import pytest

from stepwell_server.core import model_names
from stepwell_server.core.model_names import MAX_VERSION, ModelRef, parse_reference


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("forecast", ModelRef("forecast")),
        ("v1.2_other-name", ModelRef("v1.2_other-name")),
        ("forecast@2", ModelRef("forecast", version=2)),
        (f"forecast@{MAX_VERSION}", ModelRef("forecast", version=2**63 - 1)),
        ("forecast:canary", ModelRef("forecast", label="canary")),
        ("2:v2", ModelRef("2", label="v2")),
        ("a" * 128 + ":" + "b" * 64, ModelRef("a" * 128, label="b" * 64)),
    ],
)
def test_a_reference_is_read_and_written_alike(text: str, expected: ModelRef) -> None:
    assert parse_reference(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "a name of 1 to 128"),
        ("@2", "a name of 1 to 128"),
        (":x", "a name of 1 to 128"),
        ("a/b", "a name of 1 to 128"),
        ("a b", "a name of 1 to 128"),
        ("a\n", "a name of 1 to 128"),
        ("é", "a name of 1 to 128"),
        ("a" * 129, "a name of 1 to 128"),
        ("a@", "VERSION a whole number from 1 to 9223372036854775807 without leading zeros"),
        ("a@0", "VERSION a whole number"),
        ("a@01", "VERSION a whole number"),
        ("a@-1", "VERSION a whole number"),
        ("a@+1", "VERSION a whole number"),
        ("a@1.0", "VERSION a whole number"),
        ("a@1_0", "VERSION a whole number"),
        ("a@ 1", "VERSION a whole number"),
        ("a@٣", "VERSION a whole number"),
        (f"a@{2**63}", "VERSION a whole number"),
        ("a@" + "9" * 10_000, "VERSION a whole number"),
        ("a@1:x", "VERSION a whole number"),
        ("a@1@2", "VERSION a whole number"),
        ("a:", "LABEL 1 to 64 letters, digits, _, - or ., not digits alone"),
        ("a:12", "not digits alone"),
        ("a:b@1", "LABEL 1 to 64"),
        ("a:b:c", "LABEL 1 to 64"),
        ("a:" + "b" * 65, "LABEL 1 to 64"),
        ("a:b/c", "LABEL 1 to 64"),
    ],
)
def test_invalid_references_are_refused_with_the_rule(text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=r"^must be NAME, NAME@VERSION or NAME:LABEL, with ") as caught:
        parse_reference(text)
    message = str(caught.value)
    assert rule in message
    assert f"; got {text!r}"[:100] in message
    assert len(message) < 400


def test_the_bounds_of_versions() -> None:
    assert [model_names.is_version(number) for number in (0, 1, MAX_VERSION, MAX_VERSION + 1)] == [
        False,
        True,
        True,
        False,
    ]
    assert model_names.version_of("0") is None
