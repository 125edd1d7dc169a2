"""The console's drawings of the hidden state: what they show is what the SDK reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect

import stepwell
from support.console import axe
from support.console.browser import NARROW, Browser
from support.console.pages import Action, Console, opened
from support.console.served import HOSTILE, ConsoleServer, new_id
from support.servers.both_fronts import needs_native
from support.servers.served import draw

pytestmark = [needs_native, pytest.mark.slow, pytest.mark.plain("the tests have callers of their own")]
TENSOR = "lstm/h"
UNITS = 8
LANE = 12
"""Height of the lane of marks above the strip, in pixels: `LANE` in console/src/state/strip.ts."""


@pytest.fixture(scope="module")
def server() -> Iterator[ConsoleServer]:
    with ConsoleServer("seq") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture
def client(server: ConsoleServer) -> Iterator[stepwell.Client]:
    with server.connect() as connected:
        yield connected


class Strip:
    """The strip of a session on its page, which shows 60 revisions or the next greater span."""

    def __init__(self, console: Console, session_id: str) -> None:
        self._page = console.page
        self.focusable = console.page.get_by_role("application", name=f"Strip of session {session_id}")
        self._canvas = self.focusable.get_by_role("img")
        part = console.page.locator(".strip-part", has=self.focusable)
        self.readout = part.locator(".readout")
        self._edges = part.locator(".edges")

    def wait_for(self, revision: int) -> None:
        """Wait until a revision is the newest one."""
        self._edges.get_by_text(re.compile(rf"now: revision {revision}$")).wait_for()

    def point(self, back: int, unit: int, span: int = 60) -> None:
        """Move the mouse to a revision, counted back from the newest, and a unit."""
        self._canvas.scroll_into_view_if_needed()
        self._page.mouse.move(*self._place(back, unit, span))

    def select_newest(self) -> None:
        """Drag within the newest revision."""
        self.point(0, 3)
        x, y = self._place(0, 3, 60)
        self._page.mouse.move(x - 6, y)
        self._page.mouse.down()
        self._page.mouse.move(x + 6, y, steps=3)
        self._page.mouse.up()

    def colours(self) -> list[tuple[int, int, int]]:
        """Red, green and blue of each unit of the newest revision."""
        box = self._canvas.bounding_box()
        places = [self._place(0, unit, 60) for unit in range(UNITS)]
        found = self._canvas.evaluate(
            """(canvas, places) => {
              const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
              copy.drawImage(canvas, 0, 0);
              const [across, up] = [canvas.width / canvas.clientWidth, canvas.height / canvas.clientHeight];
              return places.map(([x, y]) => [...copy.getImageData(x * across, y * up, 1, 1).data].slice(0, 3));
            }""",
            [(x - box["x"], y - box["y"]) for x, y in places],
        )
        return [tuple(each) for each in found]

    def _place(self, back: int, unit: int, span: int) -> tuple[float, float]:
        box = self._canvas.bounding_box()
        x = box["x"] + box["width"] * (span - back - 0.5) / span
        return x, box["y"] + LANE + (box["height"] - LANE) * (unit + 0.5) / UNITS


def values_of(session: stepwell.Session) -> Any:
    return session.get_state()[TENSOR][0]


def shown(value: float) -> str:
    """A number as the page writes it: four significant digits."""
    return "0" if value == 0 else f"{float(f'{value:.4g}'):g}"


def test_the_strip_grows_and_shows_each_cell(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    session = client.open_session("seq", session_id=new_id())
    x = draw(1)
    y = session.step(x)
    states = [values_of(session)]
    with opened(browser, server, f"/sessions/{session.id}") as console:
        strip = Strip(console, session.id)
        strip.wait_for(1)
        for _ in range(4):
            x = draw(1)
            y = session.step(x)
            states.append(values_of(session))
        strip.wait_for(5)
        for back in range(5):
            for unit in (0, 3, UNITS - 1):
                strip.point(back, unit)
                expect(strip.readout).to_contain_text(f"Unit {unit}: ")
                expect(strip.readout).to_contain_text(f"at revision {5 - back}, position {5 - back}")
                text = strip.readout.inner_text()
                number = re.search(r"Unit \d+: (\S+)", text)
                assert number
                assert float(number[1]) == pytest.approx(states[-1 - back][unit], rel=1e-3, abs=1e-4)
        strip.point(0, 0)
        expect(strip.readout).to_contain_text(f"Input x: {', '.join(shown(each) for each in x[0])}")
        expect(strip.readout).to_contain_text(f"Output y: {', '.join(shown(each) for each in np.ravel(y))}")
        # the text for readers of the screen includes the last change, although no other follows
        whole = re.compile("8 units by 5 changes, revisions 1 to 5")
        console.page.get_by_role("img", name=whole).wait_for()


def test_the_strip_is_orange_above_zero_and_blue_below(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    session = client.open_session("seq", session_id=new_id())
    with opened(browser, server, f"/sessions/{session.id}", color_scheme="light") as console:
        strip = Strip(console, session.id)
        strip.wait_for(0)
        for _ in range(5):
            session.step(5 * draw(1))
        strip.wait_for(5)
        for value, (red, _, blue) in zip(values_of(session), strip.colours(), strict=True):
            # the page is white near zero
            if abs(value) > 0.05:
                assert np.sign(red - blue) == np.sign(value)


def test_a_reset_is_named(browser: Browser, server: ConsoleServer, client: stepwell.Client) -> None:
    session = client.open_session("seq", session_id=new_id())
    with opened(browser, server, f"/sessions/{session.id}") as console:
        strip = Strip(console, session.id)
        strip.wait_for(0)
        session.step(draw(1))
        session.reset_states()
        session.step(draw(1))
        strip.wait_for(3)
        strip.point(1, 0)
        expect(strip.readout).to_contain_text("at revision 2, position 0, reset")


def test_keys_move_the_cursor_choose_units_and_select(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    session = client.open_session("seq", session_id=new_id())
    with opened(browser, server, f"/sessions/{session.id}") as console:
        strip = Strip(console, session.id)
        strip.wait_for(0)
        for _ in range(12):
            session.step(draw(1))
        strip.wait_for(12)
        strip.focusable.focus()
        keyboard = console.page.keyboard
        keyboard.press("ArrowLeft")
        expect(strip.readout).to_contain_text("Unit 0: ")
        keyboard.press("ArrowLeft")
        keyboard.press("ArrowDown")
        keyboard.press("ArrowDown")
        expect(strip.readout).to_contain_text("at revision 11,")
        expect(strip.readout).to_contain_text("Unit 2: ")
        keyboard.press("Enter")
        units = console.page.get_by_role("region", name="Units")
        expect(units.get_by_role("button", name="Remove unit 2")).to_be_visible()
        keyboard.press("]")
        keyboard.press("Shift+ArrowLeft")
        expect(strip.readout).to_contain_text("at revision 1,")
        keyboard.press("[")
        expect(console.page.get_by_text(f"Selected: revisions 1 to 11, {UNITS} units.")).to_be_visible()
        keyboard.press("Escape")
        expect(console.page.get_by_text("Drag on the strip to select a range first.")).to_be_visible()
        expect(strip.readout).to_contain_text("Point at the strip")
        console.page.get_by_role("button", name="Remove unit 0").click()
        expect(units.get_by_role("button", name="Remove unit")).to_have_count(1)


def test_units_are_sorted_by_an_input(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    session = client.open_session("seq", session_id=new_id())
    states, inputs = [], []
    with opened(browser, server, f"/sessions/{session.id}") as console:
        strip = Strip(console, session.id)
        strip.wait_for(0)
        for _ in range(20):
            inputs.append(draw(1))
            session.step(inputs[-1])
            states.append(values_of(session))
        strip.wait_for(20)
        console.page.get_by_label("Units sorted by").select_option("correlation with x[1]")
        console.page.get_by_role("button", name="Sort again").click()
        correlations = np.corrcoef(np.array(states).T, np.array(inputs)[:, 0, 1])[-1, :-1]
        strip.point(0, 0)
        expect(strip.readout).to_contain_text(f"Unit {np.abs(correlations).argmax()}: ")
        strip.point(0, UNITS - 1)
        expect(strip.readout).to_contain_text(f"Unit {np.abs(correlations).argmin()}: ")


def test_a_fork_stands_beside_its_session_with_their_distance(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    session = client.open_session("seq", session_id=new_id())
    session.step(draw(1))
    twin = session.fork(session_id=HOSTILE["markup"])
    with opened(browser, server, f"/sessions/{session.id}") as console:
        console.page.get_by_label("Compare with session").fill(twin.id)
        console.page.get_by_role("button", name="Compare").click()
        here, there = Strip(console, session.id), Strip(console, twin.id)
        here.wait_for(1)
        there.wait_for(1)
        distance = console.page.get_by_role("region", name="Distance of the two sessions")
        x = draw(1)
        session.step(x)
        twin.step(x)
        expect(distance).to_contain_text("Equal wherever both are known.")
        session.step(draw(1))
        twin.step(draw(1))
        norm = np.linalg.norm(values_of(session) - values_of(twin))
        expect(distance).to_contain_text("Equal up to revision 2, different from 3 on.")
        found = re.search(r"Distance at revision 3: (\S+)", distance.inner_text())
        assert found
        assert float(found[1]) == pytest.approx(norm, rel=1e-3)
    twin.close()


def test_the_drawings_fit_into_a_narrow_window(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    session = client.open_session("seq", session_id=new_id())
    session.step(draw(1))
    twin = session.fork(session_id=new_id("twin"))
    path = f"/sessions/{session.id}?other={twin.id}"
    with opened(browser, server, path, size=NARROW) as console:
        Strip(console, session.id).wait_for(1)
        console.page.get_by_role("table", name="Chosen units").wait_for()
        assert console.tab.grows_too_wide() == []
        assert axe.findings(console.tab) == []


def test_a_selected_range_finds_the_sessions_in_such_a_state(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    session = client.open_session("seq", session_id=new_id())
    with opened(browser, server, f"/sessions/{session.id}") as console:
        strip = Strip(console, session.id)
        strip.wait_for(0)
        for _ in range(3):
            session.step(3 * draw(1))
        twin, opposite = session.fork(session_id=new_id("twin")), session.fork(session_id=new_id("opposite"))
        opposite.reset_states({name: -values for name, values in session.get_state().items()})
        strip.wait_for(3)
        strip.select_newest()
        expect(console.page.get_by_text(f"Selected: revisions 3 to 3, {UNITS} units.")).to_be_visible()
        find = console.page.get_by_role("region", name="Sessions in a selected state")
        find.get_by_role("button", name="Find sessions in the selected state").click()
        row = find.get_by_role("row").filter(has_text=twin.id)
        expect(row).to_contain_text("yes")
        expect(row.get_by_role("cell").nth(1)).to_have_text("0")
        expect(find.get_by_role("row").filter(has_text=opposite.id)).to_contain_text("no")
        expect(find).to_contain_text("sessions that match")
        # the sample was a watch that has ended, and reads keep a session alive
        console.tab.wait_until(lambda: console.open_watches() == 1)
        assert not [one for one in console.tab.paths() if one.endswith((":batchGetStates", "/state"))]


def test_a_fork_made_here_is_compared_with_what_the_page_has_seen(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    session, twin = client.open_session("seq", session_id=new_id()), new_id()
    with opened(browser, server, f"/sessions/{session.id}") as console:
        strip = Strip(console, session.id)
        strip.wait_for(0)
        for _ in range(4):
            session.step(draw(1))
        strip.wait_for(4)
        fork = Action(console, "Fork")
        fork.form.get_by_label("ID of the fork").fill(twin)
        fork.do("Fork, and show both", f"Forked to {twin}.")
        Strip(console, twin).wait_for(4)
        distance = console.page.get_by_role("region", name="Distance of the two sessions")
        expect(distance).to_contain_text(
            "Distance at revision 4: 0 (Euclidean). Equal wherever both are known."
        )
        session.step(draw(1))
        whole = re.compile("8 units by 6 changes, revisions 0 to 5")
        console.page.get_by_role("img", name=whole).wait_for()


def test_the_plane_shows_a_sample_and_a_path(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    prefix = new_id("plane")
    sessions = [client.open_session("seq", session_id=f"{prefix}-{i}") for i in range(12)]
    for each in sessions:
        each.step(draw(1))
    with opened(browser, server, "/plane") as console:
        page = console.page
        page.get_by_label("Beginning of the IDs").fill(prefix)
        page.get_by_label("Beginning of the IDs").press("Enter")
        expect(
            page.get_by_text("12 sampled sessions, random from all 12 sessions that match")
        ).to_be_visible()
        # another sample than the first one, of all sessions
        page.get_by_role("img", name=re.compile("^12 sessions on the plane")).wait_for()
        expect(page.get_by_text("% of the variance").first).to_be_visible()
        page.get_by_label("Colours by").select_option("beginning of the ID")
        colours = page.get_by_role("list", name="Colours")
        expect(colours).to_contain_text("plane 12")
        plane = page.get_by_role("application", name="Plane")
        plane.focus()
        page.keyboard.press("ArrowRight")
        chosen = sessions[0]
        expect(page.get_by_text("the line joins its last 1 places")).to_be_visible()
        chosen.step(draw(1))
        expect(page.get_by_text("is at revision 2; the line joins its last 2 places")).to_be_visible()
        box = plane.bounding_box()
        page.mouse.move(box["x"] + 2, box["y"] + 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 4, box["y"] + box["height"] - 4, steps=3)
        page.mouse.up()
        expect(page.get_by_text("12 sampled sessions are in the selected region now.")).to_be_visible()
        page.get_by_role("link", name=chosen.id, exact=True).first.click()
        console.heading(f"Session {chosen.id}").wait_for()
