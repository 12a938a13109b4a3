"""A picture of the page of `dparallel serve`, for the docs: teacher and student side by side on one problem.

    python tools/screenshot.py docs/page.png [--dark] [--model NAME ...]

Starts a server of its own, and needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1200


@contextmanager
def server(models: list[str]) -> Iterator[str]:
    """The address of a server of these models."""
    command = [sys.executable, "-m", "dparallel", "serve", "--port", "0"]
    command += [part for model in models for part in ("--model", model)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if match := re.search(r"running on (http://\S+)", line):
                    yield match[1]
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            process.terminate()


@contextmanager
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"expected one of {', '.join(BROWSERS)} on the path")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=browser)
        yield running
        running.close()


def take(browser: Any, url: str, out: Path, dark: bool = False) -> None:
    """The page with its first sample answered."""
    page = browser.new_page(
        viewport={"width": WIDTH, "height": 800}, color_scheme="dark" if dark else "light"
    )
    page.goto(url)
    page.get_by_label("Pace").select_option("as it comes")
    for _ in range(2):  # the first answers of a server take longer than those that follow
        page.get_by_role("button", name="Decode").click()
        page.get_by_role("status").get_by_text("tokens in").wait_for()
    page.get_by_label("Pace").select_option("3 passes a second")
    page.get_by_role("listbox").first.get_by_role("option").nth(4).hover()
    out.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=out, full_page=True)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--dark", action="store_true", help="as in dark mode")
    parser.add_argument("--model", nargs="+", default=["builtin:teacher", "builtin:student"])
    options = parser.parse_args()
    with server(options.model) as url, chromium() as browser:
        take(browser, url, options.out, options.dark)


if __name__ == "__main__":
    main()
