"""The report as a reader sees it: charts, trees, keyboard, small screens, and no word too many."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page
from saved_runs import write_run, write_trees

from pyrl.report.page import write_page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
WORDS = [" the", " sum", " of", "\n", " 12", " + 3", " so", HOSTILE, " é", " 数学", "x", "\u202e"]
LARGE, SMALL = (1400, 1000), (390, 844)


@pytest.fixture(scope="session")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 steps with hostile texts, alarms, small trees and one of 10,000 tokens."""
    run = write_run(
        tmp_path_factory.mktemp("runs") / "long",
        2000,
        text=HOSTILE,
        alarms=[(12, f"Step 12: the mean reward has fallen. {HOSTILE}"), (700, "Step 700: more.")],
    )
    for step in (1, 1000, 1999):
        write_trees(run, step, WORDS, trunks=3, leaves=3, length=24)
    write_trees(run, 2000, WORDS, trunks=8, leaves=8, length=300)
    return run


@pytest.fixture(scope="session")
def long_page(long_run: Path) -> Path:
    return write_page([long_run])


@contextmanager
def opened(
    browser: Browser, path: Path, size: tuple[int, int] = LARGE, scheme: Any = "light"
) -> Iterator[Page]:
    """The page, which must neither say nor ask for anything. SHOTS: a folder for its pictures."""
    width, height = size
    with browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme
    ) as context:
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.on("request", lambda request: said.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("section#settings")
        yield page
        assert said == [path.as_uri()]
        if shots := os.environ.get("SHOTS"):
            name = f"{path.parent.name}-{width}-{scheme}-{len(list(Path(shots).iterdir()))}.png"
            page.screenshot(path=Path(shots) / name)


def choose(page: Page, step: int) -> None:
    """Show the tree of a step."""
    select = page.locator("#trees .choose select")
    label = page.locator("#trees .choose option", has_text=f"step {step} ·").first
    select.select_option(value=label.get_attribute("value"))
    page.locator("#trees").scroll_into_view_if_needed()


def test_the_report_of_a_long_run_opens_in_less_than_two_seconds(
    browser: Browser, long_page: Path
) -> None:
    assert long_page.stat().st_size < 5e6
    with opened(browser, long_page) as page:
        page.wait_for_selector(".row")
        assert page.evaluate("performance.now()") < 2000
        assert page.locator("figure svg").count() >= 15
        assert page.locator("#head").inner_text().startswith("echo on demo, demo:train")
        assert "finished, 2000 steps" in page.locator("#head").inner_text()
        assert "2, the first at step 12" in page.locator("#glance").inner_text()
        assert f"the mean reward has fallen. {HOSTILE}" in page.locator("#alarms").inner_text()


def test_a_curve_tells_its_numbers_to_the_mouse_and_to_the_keyboard(
    browser: Browser, long_page: Path
) -> None:
    with opened(browser, long_page) as page:
        plot = page.locator("figure", has_text="entropy (nats)").first.locator("svg")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        assert box
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
        tip = page.locator("#tip")
        middle = tip.inner_text()
        assert 900 < int(middle.split()[1]) < 1100
        assert " to " in middle  # a point stands for seven steps
        assert page.locator("line.cross[visibility=visible]").count() > 10
        page.mouse.move(0, 0)
        assert not tip.is_visible()
        plot.focus()
        page.keyboard.press("End")
        assert tip.inner_text().startswith("step 2000")
        page.keyboard.press("ArrowLeft")
        assert tip.inner_text().startswith("step 199")
        page.keyboard.press("Escape")
        assert not tip.is_visible()
        assert "Arrow keys" in str(plot.get_attribute("aria-label"))
        key = page.locator(".legend button", has_text="labels right").first
        lines = key.locator("xpath=ancestor::figure").locator("svg path[stroke]")
        before = lines.count()
        key.click()
        assert lines.count() < before


def test_ten_thousand_tokens_scroll_with_few_of_them_in_the_page(
    browser: Browser, long_page: Path
) -> None:
    with opened(browser, long_page) as page:
        choose(page, 2000)
        assert "10,808" in page.locator(".tree-facts").inner_text()
        found = page.evaluate(
            """async () => {
              const list = document.querySelector('.list'), seen = new Set();
              let most = 0, slowest = [];
              for (let n = 0; n < 60; n++) {
                const began = performance.now();
                list.scrollTop = n * list.scrollHeight / 60;
                await new Promise(requestAnimationFrame);
                await new Promise(requestAnimationFrame);
                slowest.push(performance.now() - began);
                const tokens = [...document.querySelectorAll('.t')];
                most = Math.max(most, tokens.length);
                tokens.forEach((t) => seen.add(t.dataset.u));
              }
              slowest.sort((a, b) => a - b);
              return {most, seen: seen.size, median: slowest[30]};
            }"""
        )
        assert found["most"] < 1500
        assert found["seen"] > 5000
        assert found["median"] < 100  # two frames, on a machine with other work


def test_a_tree_is_read_by_keyboard(browser: Browser, long_page: Path) -> None:
    with opened(browser, long_page) as page:
        choose(page, 1000)
        tree = page.get_by_role("tree")
        tree.focus()
        page.keyboard.press("Home")
        rows = page.locator(".row.first")
        all_rows = rows.count()
        page.keyboard.press("ArrowLeft")  # closes the first trunk
        assert rows.count() < all_rows
        first = page.get_by_role("treeitem").first
        assert first.get_attribute("aria-expanded") == "false"
        assert "4 ends" in first.inner_text()
        page.keyboard.press("ArrowRight")
        assert rows.count() == all_rows
        page.keyboard.press("ArrowRight")  # into its first child
        selected = page.locator(".row.selected.first")
        assert selected.get_attribute("aria-level") == "2"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowLeft")  # a leaf has nothing to close: up to its parent
        assert selected.get_attribute("aria-level") == "1"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        page.wait_for_function("document.querySelector('.toast').textContent === 'copied'")
        copied = page.evaluate("navigator.clipboard.readText()")
        shown = page.locator(".path pre").evaluate("node => node.textContent")
        assert copied.replace("\u202e", "·") == shown
        assert len(copied) > 24
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.type") == "search"
        page.keyboard.type("therefore nothing")
        assert "0 found" in page.locator(".found").inner_text()
        page.keyboard.press("Escape")
        assert page.locator(".found").inner_text() == ""
        page.keyboard.press("/")
        page.keyboard.type("SUM")
        said = page.locator(".found").inner_text()
        assert said.startswith("1 of ")
        assert page.locator(".t.now").inner_text() == " sum"
        page.keyboard.press("Enter")
        assert page.locator(".found").inner_text() == said.replace("1 of", "2 of", 1)
        page.get_by_role("button", name="later tree").click()  # the search goes on in it
        assert page.locator(".t.now").inner_text() == " sum"
        page.get_by_role("button", name="collapse all").click()
        page.get_by_role("button", name="expand all").click()


def test_forks_prunes_votes_and_colours_are_shown(browser: Browser, long_page: Path) -> None:
    with opened(browser, long_page, scheme="dark") as page:
        choose(page, 1000)
        text = page.locator(".rows").inner_text()
        assert text.count("× low confidence") == 3
        assert "● 2" in text
        assert "○ 3" in text
        assert "◇ no answer" in text
        assert "reward 1" in text
        facts = page.locator(".tree-facts").inner_text()
        for fact in ("label 2", "true answer 2", "share 34%", "leaves 9", "pruned 3", "forks 3"):
            assert fact in facts
        token = page.locator(".t").nth(3)
        colors = {}
        for measure in ("entropy", "confidence", "advantage", "log-prob ratio"):
            page.locator(".segmented label", has_text=measure).click()
            colors[measure] = [
                row.evaluate("node => node.style.backgroundColor")
                for row in page.locator(".row.first .t").all()[:40]
            ]
            assert measure in page.locator(".legend-row").inner_text()
        assert len({json.dumps(color) for color in colors.values()}) == 4
        token.hover()
        tip = page.locator("#tip").inner_text()
        for fact in ("probability", "entropy", "confidence", "advantage", "log-prob ratio", "id "):
            assert fact in tip
        # The map chooses what is clicked in it.
        before = page.locator(".path").inner_text()
        box = page.locator("canvas.map").bounding_box()
        assert box
        page.mouse.click(box["x"] + box["width"] - 30, box["y"] + box["height"] - 8)
        assert page.locator(".path").inner_text() != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_small_screen(
    browser: Browser, long_page: Path, scheme: str
) -> None:
    with opened(browser, long_page, SMALL, scheme) as page:
        choose(page, 1000)
        page.wait_for_selector(".row")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= SMALL[0]
        wide = page.evaluate(
            """() => [...document.querySelectorAll('main > section > *')]
              .filter((node) => node.getBoundingClientRect().right > innerWidth + 1)
              .map((node) => node.className)"""
        )
        assert wide == []
        page.locator(".row").nth(2).click()
        assert page.locator(".path pre").is_visible()


def test_questions_are_found_and_read(browser: Browser, long_page: Path) -> None:
    with opened(browser, long_page) as page:
        section = page.locator("#questions")
        section.scroll_into_view_if_needed()
        assert "50 of" in section.inner_text()
        assert "true answer" in section.locator("thead").inner_text()
        section.get_by_role("button", name="show the response").first.click()
        assert HOSTILE in section.locator("tr.more").first.inner_text()
        section.get_by_role("searchbox").fill("no such text")
        assert "0 of 0" in section.inner_text()
        section.get_by_role("searchbox").fill("")
        section.get_by_role("button", name="tree").first.click()
        assert page.locator(".choose select option:checked").inner_text().startswith("step ")
        metric = page.locator("#metrics select")
        metric.select_option("vote/icc")
        assert "intraclass correlation" in page.locator("#metrics").inner_text()


def test_runs_are_side_by_side_and_say_what_they_lack(browser: Browser, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 30) for name in ("first", "second")]
    (runs[1] / "report.json").unlink()
    (runs[1] / "alarms.jsonl").unlink()
    (runs[1] / "completions.jsonl").unlink()
    settings = (runs[1] / "run.yaml").read_text().replace("max_width: 4", "max_width: 3")
    (runs[1] / "run.yaml").write_text(settings.replace("steps: 30", "steps: 60"))
    page_path = write_page(runs, tmp_path / "both" / "report.html")
    with opened(browser, page_path) as page:
        text = page.locator("main").inner_text()
        assert "2 runs side by side" in page.locator("#head").inner_text()
        assert "step 30 of 60: not finished" in text
        assert "--save-trees 2" in page.locator("#trees").inner_text()
        assert "has no alarms.jsonl" in page.locator("#alarms").inner_text()
        differs = page.locator("#settings .card").first.inner_text()
        assert "fork.max_width" in differs
        assert "seed" not in differs
        assert page.locator(".legend button", has_text="second: reward").count() >= 1
