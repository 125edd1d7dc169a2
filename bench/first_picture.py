"""When the console shows something: the first text, and three growing states, after its address was opened.

    .venv/bin/python -m bench.first_picture [TIMES]

Opens the demo (`stepwell console --demo`) in Chromium, without a window and without a cache, several times. Times are
those of the page, in ms; `kB` is what the browser received, compressed. The goal for the first picture is 1 s.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys

from playwright.sync_api import sync_playwright

_COMMAND = [sys.executable, "-m", "stepwell", "console", "--demo", "--no-browser"]
_SIZE = {"width": 1280, "height": 900}
#: Whether each of three strips has a column at its right edge.
_ARE_DRAWN = """(() => {
    const all = [...document.querySelectorAll(".lives canvas")];
    const is_drawn = (canvas) => {
        const [x, y] = [canvas.width - 3, canvas.height >> 1];
        return x > 0 && canvas.getContext("2d").getImageData(x, y, 1, 1).data[3] > 0;
    };
    return all.length === 3 && all.every(is_drawn);
})()"""
_TIMES = """[
    performance.getEntriesByName("first-contentful-paint")[0].startTime,
    performance.now(),
    performance.getEntriesByType("resource").reduce((sum, one) => sum + one.transferSize, 0) / 1000,
]"""


def main(times: int = 9) -> None:
    """Measure, and print medians."""
    with (
        subprocess.Popen(_COMMAND, stdout=subprocess.PIPE, text=True) as demo,
        sync_playwright() as playwright,
    ):
        assert demo.stdout is not None
        url = demo.stdout.readline().strip()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        found = []
        for _ in range(times):
            # the page's policy forbids the expression that waits for the strips
            context = browser.new_context(viewport=_SIZE, bypass_csp=True)
            page = context.new_page()
            page.goto(url, wait_until="commit")
            page.wait_for_function(_ARE_DRAWN, polling="raf")
            found.append(page.evaluate(_TIMES))
            context.close()
        browser.close()
        demo.terminate()
    for name, values in zip(
        ("first text, ms", "three states, ms", "kB"), zip(*found, strict=True), strict=True
    ):
        print(f"{name:18} median {statistics.median(values):6.0f}, largest {max(values):6.0f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
