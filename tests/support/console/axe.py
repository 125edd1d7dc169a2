"""axe-core, which judges whether people with disabilities can use a page: https://github.com/dequelabs/axe-core."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tools  # type: ignore[import-not-found,unused-ignore]

from support.console.browser import Tab

_ROOT = Path(__file__).resolve().parents[3]
_SERIOUS = {"serious", "critical"}
_RUN = "async (options) => (await axe.run(document, {...options, resultTypes: ['violations']})).violations"
RULES_OF_COLOURS = ["color-contrast"]
"""The other rules find the same in each scheme of colours."""


@functools.cache
def _source() -> str:
    try:
        folder: Path = tools.node(_ROOT / "tests" / "node")
    except LookupError as missing:
        pytest.skip(str(missing))
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")


def findings(tab: Tab, rules: Sequence[str] = ()) -> list[str]:
    """The serious and critical findings of some rules, or of all, on the page as it is now, one text each."""
    # as the browser's debugger, not as a script of the page: its content security policy holds
    if not tab.page.evaluate("'axe' in window"):
        tab.page.evaluate(_source())
    found = tab.page.evaluate(_RUN, {"runOnly": list(rules)} if rules else {})
    return [
        f"{one['impact']} {one['id']}: {one['help']}: {json.dumps([node['html'][:200] for node in one['nodes']])}"
        for one in found
        if one["impact"] in _SERIOUS
    ]
