"""pyrl's advantages under verl's signature, against verl's own estimators where it has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from verl_host import DataProto, core_algos, door, ray_trainer

from pyrl.methods.choices import ADVANTAGES

UID = np.array(["q2", "q1", "q2", "q1", "q1", "q3", "q3", "pad"], dtype=object)
"""Groups of three, two, two and of one row that verl pads with, mixed up."""
REWARD = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
LENGTH = torch.tensor([3, 5, 1, 2, 4, 5, 2, 0])
MASK = (torch.arange(5) < LENGTH[:, None]).long()


def outcome() -> torch.Tensor:
    """The reward of each row at its last token."""
    rewards = torch.zeros(8, 5)
    rewards[torch.arange(7), LENGTH[:7] - 1] = REWARD[:7]
    return rewards


def computed(estimator: str, rewards: torch.Tensor, uid: Any = UID) -> torch.Tensor:
    """As verl's trainer computes them."""
    data = DataProto.from_dict(
        tensors={"token_level_rewards": rewards, "response_mask": MASK},
        non_tensors={"uid": uid},
    )
    made = ray_trainer.compute_advantage(data, estimator, config={})
    torch.testing.assert_close(made.batch["returns"], made.batch["advantages"])
    advantages: torch.Tensor = made.batch["advantages"]
    return advantages


@pytest.mark.parametrize(
    ("ours", "own"), [("pyrl/grpo", "grpo"), ("pyrl/rloo", "rloo"), ("pyrl/opo", "opo")]
)
def test_estimators_of_groups_of_any_size_are_those_of_verl(ours: str, own: str) -> None:
    expected = computed(own, outcome())
    expected[-1] = 0
    torch.testing.assert_close(computed(ours, outcome()), expected, rtol=1e-5, atol=1e-5)
    assert computed(ours, outcome()).abs().sum() > 1


def test_rows_of_padding_take_no_part_in_statistics_of_the_batch() -> None:
    advantages = computed("pyrl/gpg", outcome())
    # Two of three questions have unequal rewards; with the padding it would be two of four.
    centred = REWARD[:2] - torch.tensor([0.5, 2 / 3])
    torch.testing.assert_close(advantages[:2, 0], centred * 3 / 2)


def test_given_advantages_stay_and_later_stages_go_on_from_them() -> None:
    given = torch.randn(8, 5, generator=torch.Generator().manual_seed(3)) * MASK
    torch.testing.assert_close(computed("pyrl/given", given), given)
    torch.testing.assert_close(computed("pyrl/ear_clip", 5 * given), (5 * given).clamp(-2, 2))
    whitened = computed("pyrl/whiten", given)[MASK.bool()]
    assert float(whitened.mean()) == pytest.approx(0, abs=1e-6)
    assert float(whitened.std()) == pytest.approx(1, abs=1e-5)


def test_every_advantage_is_registered_and_computes_or_names_what_it_lacks() -> None:
    refused = {}
    for name in ADVANTAGES:
        function = core_algos.get_adv_estimator_fn(f"pyrl/{name}")
        arguments = {"token_level_rewards": outcome(), "response_mask": MASK, "index": UID}
        try:
            advantages, _ = function(**arguments, config={}, reward_baselines=None)
        except ValueError as error:
            refused[name] = str(error)
        else:
            assert torch.isfinite(advantages).all()
            assert not advantages[MASK == 0].any()
    trees = {"treerl", "treerl_released", "treepo", "tree_grpo"}
    others = {"mass", "ear", "entropic", "hybrid", "funrl", "empg", "erpo", "progrpo"}
    assert set(refused) == trees | others | {"riskpo", "ares", "ares_kl", "ib_tpo"}
    for name in trees:
        assert "needs the tree" in refused[name]
        assert "pyrl/given" in refused[name]
    assert "needs entropy_N" in refused["ear"]


def test_a_batch_without_questions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pyrl/grpo: expected uid of each row, got none"):
        door.estimate("pyrl/grpo", ADVANTAGES["grpo"](), outcome(), MASK)
