"""What the console's drawings cost the browser in a frame: script, style, layout and drawing.

    .venv/bin/python -m bench.console [UNITS [REVISIONS [FRAMES]]]

A page of Chromium, without a window, shows the state of a session with 256 units by 2,000 revisions: the strip and the
traces of five units. In each frame one thing changes: there is a new revision, as text from the server; the cursor
moves; or all units get another order. The figures are processor time of the page's thread, from Chromium's trace, so
that other work on the machine does not count. Of the thread's tasks, the longest ones, one for each frame, count as its
frames. The goal is 16 ms.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

_CONSOLE = Path(__file__).resolve().parent.parent / "console"
_SIZE = {"width": 1280, "height": 900}
_TASK = "ThreadControllerImpl::RunTask"


def _build(folder: Path) -> None:
    """Bundle the page, with the packages that `make console` installed."""
    program = _CONSOLE / "node_modules" / ".bin" / "esbuild"
    options = ["--bundle", "--minify", "--jsx=automatic", "--jsx-import-source=preact", "--log-level=warning"]
    subprocess.run(
        [program, "test/strip_bench.tsx", *options, f"--outdir={folder}"], cwd=_CONSOLE, check=True
    )


def _tasks_ms(trace: bytes) -> list[float]:
    """Processor times of the tasks of the page's main thread, the longest first."""
    events: list[dict[str, Any]] = json.loads(trace)["traceEvents"]
    names = {
        (one["pid"], one["tid"]): one["args"]["name"] for one in events if one.get("name") == "thread_name"
    }
    tasks = defaultdict[tuple[int, int], list[float]](list)
    for one in events:
        thread = one["pid"], one["tid"]
        if one.get("name") == _TASK and "tdur" in one and names.get(thread) == "CrRendererMain":
            tasks[thread].append(one["tdur"] / 1000)
    # Chromium keeps a spare page, which does nothing.
    return sorted(max(tasks.values(), key=sum), reverse=True)


def main(units: int = 256, revisions: int = 2000, frames: int = 600) -> None:
    """Measure, and print a table."""
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        _build(folder)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport=_SIZE)
        page.set_content("<!doctype html><main><div id='app'></div></main>")
        page.add_style_tag(path=folder / "strip_bench.css")
        page.add_script_tag(path=folder / "strip_bench.js")
        page.evaluate("(sizes) => prepare(...sizes)", [units, revisions, frames])
        print(f"{units} units by {revisions} revisions, Chromium {browser.version}, {frames} frames each\n")
        print("| what changes in each frame | median, ms | p99, ms | greatest, ms | mean of all work, ms |")
        print("| --- | --- | --- | --- | --- |")
        for case in page.evaluate("names"):
            browser.start_tracing(page=page, categories=["toplevel"])
            page.evaluate("([name, count]) => measure(name, count)", [case, frames])
            tasks = _tasks_ms(browser.stop_tracing())
            longest = tasks[:frames]
            figures = (
                longest[len(longest) // 2],
                longest[len(longest) // 100],
                longest[0],
                sum(tasks) / frames,
            )
            print(f"| {case} | " + " | ".join(f"{one:.1f}" for one in figures) + " |")
        browser.close()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
