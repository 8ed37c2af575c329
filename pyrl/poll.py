"""Poll: counts a prompt's vote while its leaves finish, to see when the rest cannot change it."""

from __future__ import annotations

import numpy as np

from pyrl._core.tree import Forest
from pyrl.answers import Equivalence, Extractor, read_answer
from pyrl.leaves import Decode
from pyrl.vote import Countable


class Poll:
    """Reads answers as leaves finish, by the code that votes later; true answers never enter.

    A poll serves one rollout. `train`: the number of a prompt's first leaves that run to their end
    whatever the vote says, because they train.
    """

    def __init__(
        self,
        vote: Countable,
        decode: Decode,
        extractor: Extractor,
        equivalence: Equivalence,
        train: int,
    ) -> None:
        self.vote, self.decode, self.extractor = vote, decode, extractor
        self.equivalence, self.train = equivalence, train
        self._answer: dict[int, str | None] = {}
        self._due: dict[int, int] = {}
        """Finished leaves of a prompt at which counting again can be worth it."""

    def decided(self, forest: Forest, tree: int, missing: int) -> bool:
        """Whether no `missing` more leaves, whatever they say, can change a prompt's label."""
        leaf_N = forest.leaves(tree)
        if len(leaf_N) < max(self._due.get(tree, 0), self.vote.quorum(missing)):
            return False
        self._read(forest, [leaf for leaf in leaf_N.tolist() if leaf not in self._answer])
        class_N = self.equivalence.classes([self._answer[leaf] for leaf in leaf_N.tolist()])
        mass_N = np.exp(forest.leaf_table(leaf_N).log_mass_N)
        more = self.vote.undecided(class_N, missing, mass_N)
        self._due[tree] = len(leaf_N) + more
        return more == 0

    def _read(self, forest: Forest, leaves: list[int]) -> None:
        texts = self.decode([forest.path(leaf).tokens for leaf in leaves])
        finish_N = forest.leaf_table(np.array(leaves, np.int64)).finish_N.tolist()
        for leaf, text, finish in zip(leaves, texts, finish_N, strict=True):
            self._answer[leaf] = read_answer(text, finish, self.extractor)
