"""Select: which of the leaves that voted also train.

Once rewards are known a selection may refuse questions, and once advantages are, tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pyrl.answers import extractor_named
from pyrl.checks import at_least, described
from pyrl.leaves import Leaves, Scored


class Select(Protocol):
    """Picks the leaves that get advantages and train.

    It may name what it reads of `Scored` in `needs`. One that remembers something from step to step
    has a method `initial`: see `pyrl.run.states`.
    """

    def __call__(self, leaves: Leaves, train: int) -> NDArray[np.int64]:
        """Ordinals of at most `train` leaves of each group, ascending."""


@runtime_checkable
class SelectAfter(Select, Protocol):
    """A selection that also picks tokens, or leaves with all of their tokens, after the advantages.

    A token that it drops takes no part in the loss: not in its sum, its penalties, its statistics
    and its denominators, nor in the mean entropy that later steps know. A response without a token
    left is none of those that a mean runs over.
    """

    def after(self, scored: Scored, advantage_T: NDArray[np.float64]) -> NDArray[np.bool_]:
        """True [T] for the tokens that train."""


@runtime_checkable
class SelectQuestions(Select, Protocol):
    """A selection that refuses questions once their rewards are known.

    Others are sampled in their place, until as many train as a step has, or `rounds` times.
    """

    @property
    def rounds(self) -> int:
        """Times that others are sampled in a step, at most; 0: no question is refused."""

    def trains(self, reward_N: NDArray[np.float64]) -> bool:
        """Whether a question trains whose leaves have these rewards (NaN: unknown)."""


@runtime_checkable
class SelectRewarded(Select, Protocol):
    """A selection among the leaves by their rewards, which it then picks by this method alone."""

    def rewarded(
        self, leaves: Leaves, reward_N: NDArray[np.float64], train: int
    ) -> NDArray[np.int64]:
        """Ordinals of at most `train` leaves of each group, ascending; NaN is unknown."""


def rounds(select: Select) -> int:
    """How often other questions may be sampled in a step; 0: the selection refuses none."""
    return select.rounds if isinstance(select, SelectQuestions) else 0


def accepted(select: Select, leaves: Leaves, reward_N: NDArray[np.float64]) -> NDArray[np.bool_]:
    """The questions [G] that train, as far as the selection judges questions."""
    if not rounds(select):
        return np.ones(leaves.groups, bool)
    assert isinstance(select, SelectQuestions)
    groups = range(leaves.groups)
    return np.array([select.trains(reward_N[leaves.group_N == group]) for group in groups])


def of_accepted(
    select: Select,
    leaves: Leaves,
    kept_N: NDArray[np.int64],
    accepted_G: NDArray[np.bool_],
    wanted: int,
) -> tuple[NDArray[np.int64], dict[str, float]]:
    """Of these leaves those of the first `wanted` accepted questions, and what the others cost.

    Where no question is accepted, all stay: none of them has a gradient.
    """
    if not rounds(select):
        return kept_N, {}
    train_G = accepted_G & (np.cumsum(accepted_G) <= wanted)
    idle_N = ~train_G[leaves.group_N]
    metrics = {
        "select/questions": float(len(accepted_G)),
        "select/refused": float(1 - accepted_G.mean()),
        "select/idle_tokens": float(leaves.length_N[idle_N].sum() / leaves.length_N.sum()),
    }
    return (kept_N[~idle_N[kept_N]] if accepted_G.any() else kept_N), metrics


def selected(
    select: Select,
    leaves: Leaves,
    train: int,
    state: Any = None,
    reward_N: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """Ordinals of the leaves that get advantages; `state` is what the selection remembers.

    `reward_N`: None where rewards come after the selection. ValueError if it gives something else,
    or picks by rewards and there are none yet.
    """
    leaves = replace(leaves, state=state)
    if not isinstance(select, SelectRewarded):
        kept_N = select(leaves, train)
    elif reward_N is None:
        raise ValueError(
            f"select: {type(select).__name__}: expected the rewards of all leaves before the "
            f"selection, this host gives them after it; pyrl train has them"
        )
    else:
        kept_N = select.rewarded(leaves, reward_N, train)
    size = len(leaves.leaf_N)
    good = isinstance(kept_N, np.ndarray) and kept_N.ndim == 1 and kept_N.dtype.kind in "iu"
    if not good or (np.diff(kept_N, prepend=-1, append=size) <= 0).any():
        raise ValueError(
            f"select: {type(select).__name__}: expected ascending ordinals of {size} leaves, "
            f"got {described(kept_N)}"
        )
    return kept_N


def lift(
    select: Select, reward_N: NDArray[np.float64], kept_N: NDArray[np.int64]
) -> dict[str, float]:
    """What a selection by rewards did: the mean known reward of its leaves less that of all."""
    known_N = kept_N[~np.isnan(reward_N[kept_N])]
    if not isinstance(select, SelectRewarded) or not known_N.size:
        return {}
    return {"select/reward_lift": float(reward_N[known_N].mean() - np.nanmean(reward_N))}


def tokens_that_train(
    select: Select, scored: Scored, advantage_T: NDArray[np.float64], state: Any = None
) -> tuple[NDArray[np.bool_], dict[str, float]]:
    """The tokens [T] that train, which forced ones never do, and the metrics of the selection.

    ValueError if it gives something else than a boolean for each token.
    """
    if not isinstance(select, SelectAfter):
        return ~scored.forced_T, {}
    chosen_T = select.after(replace(scored, state=state), advantage_T)
    good = isinstance(chosen_T, np.ndarray) and chosen_T.dtype == bool
    if not good or chosen_T.shape != advantage_T.shape:
        raise ValueError(
            f"select: {type(select).__name__}.after: expected a boolean for each of "
            f"{advantage_T.size} tokens, got {described(chosen_T)}"
        )
    train_T = chosen_T & ~scored.forced_T
    leaves = np.unique(scored.leaf_T[train_T]).size
    return train_T, {
        "select/tokens": int(train_T.sum()) / max(1, int((~scored.forced_T).sum())),
        "select/leaves": leaves / max(1, len(scored.group_N)),
    }


@dataclass(frozen=True)
class First:
    """The first ones in order: unbiased for independent samples (arXiv:2504.16084)."""

    def __call__(self, leaves: Leaves, train: int) -> NDArray[np.int64]:
        start_G = np.searchsorted(leaves.group_N, np.arange(leaves.groups))
        return np.flatnonzero(np.arange(len(leaves.group_N)) - start_G[leaves.group_N] < train)


@dataclass(frozen=True)
class Dynamic(First):
    """DAPO's dynamic sampling: questions train whose rewards differ (arXiv:2503.14476).

    Those whose known rewards are all equal have no advantage. Others are sampled in their place
    until a step has its number of questions, or for the last time: then fewer train.
    """

    rounds: int = 10
    """Times that other questions are sampled in a step, at most; 0: none is refused."""

    def __post_init__(self) -> None:
        at_least(0, self, "rounds")

    def trains(self, reward_N: NDArray[np.float64]) -> bool:
        known = reward_N[~np.isnan(reward_N)]
        return bool(known.size) and bool(known.min() < known.max())


@dataclass(frozen=True)
class Stratified:
    """Round-robin over the trunks, their own leaves first: the first n would be whole trees."""

    def __call__(self, leaves: Leaves, train: int) -> NDArray[np.int64]:
        turn_N = np.zeros(len(leaves.leaf_N), np.int64)
        seen: dict[tuple[int, int], int] = {}
        for n, key in enumerate(zip(leaves.group_N.tolist(), leaves.trunk_N.tolist(), strict=True)):
            turn_N[n] = seen.get(key, 0)
            seen[key] = int(turn_N[n]) + 1
        order_N = np.lexsort((leaves.trunk_N, turn_N, leaves.group_N))
        start_G = np.searchsorted(leaves.group_N, np.arange(leaves.groups))
        rank_N = np.arange(len(order_N)) - start_G[leaves.group_N[order_N]]
        return np.sort(order_N[rank_N < train])


@dataclass(frozen=True)
class Rejection(First):
    """RSO: a leaf is accepted with probability exp((r - r_max) / beta) (arXiv:2309.06657).

    In passes over the leaves of a question that are not accepted yet, in their order, until there
    are enough; r_max is the largest reward among them when a pass begins. The leaves that train
    are then samples of a policy tilted towards rewards, and no longer of the one that sampled.
    Leaves of unknown reward come last. The draws depend on the seed and on all texts of the step.
    """

    beta: float = 0.5
    """Small: the leaves of largest reward; inf: the first ones in order."""
    seed: int = 0
    """Another seed draws otherwise."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"Rejection.beta: expected > 0, got {self.beta}")

    def acceptance(self, reward_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """The probability of each leaf in a pass over these: 0 of unknown rewards among known."""
        known_N = ~np.isnan(reward_N)
        if not known_N.any():
            return np.ones(len(reward_N))
        below_N = np.where(known_N, reward_N, 0) - reward_N[known_N].max()
        return np.where(known_N, np.exp(below_N / self.beta), 0)

    def rewarded(
        self, leaves: Leaves, reward_N: NDArray[np.float64], train: int
    ) -> NDArray[np.int64]:
        digest = hashlib.blake2b(f"{self.seed}".encode(), digest_size=16)
        for text in leaves.text_N:
            digest.update(b"\0" + text.encode(errors="surrogatepass"))
        random = np.random.default_rng(int.from_bytes(digest.digest()))
        kept: list[int] = []
        for group in range(leaves.groups):
            left, room = np.flatnonzero(leaves.group_N == group), train
            while room and left.size:
                accepted_N = random.random(left.size) < self.acceptance(reward_N[left])
                taken = left[accepted_N][:room]
                kept += taken.tolist()
                left, room = np.setdiff1d(left, taken), room - taken.size
        return np.array(sorted(kept), np.int64)


@dataclass(frozen=True)
class Known(First):
    """Trains the leaves whose reward is known: the others leave the means of the loss too."""

    def after(self, scored: Scored, advantage_T: NDArray[np.float64]) -> NDArray[np.bool_]:
        known_T: NDArray[np.bool_] = ~np.isnan(scored.reward_N)[scored.leaf_T]
        return known_T


@dataclass(frozen=True)
class DownSample(First):
    """D3S: the leaves of largest variance of A, of these the tokens of largest |A| H.

    H is the entropy of the token when it was sampled, A of a leaf the mean over its tokens
    (arXiv:2509.22115). Both shares move linearly over the run, from few to more; of equal leaves
    and tokens the first count. The source does not print its shares: these are ours. (1, 1) keeps
    all.
    """

    leaf_share: tuple[float, float] = (0.5, 1.0)
    """Share of the leaves that train, at the beginning and at the end of the run."""
    token_share: tuple[float, float] = (0.1, 0.2)
    """Share of their tokens that train, at the beginning and at the end of the run."""
    across: bool = True
    """Choose leaves from all prompts of a step together, not from each."""
    needs = ("advantage_T", "entropy_T")

    def __post_init__(self) -> None:
        for name in ("leaf_share", "token_share"):
            if not all(0 < share <= 1 for share in vars(self)[name]):
                raise ValueError(
                    f"DownSample.{name}: expected two shares above 0 and up to 1, "
                    f"got {vars(self)[name]}"
                )

    def after(self, scored: Scored, advantage_T: NDArray[np.float64]) -> NDArray[np.bool_]:
        leaf_share, token_share = (
            first + (last - first) * scored.progress
            for first, last in (self.leaf_share, self.token_share)
        )
        total_N = np.bincount(scored.leaf_T, advantage_T, minlength=len(scored.group_N))
        mean_N = total_N / np.maximum(scored.length_N, 1)
        parts = np.zeros_like(scored.group_N) if self.across else scored.group_N
        kept_N = np.zeros(len(mean_N), bool)
        for part in np.unique(parts):
            member = np.flatnonzero(parts == part)
            wanted = max(1, round(leaf_share * member.size))
            kept_N[member[widest(mean_N[member], wanted)]] = True
        kept_T = kept_N[scored.leaf_T] & ~scored.forced_T
        at = np.flatnonzero(kept_T)
        key = np.abs(advantage_T[at]) * scored.entropy_T[at]
        train_T = np.zeros(len(kept_T), bool)
        wanted = max(1, round(token_share * at.size))
        train_T[at[np.argsort(-key, kind="stable")[:wanted]]] = True
        return train_T


def widest(value_N: NDArray[np.float64], wanted: int) -> NDArray[np.int64]:
    """Ordinals of the `wanted` values of largest variance: some smallest and some largest ones.

    Of all such splits the first that is best, with prefix sums.
    """
    order = np.argsort(value_N, kind="stable")
    value = value_N[order]
    sums, squares = (np.append(0.0, np.cumsum(v)) for v in (value, value**2))
    low = np.arange(wanted + 1)
    high = len(value) - (wanted - low)
    total = sums[low] + sums[-1] - sums[high]
    square = squares[low] + squares[-1] - squares[high]
    variance = square / wanted - (total / wanted) ** 2
    best = int(np.argmax(variance >= variance.max() - 1e-12))
    return np.append(order[:best], order[len(value) - (wanted - best) :])


@dataclass(frozen=True)
class WithoutAnswer(First):
    """OM-GRPO: the tokens of the answer have no gradient, only what leads to it (arXiv:2608.03119).

    Without the source's second scoring in pairs.
    """

    extractor: str = "boxed"
    """How an answer is found, as in --extractor: the last place where it stands as it is read.
    Where it is not found, all tokens train."""
    needs = ("texts",)

    def __post_init__(self) -> None:
        extractor_named(self.extractor)

    def after(self, scored: Scored, advantage_T: NDArray[np.float64]) -> NDArray[np.bool_]:
        extractor, start = extractor_named(self.extractor), 0
        train_T = np.ones(len(advantage_T), bool)
        for text, length in zip(scored.texts.text_N, scored.length_N.tolist(), strict=True):
            answer = extractor(text)
            begin = text.rfind(answer) if answer else -1
            if answer and begin >= 0:
                span = scored.texts.span_T2[start : start + length]
                outside = (span[:, 1] <= begin) | (span[:, 0] >= begin + len(answer))
                train_T[start : start + length] = outside
            start += length
        return train_T
