"""Terms of a mini-batch: the core's random numbers, and the same bits for any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policy_fixture import COLUMNS

from pyrl import _core
from pyrl.loss import LossState
from pyrl.loss.philox import uniforms
from pyrl.loss.presets import PRESETS
from pyrl.loss.terms import loss_terms


def test_random_numbers_are_the_cores() -> None:
    position_T = torch.cat([torch.arange(100), torch.tensor([2**33 + 1, 2**62])])
    for seed in (0, 7, (3 << 32) + 9, 2**64 - 1):
        expected = _core.logits.uniforms(np.full(102, seed, np.uint64), position_T.numpy())
        assert uniforms(seed, position_T).tolist() == expected.tolist()


@pytest.mark.parametrize("name", PRESETS)
def test_terms_do_not_depend_on_the_number_of_threads(name: str) -> None:
    generator = torch.Generator().manual_seed(5)
    tokens, threads = 200_003, torch.get_num_threads()
    columns = {k: torch.rand(tokens, generator=generator).double() for k in COLUMNS}
    columns |= {k: -v for k, v in columns.items() if "logprob" in k}
    columns["advantage_T"] -= 0.5
    columns["reward_T"] = columns["reward_T"].round() * 2 - 1
    found = []
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            terms = loss_terms(
                PRESETS[name](),
                columns,
                mask_T=columns["sum_p2_T"] < 0.9,
                offset_N1=torch.tensor([0, 70_000, tokens]),
                group_N=torch.tensor([0, 0]),
                state=LossState(entropy=0.3, mean_entropy=0.3, nucleus_entropy=2.0),
            )
        finally:
            torch.set_num_threads(threads)
        found.append([v for v in vars(terms).values() if v is not None])
    for one, two in zip(*found, strict=True):
        assert one.equal(two)
