"""Acting in the console, in a real browser: each action by its button, by the Python and by the curl that it shows."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from playwright.sync_api import expect

import stepwell
from support.console.browser import Browser
from support.console.pages import Action, opened
from support.console.served import HOSTILE, ConsoleServer, new_id
from support.servers.both_fronts import needs_native
from support.servers.served import draw
from support.servers.server_process import retrained

pytestmark = [needs_native, pytest.mark.slow, pytest.mark.plain("the tests have callers of their own")]
LANGUAGES = ("Python", "curl")
NONE = "\u2013"


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


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: ConsoleServer) -> Path:
    """The folder in which shown code runs, with the user's token in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPWELL_TOKEN", server.tokens["user"])
    return tmp_path


def run(language: str, action: Action) -> None:
    """Run what the action shows."""
    code = action.code(language)
    if language == "Python":
        names: dict[str, Any] = {}
        exec(code, names)  # noqa: S102 - our own page
        names["client"].close()
    else:
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
        json.loads(done.stdout)


def equal(one: stepwell.Session, other: stepwell.Session) -> None:
    """Both have the same state, to the bit."""
    first, second = one.get_state(), other.get_state()
    assert first.position == second.position
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_steps_by_form_json_and_file(
    browser: Browser, server: ConsoleServer, client: stepwell.Client, folder: Path
) -> None:
    session = client.open_session("seq", session_id=new_id(), batch_size=2)
    wanted = client.open_session("seq", batch_size=2)
    with opened(browser, server, f"/sessions/{session.id}") as console:
        step = Action(console, "Step")
        inputs = {"Form": draw(2), "JSON": draw(2, 3), ".npy file": draw(2, 4)}
        for way, x in inputs.items():
            step.form.get_by_role("radio", name=way, exact=True).check()
            if way == "Form":
                for (row, feature), value in np.ndenumerate(x):
                    step.form.get_by_label(f"x, row {row}, {feature}", exact=True).fill(repr(float(value)))
            elif way == "JSON":
                step.form.get_by_role("textbox").fill(json.dumps(x.tolist()))
            else:
                np.save(folder / "x.npy", x)
                step.form.get_by_label("x", exact=True).set_input_files(folder / "x.npy")
            step.do("Step", "Stepped to revision")
            wanted.step(x)
            equal(session, wanted)
            for language in LANGUAGES:
                run(language, step)
                wanted.step(x)
                equal(session, wanted)
        facts = console.page.get_by_label("Facts", exact=True)
        expect(facts).to_contain_text("Revision9")
        expect(console.page.get_by_label("Last step")).to_contain_text("Time steps of the last step4")


def test_what_is_no_input_is_not_sent(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    session = client.open_session("seq", session_id=new_id())
    with opened(browser, server, f"/sessions/{session.id}") as console:
        step = Action(console, "Step")
        button = step.form.get_by_role("button", name="Step", exact=True)
        step.form.get_by_label("x, 1", exact=True).fill("many")
        expect(button).to_be_disabled()
        expect(step.form).to_contain_text('x, number 2, must be a number; got "many"')
        step.form.get_by_role("radio", name="Form", exact=True).press("ArrowRight")
        expect(step.form.get_by_role("radio", name="JSON", exact=True)).to_be_checked()
        for text, problem in (("[1, 2", "must be JSON"), ("[1, 2]", "must have the shape 1")):
            step.form.get_by_role("textbox").fill(text)
            expect(step.form).to_contain_text(problem)
            expect(button).to_be_disabled()
        step.form.get_by_role("textbox").fill("[1, 2, 3]")
        step.do("Step", "Stepped to revision 1")
        session.close()
        console.page.get_by_role("alert").get_by_text("This session has ended").wait_for()


def test_resets_to_zeros_to_values_and_of_some_rows(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    session = client.open_session("seq", session_id=new_id(), batch_size=3)
    wanted = client.open_session("seq", batch_size=3)

    def disturb() -> None:
        x = draw(3)
        session.refresh()
        session.step(x)
        wanted.step(x)

    with opened(browser, server, f"/sessions/{session.id}") as console:
        reset = Action(console, "Reset states")
        disturb()
        reset.press("Reset", confirm=False)
        equal(session, wanted)
        values = {
            name: np.random.default_rng().standard_normal((2, 8), np.float32) for name in wanted.get_state()
        }
        for kind, rows in (("zeros", []), ("zeros", [1]), ("values", [2, 0])):
            reset.form.get_by_role("combobox", name="New state").select_option(kind)
            reset.form.get_by_label("Rows (empty: all)").fill(", ".join(map(str, rows)))
            if kind == "values":
                shown = {name: array.tolist() for name, array in values.items()}
                reset.form.get_by_role("radio", name="JSON", exact=True).check()
                reset.form.get_by_label("An object of nested lists by name").fill(json.dumps(shown))
            for language in (None, *LANGUAGES):
                disturb()
                if language is None:
                    reset.do("Reset", "Reset at revision", confirm=True)
                else:
                    run(language, reset)
                wanted.reset_states(values if kind == "values" else None, rows=rows or None)
                equal(session, wanted)


def test_forks_and_shows_both(browser: Browser, server: ConsoleServer, client: stepwell.Client) -> None:
    session = client.open_session("seq", session_id=new_id())
    session.step(draw(1))
    with opened(browser, server, f"/sessions/{session.id}") as console:
        fork = Action(console, "Fork")
        for language in (*LANGUAGES, None):
            twin = new_id(HOSTILE["markup"])
            fork.form.get_by_label("ID of the fork").fill(twin)
            if language is None:
                fork.do("Fork, and show both", f"Forked to {twin}.")
                console.page.get_by_text("Side by side with").get_by_role(
                    "link", name=twin, exact=True
                ).wait_for()
            else:
                run(language, fork)
            equal(client.open_session("seq", session_id=twin), session)
        console.page.get_by_role("link", name="Show this session alone").click()
        console.page.get_by_text("Side by side with").wait_for(state="detached")


def test_closes_after_a_confirmation(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    with opened(browser, server) as console:
        for language in (*LANGUAGES, None):
            session = client.open_session("seq", session_id=new_id(HOSTILE["quotes"]))
            console.go(f"/sessions/{quote(session.id, safe='')}")
            console.heading(f"Session {session.id}").wait_for()
            close = Action(console, "Close")
            if language is None:
                close.press("Close the session", confirm=False)
                assert client.session_info(session.id).revision == 0
                close.do("Close the session", f"Closed {session.id}.", confirm=True)
            else:
                run(language, close)
            console.page.get_by_role("alert").get_by_text("This session has ended").wait_for()
            with pytest.raises(stepwell.SessionNotFoundError):
                client.session_info(session.id)
            ended = console.page.get_by_role("alert").filter(has_text="This session has ended")
            client.open_session("seq", session_id=session.id).step(draw(1))
            ended.get_by_role("button", name="Look again").click()
            expect(ended).to_have_count(0)
            expect(console.page.get_by_role("region", name="Hidden state")).to_contain_text("now: revision")


def test_saves_a_state_and_loads_it_into_another_session(
    browser: Browser, server: ConsoleServer, client: stepwell.Client, folder: Path
) -> None:
    session = client.open_session("seq", session_id=new_id("user/1"))
    other = client.open_session("seq", session_id=new_id())
    session.step(draw(1, 5))
    with opened(browser, server, f"/sessions/{quote(session.id, safe='')}") as console:
        save = Action(console, "Save the state")
        with console.page.expect_download() as download:
            save.do("Save to a file", "Saved revision 1")
        name = download.value.suggested_filename
        download.value.save_as(folder / name)
        wanted = session.get_state()
        for _ in range(2):
            found = stepwell.State.load(folder / name)
            assert (found.model, found.position) == (wanted.model, wanted.position)
            for tensor in wanted:
                np.testing.assert_array_equal(found[tensor], wanted[tensor])
            (folder / name).unlink()
            run("Python", save)
        console.go(f"/sessions/{other.id}")
        console.heading(f"Session {other.id}").wait_for()
        load = Action(console, "Load a state")
        load.form.get_by_label("File of a saved state").set_input_files(folder / name)
        for language in (None, *LANGUAGES):
            other.refresh()
            other.reset_states()
            if language is None:
                load.do("Load into this session", "Loaded at revision", confirm=True)
            else:
                run(language, load)
            equal(other, session)


def test_loads_a_version_and_makes_it_the_default(
    browser: Browser, server: ConsoleServer, client: stepwell.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEPWELL_TOKEN", server.tokens["admin"])
    client.open_session("seq", session_id=new_id())  # without a session the previous default is unloaded soon
    with opened(browser, server, "/models", caller="admin") as console:

        def wait_for_versions(*labels: tuple[str, str]) -> None:
            rows = console.page.get_by_role("table", name="Versions of seq").get_by_role("row")
            expect(rows).to_have_count(1 + len(labels))
            for at, (version, label) in enumerate(labels, 1):
                cells = rows.nth(at).get_by_role("cell")
                expect(cells.nth(0)).to_have_text(version)
                expect(cells.nth(2)).to_have_text(label)

        load, unload = Action(console, "Load a model version"), Action(console, "Unload a version of seq")
        default, label = Action(console, "Set the default of seq"), Action(console, "Set a label of seq")
        load.form.get_by_label("Path of a").fill(str(retrained().path))
        load.form.get_by_role("checkbox", name="Make it the default").uncheck()
        console.page.get_by_role("heading", name="seq", exact=True).wait_for()
        console.unfold()
        for number, language in enumerate((*LANGUAGES, None), 2):
            if language is None:
                load.do("Load", f"Loaded seq@{number}")
            else:
                run(language, load)
                console.page.get_by_role("button", name="Refresh").click()
                unload.form.get_by_role("combobox", name="Version").select_option(str(number))
                unload.do("Unload", f"Unloaded seq@{number}.", confirm=True)
        wait_for_versions(("1 (default)", NONE), ("4", NONE))
        default.do("Set the default", "The default of seq is 4", confirm=True)
        wait_for_versions(("1", NONE), ("4 (default)", NONE))
        label.form.get_by_label("Label", exact=True).fill("canary")
        label.do("Set the label", "seq:canary is version 4.")
        for language, version in zip(LANGUAGES, ("1", "4"), strict=True):
            default.form.get_by_role("combobox", name="Version").select_option(version)
            run(language, default)
            console.page.get_by_role("button", name="Refresh").click()
            console.page.get_by_role("cell", name=f"{version} (default)").wait_for()
        wait_for_versions(("1", NONE), ("4 (default)", "canary"))


def test_a_late_answer_hides_no_newer_one(browser: Browser, server: ConsoleServer) -> None:
    with opened(browser, server, "/models", caller="admin") as console:
        page, held = console.page, list[Any]()
        page.get_by_role("heading", name="seq", exact=True).wait_for()
        page.route("**/v1/models", lambda route: held.append(route))  # noqa: PLW0108 - it looks at the signature
        for _ in range(2):
            page.get_by_role("button", name="Refresh").click()
        console.tab.wait_until(lambda: len(held) == 2)
        older, newer = held
        answer = newer.fetch().json()
        answer["models"][0]["name"] = "newer"
        newer.fulfill(json=answer)
        page.get_by_role("heading", name="newer", exact=True).wait_for()
        older.continue_()
        console.tab.wait_until(lambda: "/v1/models" not in console.tab.open_paths())
        console.tab.check()
        assert page.get_by_role("heading", name="newer", exact=True).is_visible()


def test_opens_a_session(browser: Browser, server: ConsoleServer, client: stepwell.Client) -> None:
    with opened(browser, server, "/sessions") as console:
        console.unfold()
        form = Action(console, "Open a session")
        for language in (*LANGUAGES, None):
            session_id = new_id(HOSTILE["percent"])
            form.form.get_by_label("ID (empty").fill(session_id)
            form.form.get_by_label("Rows").fill("2")
            if language is None:
                form.press("Open")
                console.heading(f"Session {session_id}").wait_for()
            else:
                run(language, form)
            assert client.session_info(session_id).batch_size == 2


def test_code_acts_on_a_session_whatever_its_id(
    browser: Browser, server: ConsoleServer, client: stepwell.Client
) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    with opened(browser, server, permissions=permissions) as console:
        for session_id in HOSTILE.values():
            client.open_session("seq", session_id=session_id)
            console.go(f"/sessions/{quote(session_id, safe='')}")
            console.heading(f"Session {session_id}").wait_for()
            step = Action(console, "Step")
            for language in LANGUAGES:
                run(language, step)
                console.page.get_by_role("button", name=f"Copy the {language} of: Step").click()
                copied = console.page.evaluate("navigator.clipboard.readText()")
                assert copied == step.code(language)
            assert client.session_info(session_id).revision == len(LANGUAGES)


def test_who_may_not_act_sees_why(browser: Browser, server: ConsoleServer, client: stepwell.Client) -> None:
    session = client.open_session("seq", session_id=new_id())
    session.step(draw(1))
    actions = ("Step", "Reset states", "Fork", "Load a state", "Close")
    with opened(browser, server, f"/sessions/{session.id}", caller="viewer") as console:
        for title in actions:
            form = console.page.get_by_role("form", name=title, exact=True)
            expect(form).to_contain_text("This needs the role user; yours is viewer.")
            expect(form.locator("button[type=submit]")).to_be_disabled()
        with console.page.expect_download():
            Action(console, "Save the state").press("Save to a file")
        console.go("/models")
        console.heading("Models").wait_for()
        versions = console.page.get_by_role("table", name="Versions of seq")
        expect(versions.get_by_role("row").nth(1).get_by_role("cell").nth(3)).to_have_text("\N{EN DASH}")
        console.unfold()
        for title in ("Load a model version", "Set the default of seq", "Unload a version of seq"):
            form = console.page.get_by_role("form", name=title, exact=True)
            expect(form).to_contain_text("This needs the role admin; yours is viewer.")
        posts = [path for path in console.tab.paths("POST") if path != "/v1/watch"]
        assert posts + console.tab.paths("DELETE") == []
    assert session.get_state().revision == 1
