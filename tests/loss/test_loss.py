"""Clip radii: the published numbers, tail by tail."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pyrl.loss import KL, Clip, ConfidenceClip, Loss
from pyrl.loss.aggregate import SeqMeanTokenMean
from pyrl.pack import TokenBatch, offsets


def batch_of(confidences: Sequence[Sequence[float]]) -> TokenBatch:
    """Leaves with a prompt of two tokens and these confidences, the rest being zero."""
    length_N = np.array([len(row) for row in confidences], np.int64)
    tokens, inputs = int(length_N.sum()), int((length_N + 2).sum())
    zeros = np.zeros(tokens, np.float32)
    return TokenBatch(
        input_I=np.zeros(inputs, np.int64),
        label_T=np.zeros(tokens, np.int64),
        old_logprob_T=zeros,
        entropy_T=zeros,
        confidence_T=np.concatenate([np.asarray(row, np.float32) for row in confidences]),
        mask_T=np.ones(tokens, np.bool_),
        advantage_T=np.zeros(tokens),
        input_offset_N1=offsets(length_N + 2),
        token_offset_N1=offsets(length_N),
    )


def of_tails(*tails: float) -> TokenBatch:
    return batch_of([[tail] * 20 for tail in tails])


def test_clip_gives_each_token_its_two_radii() -> None:
    low_T, high_T = Clip(low=0.1, high=0.28)(of_tails(0.3, 0.9))
    assert low_T.dtype == high_T.dtype == np.float64
    assert low_T.tolist() == pytest.approx([0.1] * 40)
    assert high_T.tolist() == pytest.approx([0.28] * 40)


@pytest.mark.parametrize(
    ("centre", "radii"),
    [(1.0, [0.19730, 0.18212, 0.12500]), (0.5, [0.18212, 0.12500, 0.06788])],
)
def test_confidence_clip_has_the_published_radii(centre: float, radii: list[float]) -> None:
    radius_N = ConfidenceClip(centre=centre).radius(of_tails(0.0, 0.5, 1.0))
    assert radius_N.tolist() == pytest.approx(radii, abs=5e-6)


def test_confidence_clip_bounds_all_tokens_of_a_leaf_alike_on_both_sides() -> None:
    batch = batch_of([[0.2] * 3, [0.9] * 18])
    bounds = ConfidenceClip(centre=1.0)
    low_T, high_T = bounds(batch)
    first, second = bounds.radius(batch)
    assert low_T.dtype == np.float64
    assert low_T.tolist() == high_T.tolist()
    assert low_T.tolist() == pytest.approx([first] * 3 + [second] * 18)
    assert first > second


def test_confidence_of_the_sampled_token_is_its_probability() -> None:
    rows = [[0.2] * 3, [0.9] * 18]
    batch = replace(batch_of([[0.5] * 3, [0.5] * 18]), old_logprob_T=np.log(np.concatenate(rows)))
    of_token = ConfidenceClip(centre=1.0, of="token").radius(batch)
    np.testing.assert_allclose(of_token, ConfidenceClip(centre=1.0).radius(batch_of(rows)))


def test_without_a_centre_the_batch_s_median_tail_is_half_way() -> None:
    bounds = ConfidenceClip(minimum=0.1, maximum=0.3)
    assert bounds.radius(of_tails(0.99, 0.2, 0.97))[2] == pytest.approx(0.2)
    assert bounds.radius(of_tails(0.6, 0.8, 0.9, 0.2)).tolist() == pytest.approx(
        ConfidenceClip(minimum=0.1, maximum=0.3, centre=0.7)
        .radius(of_tails(0.6, 0.8, 0.9, 0.2))
        .tolist()
    )


@pytest.mark.parametrize("tail", [1, 3, 4, 16])
def test_the_tail_is_the_last_tokens_or_all_of_a_shorter_response(tail: int) -> None:
    rows = [[0.1, 0.9, 0.5, 0.7], [0.3, 0.2], [1.0] * 10 + [0.4] * 7]
    tails = [float(np.mean(row[-tail:])) for row in rows]
    radius_N = ConfidenceClip(tail=tail, centre=0.5).radius(batch_of(rows))
    assert radius_N.tolist() == pytest.approx(
        [0.05 + 0.15 / (1 + np.exp(-4 * (0.5 - c))) for c in tails], rel=1e-6
    )


def test_a_response_without_tokens_leaves_the_others_alone() -> None:
    rows = [[0.1, 0.9], [], [0.3, 0.2]]
    bounds = ConfidenceClip(centre=0.5)
    assert len(bounds(batch_of(rows))[0]) == 4
    assert bounds.radius(batch_of(rows))[[0, 2]].tolist() == pytest.approx(
        bounds.radius(batch_of([rows[0], rows[2]])).tolist()
    )


def test_losses_are_values() -> None:
    loss = Loss(bounds=ConfidenceClip(centre=1.0), kl=KL(0.1, "k1"), aggregate=SeqMeanTokenMean())
    assert pickle.loads(pickle.dumps(loss)) == loss == replace(Loss(), **vars(loss))
    assert loss != replace(loss, kl=KL(0.1, "k2"))
    assert "ConfidenceClip(minimum=0.05, maximum=0.2" in repr(loss)
