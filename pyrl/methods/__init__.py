"""Methods by name. A method is its parent with some choices replaced."""

from __future__ import annotations

from collections.abc import Callable

from pyrl.algorithm import Algorithm
from pyrl.methods.echo import echo, echo_paper
from pyrl.methods.ettrl import ettrl
from pyrl.methods.grpo import dr_grpo, grpo, rloo
from pyrl.methods.treerl import treerl
from pyrl.methods.ttrl import ttrl
from pyrl.methods.unique import grpo_unique, ttrl_unique

METHODS: dict[str, Callable[[], Algorithm]] = {
    "ttrl": ttrl,
    "ttrl_unique": ttrl_unique,
    "ettrl": ettrl,
    "echo": echo,
    "echo_paper": echo_paper,
    "treerl": treerl,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "grpo_unique": grpo_unique,
}
