"""The console in a real browser: the token, the one stream of events, hostile ids, a restarted server, all sizes."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from playwright.sync_api import expect

from support.console import axe
from support.console.browser import NARROW, WIDE, Browser
from support.console.pages import UNAUTHENTICATED, Console, opened
from support.console.served import HOSTILE, ConsoleServer, new_id
from support.servers.both_fronts import needs_native
from support.servers.closed_server import Secured
from support.servers.served import draw, local_server
from support.servers.valkey_servers import Valkey

pytestmark = [needs_native, pytest.mark.plain("the tests have callers of their own")]
PAGES = {"Overview": "/", "Sessions": "/sessions", "Live": "/live", "Plane": "/plane", "Models": "/models"}


@pytest.fixture(scope="module")
def server() -> Iterator[ConsoleServer]:
    with ConsoleServer() as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def own_page(browser: Browser, server: ConsoleServer) -> Iterator[Console]:
    with opened(browser, server) as console:
        yield console


@pytest.fixture(scope="module")
def admins_page(browser: Browser, server: ConsoleServer) -> Iterator[Console]:
    with opened(browser, server, caller="admin") as console:
        yield console


@pytest.fixture
def console(own_page: Console) -> Iterator[Console]:
    """The overview, as a user sees it, in a tab that the tests share: to open one costs a second."""
    own_page.go("/")
    own_page.heading("Overview").wait_for()
    own_page.wait_until_live()
    yield own_page
    own_page.tab.check()


def test_files_need_no_token_and_data_needs_one_that_only_memory_keeps(
    browser: Browser, server: ConsoleServer
) -> None:
    with browser.tab(server.origin) as tab:
        console = Console(tab)
        with tab.expecting(UNAUTHENTICATED):
            tab.goto("/console")
            console.token_dialog.wait_for()
            console.give_token("not-a-token")
            console.token_dialog.get_by_text("token").first.wait_for()
            console.give_token(server.tokens["viewer"])
            console.wait_until_live()
        kept = tab.page.evaluate(
            "[localStorage.length, sessionStorage.length, document.cookie, location.href]"
        )
        assert kept == [0, 0, "", f"{server.origin}/console"]
        with tab.expecting(UNAUTHENTICATED):
            tab.page.reload()
            console.token_dialog.wait_for()


def test_a_page_asks_for_another_token_when_its_own_is_revoked(
    browser: Browser, server: ConsoleServer
) -> None:
    with opened(browser, server, "/sessions", "leaver") as console, console.tab.expecting(UNAUTHENTICATED):
        server.revoke("leaver")
        console.token_dialog.get_by_text("token").first.wait_for()
        console.give_token(server.tokens["user"])
        console.wait_until_live()
        console.page.get_by_role("button", name="Forget token").click()
        console.token_dialog.wait_for()


@pytest.mark.slow
def test_a_page_asks_for_another_token_when_its_own_expires(browser: Browser, server: ConsoleServer) -> None:
    with opened(browser, server, "/sessions", "guest") as console, console.tab.expecting(UNAUTHENTICATED):
        server.expire("guest", after_s=2)
        console.token_dialog.get_by_text("expired").first.wait_for()
        console.give_token(server.tokens["user"])
        console.wait_until_live()
        console.token_dialog.wait_for(state="hidden")


@pytest.mark.slow
def test_the_theme_can_be_chosen(browser: Browser, server: ConsoleServer) -> None:
    back = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, server, color_scheme="dark") as console:
        dark = console.page.evaluate(back)
        console.page.get_by_role("button", name="Light", exact=True).click()
        console.page.get_by_role("button", name="Dark", exact=True).wait_for()
        light = console.page.evaluate(back)
        assert dark != light
        assert axe.findings(console.tab) == []
        console.page.get_by_role("button", name="Dark", exact=True).click()
        console.page.get_by_role("button", name="Light", exact=True).wait_for()
        assert console.page.evaluate(back) == dark


def test_a_hostile_id_is_text_everywhere(console: Console, server: ConsoleServer) -> None:
    with server.connect() as client:
        for session_id in HOSTILE.values():
            client.open_session("seq", session_id=session_id).step(draw(1))
    for session_id in HOSTILE.values():
        console.go("/sessions")
        console.page.get_by_role("link", name=session_id, exact=True).click()
        console.heading(f"Session {session_id}").wait_for()
        expect(console.page).to_have_title(f"Session {session_id} · Stepwell")
    assert console.page.evaluate("document.querySelectorAll('main script, main img[src=x]').length") == 0


def test_a_page_has_one_stream_of_events(console: Console, server: ConsoleServer) -> None:
    session_id = new_id()
    with server.connect() as client:
        client.open_session("seq", session_id=session_id).step(draw(1))
        for path, title in (*((path, name) for name, path in PAGES.items()), ("", "")):
            console.go(path or f"/sessions/{session_id}")
            console.heading(title or f"Session {session_id}").wait_for()
            console.wait_until_live()
            # the browser may report the end of a page's last stream after the beginning of its next one
            console.tab.wait_until(lambda: console.open_watches() == 1)


def test_a_page_continues_with_a_server_that_was_restarted(console: Console, server: ConsoleServer) -> None:
    with console.tab.expecting("ERR_|status of 503"):
        server.server.kill()
        console.page.get_by_role("alert", name="Problems").get_by_text("Not connected").wait_for()
        server.server.start()
        console.wait_until_live()
        console.page.get_by_role("alert", name="Problems").wait_for(state="detached")


def test_the_keyboard_reaches_each_page(browser: Browser, server: ConsoleServer) -> None:
    with opened(browser, server) as console:
        keyboard = console.page.keyboard
        keyboard.press("Tab")
        expect(console.page.get_by_role("link", name="Skip to the page")).to_be_focused()
        for name in PAGES:
            keyboard.press("Tab")
            expect(console.link(name)).to_be_focused()
        keyboard.press("Enter")
        console.heading("Models").wait_for()
        expect(console.page.get_by_role("main")).to_be_focused()
        console.page.set_viewport_size({"width": 400, "height": 300})
        console.link("Models").press("Shift+Tab")
        keyboard.press("Enter")
        console.heading("Plane").wait_for()
        expect(console.page.get_by_role("main")).to_be_focused()
        expect(console.page.get_by_role("link", name="Overview")).to_be_in_viewport()


def test_each_page_suits_its_window_and_readers_of_the_screen(
    admins_page: Console, server: ConsoleServer
) -> None:
    session_id, console = new_id("x" * 200), admins_page
    with server.connect() as client:
        client.open_session("seq", session_id=session_id).step(draw(1))
        paths = {**PAGES, f"Session {session_id}": f"/sessions/{session_id}"}
        found = []
        for name, path in paths.items():
            console.go(path)
            console.heading(name).wait_for()
            console.wait_until_live()
            # a table that waits for its rows for a third of a second is drawn in half of its colours
            expect(console.page.locator("[aria-busy=true]")).to_have_count(0)
            console.unfold()
            found += [f"{name}: {finding}" for finding in axe.findings(console.tab)]
            console.page.emulate_media(color_scheme="dark")
            found += [f"{name}, dark: {one}" for one in axe.findings(console.tab, axe.RULES_OF_COLOURS)]
            console.page.emulate_media(color_scheme="light")
            for width, height in (NARROW, WIDE):
                console.page.set_viewport_size({"width": width, "height": height})
                found += [f"{name} at {width}: {one}" for one in console.tab.grows_too_wide()]
        assert not found, "\n".join(found)


def test_the_table_asks_for_one_page_of_many_sessions(console: Console, server: ConsoleServer) -> None:
    prefix, many, page_size = new_id("zz"), 1_200, 50
    ids = [f"{prefix}-{number:05d}" for number in range(many)]
    with server.connect() as client:
        client.open_sessions("gru", many, session_ids=ids)
        client.open_session("seq", session_id=f"{prefix}-other")
        client.open_session("seq", session_id=new_id())  # the table without the filter has another total
        page, before = console.page, len(console.tab.requests)
        console.go("/sessions")
        status = page.get_by_role("status").filter(has_text=" of ")
        rows = page.get_by_role("table", name="Sessions").get_by_role("row")
        page.get_by_label("ID begins with").fill(prefix)
        expect(status).to_have_text("1 to 50 of 1,201")
        expect(rows).to_have_count(1 + page_size)
        page.get_by_role("button", name="Next page").click()
        expect(status).to_have_text("51 to 100 of 1,201")
        expect(rows.nth(1)).to_contain_text(ids[50])
        page.get_by_role("link", name=ids[50]).click()
        console.heading(f"Session {ids[50]}").wait_for()
        page.go_back()
        expect(page.get_by_label("ID begins with")).to_have_value(prefix)
        expect(status).to_have_text("51 to 100 of 1,201")
        expect(rows.nth(1)).to_contain_text(ids[50])
        page.get_by_role("button", name="Previous page").click()
        expect(rows.nth(1)).to_contain_text(ids[0])
        page.get_by_role("combobox", name="Model", exact=True).select_option("seq")
        expect(status).to_have_text("1 to 1 of 1")
        page.get_by_role("combobox", name="Version", exact=True).select_option("1")
        expect(rows).to_have_count(2)
        page.get_by_role("combobox", name="Model", exact=True).select_option("")
        page.get_by_label("ID begins with").fill(ids[-1])
        expect(status).to_have_text("1 to 1 of 1")
        page.get_by_role("link", name=ids[-1]).click()
        console.heading(f"Session {ids[-1]}").wait_for()
        asked = [one.url for one in console.tab.requests[before:] if "/v1/sessions?" in one.url]
        sizes = [int(dict(parse_qsl(urlsplit(url).query))["page_size"]) for url in asked]
        assert max(sizes) == page_size
        assert len(asked) < 20


@pytest.mark.slow
def test_the_table_says_that_it_searches(browser: Browser, server: ConsoleServer) -> None:
    held: list[Any] = []
    with server.connect() as client, opened(browser, server, "/sessions") as console:
        client.open_session("seq", session_id=new_id())
        page, table = console.page, console.page.get_by_role("table", name="Sessions")
        expect(table).to_have_attribute("aria-busy", "false")
        page.route("**/v1/sessions?*skip_total=true*", lambda route: held.append(route))  # noqa: PLW0108 - playwright marks the function
        page.get_by_role("combobox", name="Idle for").select_option("86400")
        pages = page.get_by_role("group", name="Pages of sessions").get_by_role("status")
        expect(pages).to_have_text("Searching…")
        expect(table).to_have_attribute("aria-busy", "true")
        console.tab.wait_until(lambda: bool(held))
        held[0].continue_()
        expect(pages).to_have_text("None")
        expect(table.get_by_role("row")).to_have_count(1)


@pytest.mark.slow
def test_a_search_among_many_stops_and_can_be_continued(browser: Browser, server: ConsoleServer) -> None:
    asked: list[str] = []

    def empty(route: Any) -> None:
        asked.append(route.request.url)
        body: dict[str, object] = {"sessions": [], "next_page_token": f"t{len(asked)}"}
        if len(asked) == 30:
            body = {"sessions": [{"session_id": "the one", "model": "seq"}], "next_page_token": ""}
        route.fulfill(json=body)

    with opened(browser, server, "/sessions") as console:
        page = console.page
        page.route("**/v1/sessions?*", empty)
        page.get_by_role("combobox", name="Idle for").select_option("86400")
        page.get_by_text("No session matches so far.").wait_for()
        assert len(asked) == 20
        assert all("skip_total=true" in url for url in asked), "counting reads all of them"
        page.get_by_role("button", name="Next page").click()
        page.get_by_role("link", name="the one", exact=True).wait_for()
        assert len(asked) == 30
        assert "page_token=t20" in asked[20]


@pytest.mark.slow
def test_the_overview_lists_the_replicas(browser: Browser) -> None:
    with (
        Valkey(append="everysec") as valkey,
        ConsoleServer("seq", store=valkey.url()) as own,
        opened(browser, own, caller="admin") as console,
    ):
        table = console.page.get_by_role("table", name="Replicas")
        rows = table.get_by_role("row")
        expect(rows).to_have_count(2)
        expect(rows.nth(1)).to_contain_text("(this one)")
        with own.connect("admin") as client:
            expect(rows.nth(1)).to_contain_text(client.server_info().id)
        shares = ["--store", valkey.url(), "--durability", "async"]
        with local_server("seq", extra_args=shares) as other:
            expect(rows).to_have_count(3)
            row = rows.filter(has_text=other.address)
            expect(row).to_contain_text(metadata.version("stepwell"))
            expect(row.get_by_text("ready", exact=True)).to_be_visible()
            problems = console.page.get_by_role("alert", name="Problems")
            expect(problems).to_have_count(0)
            strange: dict[str, object] = {
                "host": HOSTILE["markup"],
                "address": "a:1",
                "http_address": "javascript:alert(1)",
            }
            strange |= {"version": "9.9", "started": 1, "state": "ready", "resident_sessions": 0}
            late = struct.pack(">Q", int((time.time() - 60) * 1000)) + json.dumps(strange).encode()
            fresh = struct.pack(">Q", int(time.time() * 1000)) + json.dumps(strange).encode()
            valkey.ask("HSET", "stepwell:{meta}replicas", "late", late, "fresh", fresh)
            expect(rows).to_have_count(5)
            expect(rows.filter(has_text="late").get_by_text("missing", exact=True)).to_be_visible()
            expect(rows.filter(has_text="late")).to_contain_text(HOSTILE["markup"])
            expect(problems).to_contain_text("run different versions")
            assert table.locator("a, img").count() == 0
            assert axe.findings(console.tab) == []
            older = [f"older-{number}" for number in range(60)]
            # those that become missing on a slow machine come after the late one
            strange["started"] = 2
            fresh = struct.pack(">Q", int(time.time() * 1000)) + json.dumps(strange).encode()
            valkey.ask("HSET", "stepwell:{meta}replicas", *(part for name in older for part in (name, fresh)))
            expect(rows).to_have_count(1 + 50)
            expect(console.page.get_by_text("50 of 64 replicas")).to_be_visible()
            expect(rows.filter(has_text="late")).to_have_count(1)
            expect(rows.filter(has_text="(this one)")).to_have_count(1)
            valkey.ask("HSET", "stepwell:{meta}replicas", *(part for name in older for part in (name, late)))
            expect(rows.get_by_text("missing", exact=True)).to_have_count(49)
            expect(rows.nth(1)).to_contain_text("(this one)")
            valkey.ask("HDEL", "stepwell:{meta}replicas", *older)
        expect(rows.filter(has_text=other.address)).to_have_count(0)


@pytest.mark.slow
def test_with_tls_all_requests_share_one_connection_of_http_2(browser: Browser, tmp_path: Path) -> None:
    secured = Secured(tmp_path)
    with (
        local_server("seq", extra_args=secured.options) as server,
        browser.tab(f"https://{server.http_address}", ignore_https_errors=True) as tab,
    ):
        console = Console(tab)
        with tab.expecting(UNAUTHENTICATED):
            tab.goto("/console")
            console.give_token(secured.tokens["eye"])
            console.wait_until_live()
        protocols = "performance.getEntriesByType('resource').map((one) => one.nextHopProtocol)"
        assert set(tab.page.evaluate(protocols)) == {"h2"}


def test_an_admin_acts_in_another_tenant(admins_page: Console, server: ConsoleServer) -> None:
    session_id, console = new_id(), admins_page
    with server.connect() as client:
        client.open_session("seq", session_id=session_id).step(draw(1))
        console.go("/sessions")
        prefix = console.page.get_by_label("ID begins with")
        link = console.page.get_by_role("link", name=session_id, exact=True)
        field = console.page.get_by_label("Tenant", exact=True)
        for tenant in ("", "elsewhere", ""):
            field.fill(tenant)
            field.press("Enter")
            prefix.fill(session_id)
            if tenant:
                console.page.get_by_text("No session matches.").wait_for()
                link.wait_for(state="detached")
            else:
                link.wait_for()
            console.wait_until_live()
