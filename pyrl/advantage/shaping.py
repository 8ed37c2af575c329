"""Shaping: stages that change advantages by how sure the policy was of a response or its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pyrl.advantage import Floats, known_groups, known_tokens, share_of
from pyrl.checks import at_least, finite, shares
from pyrl.leaves import Scored


@dataclass(frozen=True)
class EntropyBonus:
    """FunRL: A + min(coef H, |A| / kappa), H the mean token entropy of the leaf (arXiv:2508.05118).

    The bound keeps the sign of an advantage. The paper says that a clip does so and prints neither
    the clip nor its numbers: both are those of a known kin (arXiv:2506.14758).
    """

    coef: float = 0.4
    """Bonus for each nat of entropy; 0: none."""
    kappa: float = 2.0
    """The bonus is at most |A| / kappa; above 1 no advantage changes its sign."""
    until: str = ""
    """Only the tokens up to this text count for H, such as </think>; empty: all of them."""

    def __post_init__(self) -> None:
        finite(self, "coef")
        at_least(0, self, "coef")
        if not self.kappa > 1:
            raise ValueError(f"EntropyBonus.kappa: expected a number above 1, got {self.kappa}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("advantage_T", *(("entropy_T", "texts") if self.until else ("entropy_N",)))

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        bonus_T = np.minimum(self._wish_T(scored), np.abs(advantage_T) / self.kappa)
        return np.where(known_tokens(scored), advantage_T + bonus_T, 0.0)

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        known_T = known_tokens(scored)
        wish, most = self._wish_T(scored)[known_T], np.abs(advantage_T[known_T]) / self.kappa
        return {
            "advantage/bonus": float(np.minimum(wish, most).mean()) if wish.size else 0.0,
            "advantage/bonus_bounded": share_of(wish > most),
        }

    def _wish_T(self, scored: Scored) -> Floats:
        """The bonus of each token before its bound."""
        if not self.until:
            return self.coef * scored.entropy_N[scored.leaf_T]
        thought_T = (scored.texts.steps(self.until) == 0).astype(np.float64)
        leaves = len(scored.reward_N)
        total_N = np.bincount(scored.leaf_T, thought_T * scored.entropy_T, minlength=leaves)
        count_N = np.bincount(scored.leaf_T, thought_T, minlength=leaves)
        mean_N: Floats = total_N / np.maximum(count_N, 1)
        return self.coef * mean_N[scored.leaf_T]


@dataclass(frozen=True)
class StepModulation:
    """EMPG: A g + bonus f of the next step, less the mean over the steps (arXiv:2509.09265).

    A step is the text up to a separator, and H its mean token entropy, scaled to [0, 1] over the
    steps of the batch. g = exp(-sharpness H) over its mean: sure steps learn more. f =
    exp(-clarity H) of the step that follows in the same response, if there is one.
    """

    sharpness: float = 1.0
    """How much faster sure steps learn; 0: all alike."""
    clarity: float = 1.0
    """How much more a step is worth that leads to a sure one."""
    bonus: float = 0.1
    """Weight of the step that follows; 0: none."""
    separator: str = "\n\n"
    """Text that ends a step."""
    centre: bool = True
    """Subtract the mean over the steps, as in the source."""
    needs = ("advantage_T", "entropy_T", "texts")

    def __post_init__(self) -> None:
        finite(self, "sharpness", "clarity", "bonus")
        if not self.separator:
            raise ValueError("StepModulation.separator: expected a text, got an empty one")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        result_T = np.zeros_like(advantage_T)
        known_T = known_tokens(scored)
        if not known_T.any():
            return result_T
        step, factor_S, bonus_S = self._steps(scored, known_T)
        shaped = advantage_T[known_T] * factor_S[step] + bonus_S[step]
        if self.centre:
            shaped -= (np.bincount(step, shaped) / np.bincount(step)).mean()
        result_T[known_T] = shaped
        return result_T

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        known_T = known_tokens(scored)
        if not known_T.any():
            return {"advantage/steps": 0.0, "advantage/step_shift": 0.0}
        step, _, _ = self._steps(scored, known_T)
        change_T = np.abs(self(scored, advantage_T) - advantage_T)
        leaves = int((~np.isnan(scored.reward_N)).sum())
        return {
            "advantage/steps": int(step[-1] + 1) / leaves,
            "advantage/step_shift": float(change_T[known_T].mean()),
        }

    def _steps(
        self, scored: Scored, known_T: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], Floats, Floats]:
        """The step of each known token, and the factor g and the bonus of each step."""
        leaf = scored.leaf_T[known_T]
        step_of = scored.texts.steps(self.separator)[known_T]
        first = np.append(True, (np.diff(leaf) != 0) | (np.diff(step_of) != 0))
        step = np.cumsum(first) - 1
        entropy_S = np.bincount(step, scored.entropy_T[known_T]) / np.bincount(step)
        unit_S = (entropy_S - entropy_S.min()) / (np.ptp(entropy_S) + 1e-8)
        factor_S = np.exp(-self.sharpness * unit_S)
        leaf_S = leaf[first]
        follows_S = np.append(leaf_S[1:] == leaf_S[:-1], False)
        clear_S = np.exp(-self.clarity * np.append(unit_S[1:], 0.0))
        return step, factor_S / factor_S.mean(), np.where(follows_S, self.bonus * clear_S, 0.0)


@dataclass(frozen=True)
class GatedTokens:
    """ERPO, experimental: A + coef standardised(W sign(A) s) (arXiv:2603.28204).

    Known of the source is the gate W = sigmoid(gamma z), z the token's entropy standardised over
    the prompt, and that token signals are normalised in buckets of progress and anchored to the
    sign of the outcome. Inferred is the rest: s = old - reference log-prob, standardised over the
    tokens of the prompt that are equally far on in their responses; the sum; all three numbers.
    """

    coef: float = 0.5
    """Weight of the token signal; 0: none. Not from the source."""
    gamma: float = 1.0
    """Steepness of the gate. Not from the source."""
    buckets: int = 10
    """Parts of a response, by share of its length. Not from the source."""
    eps: float = 1e-6
    """Added to deviations."""
    needs = ("advantage_T", "entropy_T", "old_logprob_T", "ref_logprob_T")

    def __post_init__(self) -> None:
        finite(self, "coef", "gamma", "eps")
        at_least(1, self, "buckets")
        at_least(0, self, "eps")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        signal_T = self._signal_T(scored, advantage_T)
        return np.where(known_tokens(scored), advantage_T + self.coef * signal_T, 0.0)

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        signal = self._signal_T(scored, advantage_T)[known_tokens(scored)]
        return {"advantage/gated": float(np.abs(signal).mean()) if signal.size else 0.0}

    def _signal_T(self, scored: Scored, advantage_T: Floats) -> Floats:
        token_T = scored.old_logprob_T - scored.ref_logprob_T
        start_N = np.cumsum(scored.length_N) - scored.length_N
        place_T = np.arange(len(scored.leaf_T)) - start_N[scored.leaf_T]
        bucket_T = self.buckets * place_T // scored.length_N[scored.leaf_T]
        signal_T = np.zeros_like(advantage_T)
        for known in known_groups(scored):
            at = np.flatnonzero(np.isin(scored.leaf_T, known))
            deviating = self._standardised(scored.entropy_T[at].astype(np.float64))
            inside = np.empty(at.size)
            for bucket in np.unique(bucket_T[at]):
                chosen = bucket_T[at] == bucket
                inside[chosen] = self._standardised(token_T[at[chosen]])
            gate = 1 / (1 + np.exp(-self.gamma * deviating))
            signal_T[at] = self._standardised(gate * np.sign(advantage_T[at]) * inside)
        return signal_T

    def _standardised(self, value: Floats) -> Floats:
        return np.asarray((value - value.mean()) / (value.std() + self.eps))


@dataclass(frozen=True)
class ConfidenceReweight:
    """ProGRPO: A + alpha (c(q) - c(o)), so that rare right answers gain most (arXiv:2602.05281).

    c(o) = exp of the mean log-prob of the least probable tokens of a response, c(q) = exp of the
    mean log-prob of the prompt's tokens, both of the policy that sampled. Prompts without a right
    leaf (a reward above 0) keep their advantages.
    """

    alpha: float = 0.3
    """Weight of the confidences; 0: none. The source does not print its own."""
    share: float = 0.2
    """Share of a response's tokens that c(o) is of: the least probable ones."""
    solved: bool = False
    """Also change prompts of which all leaves are right. Of two accounts of the paper one does."""
    needs = ("advantage_T", "logprob_T", "prompt_logprob_T")

    def __post_init__(self) -> None:
        finite(self, "alpha")
        shares(self, "share")

    def __call__(self, scored: Scored, advantage_T: Floats) -> Floats:
        shift_N = self._shift_N(scored)
        return np.where(
            known_tokens(scored), advantage_T + self.alpha * shift_N[scored.leaf_T], 0.0
        )

    def metrics(self, scored: Scored, advantage_T: Floats) -> dict[str, float]:
        shift = self._shift_N(scored)
        changed = shift[shift != 0]
        return {
            "advantage/confidence_shift": float(np.abs(changed).mean()) if changed.size else 0.0,
            "advantage/confidence_leaves": share_of(shift != 0),
        }

    def _shift_N(self, scored: Scored) -> Floats:
        """c(q) - c(o) of the leaves that change."""
        shift_N, prompt_T = np.zeros(len(scored.reward_N)), scored.prompt_logprob_T
        stop_N = np.cumsum(scored.length_N)
        for known in known_groups(scored):
            right = scored.reward_N[known] > 0
            if not right.any() or (right.all() and not self.solved):
                continue
            for leaf in known.tolist():
                own_T = scored.logprob_T[stop_N[leaf] - scored.length_N[leaf] : stop_N[leaf]]
                count = int(np.ceil(self.share * own_T.size - 1e-9))
                low = np.sort(own_T.astype(np.float64))[: max(1, count)]
                shift_N[leaf] = np.exp(prompt_T[stop_N[leaf] - 1]) - np.exp(low.mean())
        return shift_N
