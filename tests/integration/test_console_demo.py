"""The console's demo as its users see it, on a server that asks for no token; with CONSOLE_PICTURES, its pictures.

`make console-pictures` sets the variable, and writes the pictures of README and docs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import stepwell
from stepwell.cli import console_demo
from support.console.browser import Browser
from support.console.pages import Console
from support.secured import Server
from support.servers.both_fronts import needs_native
from support.servers.closed_server import HTTP

pytestmark = [needs_native, pytest.mark.plain("a server without callers")]
_FOLDER = Path(__file__).resolve().parents[2] / "docs" / "guides" / "console"
_OTHERS = 150
_STEPS = 160


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    model = {console_demo.MODEL: console_demo.model_file()}
    with Server(model, extra_args=HTTP, start_timeout_s=100) as running:
        yield running


def picture(console: Console, name: str, height: int) -> None:
    """Take a picture of the window at a height, where pictures are wanted."""
    if os.environ.get("CONSOLE_PICTURES"):
        console.page.set_viewport_size({"width": 1280, "height": height})
        console.page.evaluate(
            "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )
        console.page.screenshot(path=_FOLDER / f"{name}.png")


@pytest.mark.slow
def test_the_demos_users_are_seen_live(server: Server) -> None:
    sources = console_demo.sources()
    with (
        stepwell.connect(server.address) as client,
        Browser() as browser,
        browser.tab(f"http://{server.http_address}") as tab,
    ):
        random = np.random.default_rng(7)
        ids = [f"{console_demo.USERS[number % 3]}-{number:03d}" for number in range(_OTHERS)]
        group = client.open_sessions(console_demo.MODEL, _OTHERS, session_ids=ids)
        phases = random.uniform(0, 2 * np.pi, (_OTHERS, 1))
        for step in range(40):
            group.step(np.sin(2 * np.pi * step / 24 + phases).astype(np.float32))
        console = Console(tab)
        sessions = [client.open_session(console_demo.MODEL, session_id=user) for user in console_demo.USERS]
        tab.goto("/console#/live")
        for user in console_demo.USERS:
            console.page.get_by_role("application", name=f"Strip of session {user}").wait_for()
        console.wait_until_live()
        for _ in range(_STEPS):
            for session in sessions:
                session.step(np.array([[next(sources[session.id])]], np.float32))
        revisions = console.page.get_by_text(f"{console_demo.MODEL}, revision {_STEPS}", exact=True)
        tab.wait_until(lambda: revisions.count() == len(sessions))
        picture(console, "live", 540)
        console.go("/plane")
        console.page.get_by_text(f"{_OTHERS + len(sessions)} sampled sessions").wait_for()
        console.page.get_by_role("combobox", name="Colours by").select_option("prefix")
        console.page.get_by_role("img", name=f"{_OTHERS + len(sessions)} sessions on the plane").wait_for()
        console.page.get_by_role("application", name="Plane").press("ArrowRight")
        for number in range(24):
            sessions[0].step(np.array([[next(sources["ana"])]], np.float32))
            if number % 6 == 5:  # the plane gets one state a second
                console.page.get_by_text(f"is at revision {_STEPS + number + 1};").wait_for()
        picture(console, "plane", 840)
        console.go("/")
        console.page.get_by_role("heading", name="Latency by stage").wait_for()
        picture(console, "overview", 760)
