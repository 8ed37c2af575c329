"""Fork: where a tree grows new branches. Each rule is a frozen dataclass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from pyrl._core.tree import Forest, Observed, SignalSpec, Threshold
from pyrl.checks import at_least, finite, ordered, shares
from pyrl.law import Law


@dataclass(frozen=True)
class Site:
    """New branches at one place: `siblings` that share the first `at` response tokens of `leaf`."""

    leaf: int
    at: int
    siblings: int


@dataclass(frozen=True)
class Finished:
    """A trunk whose branches have all ended, as `Fork.at_end` sees it."""

    forest: Forest
    leaves: tuple[int, ...]
    """Finished branches in creation order, the trunk first."""
    begin: tuple[int, ...]
    """Position at which each leaf left its parent: earlier tokens belong to another leaf."""
    answer: Callable[[int], int]
    """Position at which a leaf's final answer opens, or its length."""
    round: int
    """How many rounds of forks this trunk has had."""
    votes: int
    """Leaves that are wanted of the question."""


class Fork(Protocol):
    """A rule may decide while a branch grows (lowered to C++, or `width`), at its end, or never.

    It may name in `needs` which columns of `Scored` it reads at the end: not every host of
    `pyrl.hosts` has them all.
    """

    def trunks(self, votes: int) -> int:
        """Independent samples to begin with, when `votes` leaves are wanted."""

    def cap(self, votes: int) -> int:
        """Leaves of one trunk at most."""

    def lower(self, spec: SignalSpec) -> bool:
        """Write the online rule into the C++ signals; False: nothing is decided online."""

    def width(self, observed: Observed) -> NDArray[np.int32]:
        """Branches after this token for each observed branch, itself included (1: no fork).

        It has no effect where `observed.ready_B` is 0, as on tokens that cool down after a fork.
        """

    def at_end(self, trunk: Finished) -> list[Site]:
        """Forks of a finished trunk; empty when it is done."""

    def law(self, forest: Forest, votes: int) -> Law | None:
        """The law that forks and drops branches in place of all this; None: there is none."""


@dataclass(frozen=True)
class Flat:
    """Independent samples: TTRL's rollout (arXiv:2504.16084)."""

    def trunks(self, votes: int) -> int:
        return votes

    def cap(self, votes: int) -> int:
        return votes

    def lower(self, spec: SignalSpec) -> bool:
        return False

    def width(self, observed: Observed) -> NDArray[np.int32]:
        return observed.width_B

    def at_end(self, trunk: Finished) -> list[Site]:
        return []

    def law(self, forest: Forest, votes: int) -> Law | None:
        return None


@dataclass(frozen=True)
class TopEntropy(Flat):
    """ETMR: fork each finished trunk at its most uncertain tokens (arXiv:2508.11356).

    `votes` leaves come from votes / (1 + forks * siblings) trunks: 60 from 12 with the defaults.
    """

    forks: int = 2
    """N: positions per trunk."""
    siblings: int = 2
    """B: new branches per position."""
    min_gap: int = 0
    """Tokens between two forks of one trunk; 0 is the paper's strict top-N."""
    mask_tail: int = 8
    """Last tokens of a trunk that never fork."""
    needs: ClassVar[tuple[str, ...]] = ("entropy_T",)

    def __post_init__(self) -> None:
        at_least(0, self, "forks", "siblings", "min_gap", "mask_tail")

    def trunks(self, votes: int) -> int:
        return max(1, votes // self.cap(votes))

    def cap(self, votes: int) -> int:
        return 1 + self.forks * self.siblings

    def at_end(self, trunk: Finished) -> list[Site]:
        if trunk.round > 0 or self.forks * self.siblings == 0:
            return []
        (leaf,) = trunk.leaves
        end = max(1, min(trunk.answer(leaf), trunk.forest.length(leaf) - self.mask_tail))
        return [Site(leaf, int(at), self.siblings) for at in self.places(trunk.forest, leaf, end)]

    def places(self, forest: Forest, leaf: int, end: int) -> NDArray[np.int64]:
        """Where a trunk forks, of the response positions [1, end)."""
        return forest.top_entropy(leaf, self.forks, 1, end, self.min_gap)


@dataclass(frozen=True)
class RandomTokens(TopEntropy):
    """The control of ETMR: as many forks at tokens that chance chooses.

    What a signal is worth is what its forks gain over these.
    """

    needs: ClassVar[tuple[str, ...]] = ()

    def places(self, forest: Forest, leaf: int, end: int) -> NDArray[np.int64]:
        # Of the trunk's own seed, so that a run repeats; tokens are drawn from other numbers.
        random = np.random.default_rng([forest.seed(leaf), 1])
        chosen: list[int] = []
        for at in random.permutation(np.arange(1, end)).tolist():
            if len(chosen) < self.forks and all(
                abs(at - other) >= self.min_gap for other in chosen
            ):
                chosen.append(at)
        return np.array(sorted(chosen), np.int64)


@dataclass(frozen=True)
class EPTree(TopEntropy):
    """TreeRL's tree: rounds of forks at the tokens of largest surprisal (arXiv:2506.11902)."""

    rounds: int = 1
    """L: each round chooses among all tokens of the tree, also those of earlier rounds."""
    needs: ClassVar[tuple[str, ...]] = ("logprob_T",)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "rounds")

    def cap(self, votes: int) -> int:
        return 1 + self.forks * self.rounds * self.siblings

    def at_end(self, trunk: Finished) -> list[Site]:
        if trunk.round >= self.rounds:
            return []
        candidates = []
        for order, leaf in enumerate(trunk.leaves):
            surprisal = -trunk.forest.path(leaf).logprob
            end = min(trunk.answer(leaf), len(surprisal) - self.mask_tail)
            first = trunk.begin[order] + 1  # the first token of a branch is masked
            candidates += [(-float(surprisal[at]), order, at) for at in range(first, end)]
        chosen: list[tuple[int, int]] = []
        for _, order, at in sorted(candidates):
            if len(chosen) < self.forks and all(
                order != other or abs(at - place) >= self.min_gap for other, place in chosen
            ):
                chosen.append((order, at))
        return [Site(trunk.leaves[order], at, self.siblings) for order, at in sorted(chosen)]


@dataclass(frozen=True)
class Probed(Flat):
    """Agentic AEPO: a probe says how many of the leaves are forks (arXiv:2510.14545).

    The first sample of a question is the probe. Where its first tokens are more uncertain than
    those after each step, more of the leaves are independent samples: of k leaves
    m = floor(k sigmoid(balance (H_root - H_step))) + 1. The others fork from the probe at its
    steps, where (u + weight (H - H_root)) (1 - penalty l) >= 0.5 for a random u and the l steps
    before it that forked one after the other; what is left are independent samples again. A step
    is every `step` tokens, in the place of the paper's calls of tools, and entropies are in nats.
    """

    siblings: int = 1
    """New branches of a fork; 0: independent samples alone."""
    step: int = 20
    """Tokens between two places that may fork."""
    window: int = 20
    """Tokens whose mean entropy is that of a place."""
    balance: float = 0.5
    """How much the entropies decide between forks and samples; 0: half of the leaves each."""
    weight: float = 0.2
    """How much the entropy of a place decides whether it forks; 0: chance alone."""
    penalty: float = 0.05
    """What each fork just before takes from the next one's chance; 0: nothing (ARPO)."""
    needs: ClassVar[tuple[str, ...]] = ("entropy_T",)

    def __post_init__(self) -> None:
        at_least(0, self, "siblings", "penalty")
        at_least(1, self, "step", "window")
        finite(self, "balance", "weight", "penalty")

    def trunks(self, votes: int) -> int:
        return 1 if self.siblings else votes

    def samples(self, votes: int, root: float, step: float) -> int:
        """m, of the entropies at the root and after the steps; the probe is one of them."""
        share = 1 / (1 + np.exp(-self.balance * (root - step)))
        return min(votes, int(votes * share) + 1)

    def chance(self, rise: float, before: int) -> float:
        """Of a fork where the entropy is so much above the root's, after so many forks."""
        left = 1 - self.penalty * before
        return float(np.clip(1 - 0.5 / left + self.weight * rise, 0, 1)) if left > 0 else 0.0

    def at_end(self, trunk: Finished) -> list[Site]:
        if trunk.round or not self.siblings:
            return []
        (probe,) = trunk.leaves
        entropy_T = trunk.forest.path(probe).entropy
        end = min(trunk.answer(probe), len(entropy_T))
        places = range(self.step, end, self.step)
        root = float(entropy_T[: self.window].mean())
        height = [float(entropy_T[at : at + self.window].mean()) for at in places]
        mean = float(np.mean(height)) if height else root
        left = trunk.votes - self.samples(trunk.votes, root, mean)
        # Of the probe's own seed, so that a run repeats; tokens are drawn from other numbers.
        random = np.random.default_rng([trunk.forest.seed(probe), 1])
        sites, before = [], 0
        for at, entropy in zip(places, height, strict=True):
            if left > 0 and random.random() < self.chance(entropy - root, before):
                sites.append(Site(probe, at, min(self.siblings, left)))
                left, before = left - self.siblings, before + 1
            else:
                before = 0
        return sites


@dataclass(frozen=True)
class OnlineEntropy(Flat):
    """ETMR as a stopping rule: fork the first N times that entropy exceeds a running quantile.

    It does not wait for the finished trunk: every leaf is an exact sample of the policy, and a
    branch starts while its trunk still runs.
    """

    forks: int = 2
    """N: forks of a trunk at most."""
    siblings: int = 2
    """B: new branches of a fork."""
    quantile: float = 0.9
    """Quantile of token entropy over the last steps above which a token forks."""
    cooldown: int = 16
    """Tokens without a fork after one."""
    min_tokens: int = 1
    """Tokens of a branch before its first fork."""
    warmup_traces: int = 16
    """Finished samples before the first fork of a run."""

    def __post_init__(self) -> None:
        shares(self, "quantile")
        at_least(0, self, "forks", "siblings", "cooldown", "min_tokens", "warmup_traces")

    def trunks(self, votes: int) -> int:
        return max(1, votes // (1 + self.forks * self.siblings))

    def lower(self, spec: SignalSpec) -> bool:
        spec.fork = self.forks * self.siblings > 0
        spec.entropy_high = spec.entropy_low = Threshold(q=self.quantile)
        spec.confidence_fork = spec.entropy_rise = None  # they have no say here
        spec.alpha = spec.beta = 0.0
        spec.width_min = spec.width_max = 1 + self.siblings
        spec.cooldown = self.cooldown
        spec.max_forks = self.forks
        spec.min_tokens = self.min_tokens
        spec.warmup_traces = self.warmup_traces
        return spec.fork


@dataclass(frozen=True)
class EntropyConfidence(Flat):
    """ECHO's EC-Tree: fork where entropy is high and group confidence low (arXiv:2602.02150).

    The width is round(1 + alpha (H - H_low) / (H_high - H_low) + beta (1 - D_fork / D)), where D is
    doubt, 1 - C: the released code's formula with its confidence term in units that also tell
    0.99 from 0.9999. Thresholds are quantiles of the last steps. A cool-down and a cap per trunk
    keep one run of uncertain tokens from spending the budget.
    """

    entropy_high: float = 0.95
    """Quantile of token entropy above which a token may fork."""
    entropy_low: float = 0.5
    """Quantile of token entropy at which entropy adds no width."""
    confidence: float = 0.5
    """Quantile of group confidence below which a token may fork."""
    entropy_rise: float = 0.8
    """Quantile of the rise of entropy over its moving average."""
    alpha: float = 2.0
    """Weight of entropy in the width of a fork."""
    beta: float = 1.0
    """Weight of doubt in the width of a fork."""
    max_width: int = 4
    """Branches after a fork at most, the parent included; 1 never forks."""
    cooldown: int = 32
    """Tokens without a fork after one; siblings inherit it."""
    trunk_cap: int = 8
    """Leaves of one trunk at most."""
    trunk_share: float = 0.5
    """Share of the wanted leaves that start as trunks; forks, then new trunks, fill up the rest."""
    smooth_window: int = 4
    """Tokens of the moving average of entropy."""
    group_window: int = 32
    """Tokens whose mean confidence is the group confidence."""
    min_tokens: int = 4
    """Tokens of a branch before its first fork."""
    warmup_traces: int = 16
    """Finished samples before the first fork of a run."""

    def __post_init__(self) -> None:
        shares(self, "entropy_high", "entropy_low", "confidence", "entropy_rise", "trunk_share")
        finite(self, "alpha", "beta")
        at_least(0, self, "alpha", "beta", "cooldown", "min_tokens", "warmup_traces")
        at_least(1, self, "max_width", "trunk_cap", "smooth_window", "group_window")

    def trunks(self, votes: int) -> int:
        return votes if self.max_width == 1 else max(1, round(votes * self.trunk_share))

    def cap(self, votes: int) -> int:
        return self.trunk_cap

    def threshold(self, value: float) -> Threshold:
        """What a field of a threshold stands for."""
        return Threshold(q=value)

    def lower(self, spec: SignalSpec) -> bool:
        spec.fork = self.max_width > 1
        spec.entropy_high = self.threshold(self.entropy_high)
        spec.entropy_low = self.threshold(self.entropy_low)
        spec.confidence_fork = self.threshold(self.confidence)
        spec.entropy_rise = self.threshold(self.entropy_rise)
        spec.alpha, spec.beta = self.alpha, self.beta
        spec.width_max = self.max_width
        spec.cooldown = self.cooldown
        spec.smooth_window = self.smooth_window
        spec.group_window = self.group_window
        spec.min_tokens = self.min_tokens
        spec.warmup_traces = self.warmup_traces
        return spec.fork


@dataclass(frozen=True)
class FixedEntropyConfidence(EntropyConfidence):
    """ECHO's EC-Tree by fixed numbers from the first token of a run on (arXiv:2602.02150).

    Those of entropy are the released code's. Its confidence is in another unit, so that number is
    ours: what forks depends on the model, which quantiles do not.
    """

    entropy_high: float = 3.5
    """Entropy (nats) from which on a token may fork."""
    entropy_low: float = 1.0
    """Entropy (nats) that adds no width."""
    confidence: float = 0.5
    """Group confidence, a mass in (0, 1], up to which a token may fork."""
    entropy_rise: float = 0.2
    """Rise of entropy (nats) over its moving average from which on a token may fork."""
    group_window: int = 4
    """Tokens whose mean confidence is the group confidence."""
    warmup_traces: int = 0
    """Finished samples before the first fork of a run."""

    def __post_init__(self) -> None:
        shares(self, "confidence", "trunk_share")
        finite(self, "entropy_high", "entropy_low", "entropy_rise", "alpha", "beta")
        ordered(self, self.entropy_low, self.entropy_high)
        at_least(0, self, "entropy_low", "alpha", "beta", "cooldown", "min_tokens")
        at_least(0, self, "warmup_traces")
        at_least(1, self, "max_width", "trunk_cap", "smooth_window", "group_window")

    def threshold(self, value: float) -> Threshold:
        return Threshold(value=value)


@dataclass(frozen=True)
class WithoutReplacement(Flat):
    """`votes` responses of which no two are equal, the top of a perturbed order of all responses.

    The sampled token of a branch is an ordinary draw; where the best of all other continuations is
    among the `votes` best of the question, a sibling opens that draws from the others, and what
    falls out of the best is dropped (Gumbel-top-k, arXiv:1903.06059). Leaves get weights that undo
    the selection; `vote=Mass()` counts them.
    """

    def trunks(self, votes: int) -> int:
        return 1

    def law(self, forest: Forest, votes: int) -> Law | None:
        return Law(forest, votes)
