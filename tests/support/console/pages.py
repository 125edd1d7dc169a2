"""The console as its users see it: pages and controls by their names for screen readers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from support.console.browser import WIDE, Browser, Tab
from support.console.served import ConsoleServer

UNAUTHENTICATED = "status of 401"


class Console:
    """The console in a tab."""

    def __init__(self, tab: Tab) -> None:
        self.tab = tab
        self.page = tab.page

    def go(self, path: str) -> None:
        """Open a page by its path behind the #, such as /sessions."""
        self.page.evaluate("(hash) => { location.hash = hash; }", f"#{path}")

    def heading(self, name: str) -> Any:
        """The page's title."""
        return self.page.get_by_role("heading", name=name, exact=True, level=1)

    def link(self, name: str) -> Any:
        """A link to another page of the console."""
        return self.page.get_by_role("navigation", name="Pages").get_by_role("link", name=name)

    @property
    def token_dialog(self) -> Any:
        return self.page.get_by_role("dialog", name="This server needs a token")

    def give_token(self, token: str) -> None:
        """Fill the dialog in, and send it."""
        self.token_dialog.get_by_label("Token", exact=True).fill(token)
        self.token_dialog.get_by_role("button", name="Use token").click()

    @property
    def cost(self) -> Any:
        """The line that says what the page's watching costs."""
        return self.page.get_by_label("What this page's watching costs")

    def wait_until_live(self) -> None:
        """Wait until the page's stream of events runs."""
        self.cost.get_by_text("Stream live").wait_for()

    def message(self, text: str) -> None:
        """Wait for a message at the top of the page, and close it."""
        notice = self.page.get_by_role("status").filter(has_text=text)
        notice.get_by_role("button", name="Close the message").click()

    def unfold(self) -> None:
        """Open everything that is folded up."""
        self.page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")

    def open_watches(self) -> int:
        """How many streams of events the page has open."""
        return self.tab.open_paths().count("/v1/watch")


@contextlib.contextmanager
def opened(
    browser: Browser,
    server: ConsoleServer,
    path: str = "/",
    caller: str = "user",
    size: tuple[int, int] = WIDE,
    **options: Any,
) -> Iterator[Console]:
    """A page of the console, whose user has given the token of a caller. See `Browser.tab` for the options."""
    with browser.tab(server.origin, size, **options) as tab:
        console = Console(tab)
        with tab.expecting(UNAUTHENTICATED):
            tab.goto(f"/console#{path}")
            console.give_token(server.tokens[caller])
            console.wait_until_live()
        yield console


class Action:
    """The form of an action."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self.form = console.page.get_by_role("form", name=title, exact=True)

    def press(self, button: str, *, confirm: bool | None = None) -> None:
        """Press the button, and confirm or cancel where it asks for a confirmation."""
        self.form.get_by_role("button", name=button, exact=True).click()
        if confirm is not None:
            dialog = self._console.page.get_by_role("dialog", name=f"{self._title}?", exact=True)
            dialog.get_by_role("button", name=button if confirm else "Cancel", exact=True).click()
            dialog.wait_for(state="hidden")

    def do(self, button: str, done: str, *, confirm: bool | None = None) -> None:
        """Press the button, and wait for the message."""
        self.press(button, confirm=confirm)
        self._console.message(done)

    def code(self, language: str) -> str:
        """The action as it is now, in Python or curl."""
        region = self.form.get_by_role("region", name=f"{language} of: {self._title}", exact=True)
        if not region.is_visible():
            self.form.get_by_text("Python and curl", exact=True).click()
        shown: str = region.inner_text()
        return shown
