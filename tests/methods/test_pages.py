"""What `pyrl methods` says of methods and choices, and docs/methods.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rich.console import Console

from pyrl.methods.about import about, known, named
from pyrl.methods.pages import listing, markdown, page
from pyrl.methods.registry import KINDS, Registry

REGISTRY = Registry()
PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def printed(renderable: object) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_the_page_of_the_documentation_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == markdown(REGISTRY), "run python tests/tabulate_methods.py"


def test_every_name_is_in_the_list_once_below_its_parent() -> None:
    for kind in KINDS:
        rows = [(entry.name, found) for entry, found, _ in known(REGISTRY, kind)]
        seen = [""]
        for name, found in rows:
            assert found is not None
            assert found.parent in seen
            assert found.first
            seen.append(name)
        assert sorted(seen[1:]) == sorted(REGISTRY.names(kind))
    assert max(map(len, printed(listing(REGISTRY)).splitlines())) <= 100


@pytest.mark.parametrize(
    ("kind", "name", "parent", "paper"),
    [
        ("method", "echo_paper", "echo", "2602.02150"),
        ("method", "rloo", "grpo", "2402.14740"),
        ("method", "ttrl", "", "2504.16084"),
        ("loss", "ppo", "", "1707.06347"),
        ("loss", "steer", "dapo", "2510.10150"),
        ("loss", "tis", "ppo", ""),
        ("advantage", "treepo", "", "2508.17445"),
        ("fork", "ep_tree", "top_entropy", "2506.11902"),
        ("vote", "inverse_width", "", ""),
    ],
)
def test_papers_and_parents_come_from_the_code(
    kind: str, name: str, parent: str, paper: str
) -> None:
    found = about(REGISTRY.find(kind, name), REGISTRY)
    assert (found.parent, found.paper) == (parent, paper)
    assert "arXiv" not in found.text


def test_one_name_is_shown_with_its_difference_its_options_and_what_it_needs() -> None:
    grpo = printed(page(named("grpo", REGISTRY)[0]))
    assert "needs      1 update a step (--updates-per-step)" in grpo
    assert "true answers in the data (--answer-column)" in grpo
    assert [found.entry.kind.name for found in named("grpo", REGISTRY)] == ["method", "advantage"]
    calibrl = printed(page(named("calibrl", REGISTRY)[1]))  # the loss; [0] is the method
    for line in (
        "choose by  pyrl train METHOD --loss calibrl",
        "penalties   none  (ExpertLeak)",
        "columns: advantage_T, expert_logprob_T, old_logprob_T, reward_T",
        "a pass of the learner over the samples (--old-logprobs auto or learner)",
        "a column 'expert' of the data with an expert's responses",
        "2 or more updates a step for loss.bounds and loss.dual to act",
        "--loss.penalties.expert-leak.slope      0.5",
    ):
        assert line in calibrl
    echo = printed(page(named("echo", REGISTRY)[0]))
    assert "the first model in memory, for the distance from it" in echo
    assert "2 or more updates" not in echo  # it has 8
    with pytest.raises(ValueError, match="no method or choice 'gsp'; the nearest is 'gspo'"):
        named("gsp", REGISTRY)


def test_every_option_of_a_name_says_what_it_is() -> None:
    told = [
        (found.entry.name, option, meaning)
        for kind in KINDS
        for _, found, _ in known(REGISTRY, kind)
        if found is not None
        for option, _, meaning in found.options
    ]
    assert len({option for _, option, _ in told}) > 150
    assert [row for row in told if not row[2].endswith(".")] == []


def test_no_text_has_brackets_that_its_source_has_left_empty() -> None:
    texts = [found.text for kind in KINDS for _, found, _ in known(REGISTRY, kind) if found]
    assert [
        text for text in texts if re.search(r"(?<!\w)\(\)|\([;,]|[,;]\s*\)|\bof \.", text)
    ] == []
