"""Without forks the door's step is the host's own: its loss and its gradient, to rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_trl import EACH, Replays, Samples, arguments, config, trained
from torch import Tensor

from pyrl.advantage import GroupBaseline
from pyrl.algorithm import Algorithm, Sample
from pyrl.loss import KL, Loss
from pyrl.loss.aggregate import SeqMeanTokenMean, SeqMeanTokenSumNorm, TokenMean

LOSSES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo"]


def assert_equal(
    ours: tuple[list[dict[str, float]], list[dict[str, Tensor]]],
    theirs: tuple[list[dict[str, float]], list[dict[str, Tensor]]],
) -> None:
    assert len(ours[1]) == len(theirs[1]) > 0
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert mine.get("reward") == other.get("reward")
    for step, (mine_of, other_of) in enumerate(zip(ours[1], theirs[1], strict=True)):
        # Adam's first step has made the rounding of tiny gradients as large as any.
        atol = 1e-4 if step else 1e-6
        assert mine_of.keys() == other_of.keys()
        largest = max(float(gradient.abs().max()) for gradient in other_of.values())
        assert largest > 1e-4
        for name, gradient in other_of.items():
            torch.testing.assert_close(mine_of[name], gradient, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_flat_groups_give_the_hosts_loss_and_gradient(loss_type: str, tmp_path: Path) -> None:
    halves = {"per_device_train_batch_size": 2 * EACH, "gradient_accumulation_steps": 2}
    more: dict[str, Any] = {"loss_type": loss_type, "num_iterations": 2, "max_steps": 2} | halves
    tree = Samples(**arguments(config(tmp_path, **more)))
    ours = trained(tree)
    host = Replays(**arguments(config(tmp_path, **more)))
    host.noted = tree.noted
    theirs = trained(host)
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("loss_type", "aggregate"),
    [
        ("grpo", SeqMeanTokenMean()),
        ("dapo", TokenMean()),
        ("dr_grpo", SeqMeanTokenSumNorm(length=12)),
    ],
)
def test_the_methods_loss_gives_them_too(loss_type: str, aggregate: Any, tmp_path: Path) -> None:
    method = Algorithm(
        (GroupBaseline(eps=1e-4),),
        Sample(votes=EACH, train=EACH),
        loss=replace(Loss(), kl=KL(coef=0.0), aggregate=aggregate),
    )
    tree = Samples(**arguments(config(tmp_path)), algorithm=method, loss="pyrl")
    ours = trained(tree)
    host = Replays(**arguments(config(tmp_path, loss_type=loss_type)))
    host.noted = tree.noted
    assert_equal(ours, trained(host))
