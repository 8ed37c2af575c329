"""The forest, slow and obvious: every branch holds a list of all its tokens, a fork copies it.

A token knows the branch that appended it (its owner), so two branches share exactly the prefix in
which their owners agree, and the tree can be read off the lists. Branches are numbered 0, 1, 2, ...
in creation order and never renumbered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

PAGE = 64
OPEN, STOPPED, TRUNCATED = 0, 1, 2


class Token(NamedTuple):
    owner: int
    token: int
    logprob: float
    entropy: float
    confidence: float
    forced: bool
    version: int


@dataclass
class Branch:
    number: int
    tree: int
    trunk: int
    seed: int
    base: int = 0
    """Position of the first token of its own."""
    weight: float = 1.0
    finish: int = OPEN
    tokens: list[Token] = field(default_factory=list)
    forks: set[int] = field(default_factory=set)
    """Positions on its path at which a fork was made."""

    def owner(self, position: int) -> int:
        """Of the token at this position, its own next ones included."""
        return self.tokens[position].owner if position < len(self.tokens) else self.number


@dataclass
class Segment:
    parent: int
    tree: int
    length: int
    leaves: list[Branch]


class Forest:
    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.trunks: list[int] = []
        self.live: dict[int, Branch] = {}
        self.bases: list[int] = []
        self.tokens = 0
        self.pruned: list[list[int]] = []

    def add_tree(self, prompt: list[int]) -> int:
        self.prompts.append(prompt)
        self.trunks.append(0)
        self.pruned.append([0] * 7)
        return len(self.prompts) - 1

    def _add(self, tree: int, trunk: int, seed: int, base: int) -> Branch:
        branch = Branch(len(self.bases), tree, trunk, seed, base)
        self.live[branch.number] = branch
        self.bases.append(base)
        return branch

    def add_trunk(self, tree: int, seed: int) -> int:
        self.trunks[tree] += 1
        return self._add(tree, self.trunks[tree] - 1, seed, 0).number

    def append(self, number: int, *values: float, forced: bool, version: int) -> None:
        token, logprob, entropy, confidence = values
        self.live[number].tokens.append(
            Token(number, int(token), logprob, entropy, confidence, forced, version)
        )
        self.tokens += 1

    def shared(self, a: Branch, b: Branch) -> int:
        """Length of the common prefix of two branches of one trunk."""
        length = 0
        while a.owner(length) == b.owner(length):
            length += 1
        return length

    def fork(self, number: int, at: int, seeds: list[int], share: bool) -> list[int]:
        source = self.live[number]
        for other in self.live.values():
            same_trunk = (other.tree, other.trunk) == (source.tree, source.trunk)
            if other is source or (same_trunk and self.shared(other, source) >= at):
                other.forks.add(at)
        weight = self._share(source, at, len(seeds)) if share else source.weight
        forks = []
        for seed in seeds:
            branch = self._add(source.tree, source.trunk, seed, at)
            branch.weight = weight
            branch.tokens = source.tokens[:at]
            branch.forks = {position for position in source.forks if position <= at}
            forks.append(branch.number)
        return forks

    def _share(self, source: Branch, at: int, siblings: int) -> float:
        """Divide the weight below a place among the ways that lead on from there."""
        below = [
            other
            for other in self.live.values()
            if other is source
            or (
                (other.tree, other.trunk) == (source.tree, source.trunk)
                and self.shared(other, source) >= at
            )
        ]
        width = len({other.owner(at) for other in below})
        mass = sum(other.weight for other in below)
        for other in below:
            other.weight *= width / (width + siblings)
        return mass / (width + siblings)

    def finish(self, number: int, reason: int) -> None:
        self.live[number].finish = reason

    def prune(self, number: int, reason: int) -> None:
        self.pruned[self.live.pop(number).tree][reason] += 1

    def open(self) -> list[int]:
        return [b.number for b in self.live.values() if b.finish == OPEN]

    def leaves(self, tree: int | None = None) -> list[int]:
        trees = range(len(self.prompts)) if tree is None else [tree]
        return [b.number for t in trees for b in self.live.values() if b.tree == t and b.finish]

    def tokens_live(self) -> int:
        return len({(t.owner, i) for b in self.live.values() for i, t in enumerate(b.tokens)})

    def pages(self) -> int:
        """What each branch appended lies in pages of its own, up to the last token still used."""
        end: dict[int, int] = {}
        for branch in self.live.values():
            for position, token in enumerate(branch.tokens):
                end[token.owner] = max(end.get(token.owner, 0), position + 1)
        return sum(-(-(last - self.bases[owner]) // PAGE) for owner, last in end.items())

    def segments(self, leaves: list[int]) -> list[Segment]:
        """Depth first, roots first; siblings in the order in which their first branch was made."""
        found: list[Segment] = []
        for tree, prompt in enumerate(self.prompts):
            below = [self.live[n] for n in leaves if self.live[n].tree == tree]
            if below:
                found.append(Segment(-1, tree, len(prompt), below))
                root = len(found) - 1
                for trunk in sorted({b.trunk for b in below}):
                    self._descend(found, root, 0, [b for b in below if b.trunk == trunk])
        return found

    def _descend(self, found: list[Segment], parent: int, begin: int, below: list[Branch]) -> None:
        end = min((self.shared(below[0], b) for b in below[1:]), default=len(below[0].tokens))
        found.append(Segment(parent, below[0].tree, end - begin, below))
        own = len(found) - 1
        if len(below) > 1:
            for owner in sorted({b.owner(end) for b in below}):
                self._descend(found, own, end, [b for b in below if b.owner(end) == owner])

    def top_entropy(self, number: int, n: int, begin: int, end: int, min_gap: int) -> list[int]:
        tokens = self.live[number].tokens
        chosen: list[int] = []
        for i in sorted(range(begin, end), key=lambda i: (-tokens[i].entropy, i)):
            if len(chosen) < n and all(abs(i - j) >= min_gap for j in chosen):
                chosen.append(i)
        return sorted(chosen)

    def tail_confidence(self, number: int, window: int) -> float:
        tail = [token.confidence for token in self.live[number].tokens[-window:]]
        return float(np.mean(tail)) if tail else float("nan")
