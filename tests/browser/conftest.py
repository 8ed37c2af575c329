"""Tests of the report in headless Chromium; they run where it is, and playwright with it.

CHROMIUM names the program where it is not called chromium.
"""

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = shutil.which(os.environ.get("CHROMIUM", "chromium"))

if CHROMIUM is None or find_spec("playwright") is None:
    collect_ignore_glob = ["test_*.py"]
else:

    @pytest.fixture(scope="session")
    def browser() -> "Iterator[Browser]":
        """One browser for all tests."""
        from playwright.sync_api import sync_playwright

        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", "--force-device-scale-factor=1"]
            )
            yield browser
            browser.close()
