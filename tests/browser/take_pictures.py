"""The pictures of README: `python tests/browser/take_pictures.py REPORT.html FOLDER`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZE = {"width": 1240, "height": 940}


def take(page_path: Path, folder: Path) -> None:
    """The head of the page and its first curves, and the tree that it shows first."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(page_path.resolve().as_uri())
        page.wait_for_selector(".row")
        page.screenshot(path=folder / "report.png", clip={"x": 0, "y": 0, **SIZE, "height": 760})
        page.locator(".viewer").scroll_into_view_if_needed()
        page.locator("#trees .choose").evaluate("node => node.scrollIntoView()")
        page.evaluate("scrollBy(0, -50)")
        page.locator(".segmented label", has_text="advantage").click()
        page.screenshot(path=folder / "tree.png", clip={"x": 0, "y": 44, **SIZE, "height": 860})
        browser.close()


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
