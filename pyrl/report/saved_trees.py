"""Saved trees: some questions of a step with all that grew from them, in a file a step.

`trees/STEP.safetensors` of a run has the array `forest`, the bytes of a `pyrl.Forest` with the
first questions of the step: its leaves finished, pruned branches open. A column T holds the
response tokens of its branches, first the leaves, then the pruned ones, in the forest's order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pyrl._core.tree import Forest, PackedRows, pack_flat
from pyrl.answers.truth import right
from pyrl.forest import BUDGET, DECIDED, ENTROPY_SPIKE, LOW_CONFIDENCE, REFUSED, TAIL_DECLINE
from pyrl.pack import gather, offsets
from pyrl.report.growth import grow_again
from pyrl.report.metrics import plain_row
from pyrl.reward import grade
from pyrl.texts import Decode, Texts

if TYPE_CHECKING:
    from pyrl.train import Step

TREES = "trees"
"""The folder of a run that has them."""

FORMAT = 1

REASONS = {
    LOW_CONFIDENCE: "low confidence",
    TAIL_DECLINE: "falling confidence",
    ENTROPY_SPIKE: "leaps of entropy",
    BUDGET: "budget spent",
    DECIDED: "vote decided",
    REFUSED: "less probable than those kept",
}
"""Why a branch was pruned."""

AfterUpdate = Callable[[PackedRows], NDArray[np.float64]]
"""Log-probs [T] of rows by the model that has learned from them."""


@dataclass(frozen=True)
class SavedTrees:
    """The trees of one step, as they were saved."""

    step: int
    forest: Forest
    branch_N: NDArray[np.int64]
    """Its leaves, then its open branches, which were pruned."""
    record: Mapping[str, Any]
    """`questions` and `branches` [N], as JSON has them; `spelled`: the tokens are the texts."""
    end_T: NDArray[np.int32]
    """One past the last character of each token in the text of its branch."""
    advantage_T: NDArray[np.float32]
    """NaN for tokens without one: of pruned branches, and of leaves that do not train."""
    after_T: NDArray[np.float32]
    """Log-prob by the learner after the step's update (nats); NaN for pruned branches."""

    @property
    def length_N(self) -> NDArray[np.int64]:
        """Response tokens of each branch."""
        return np.array([self.forest.length(branch) for branch in self.branch_N.tolist()])

    def take(self, index_N: NDArray[np.int64]) -> SavedTrees:
        """The branches at these ordinals, in the given order; the forest has all of them."""
        row_T = gather(offsets(self.length_N), index_N)
        branches = self.record["branches"]
        return replace(
            self,
            branch_N=self.branch_N[index_N],
            record={**self.record, "branches": [branches[n] for n in index_N.tolist()]},
            end_T=self.end_T[row_T],
            advantage_T=self.advantage_T[row_T],
            after_T=self.after_T[row_T],
        )


def save_trees(output: Path, number: int, step: Step, questions: int, after: AfterUpdate) -> None:
    """Write the trees of a step's first questions to `output`, whole or not at all.

    A step that is made again writes the same bytes.
    """
    count = min(questions, len(step.prompts))
    forest, new = grow_again(step.rollout, count)
    branch_N = _branches(forest)
    row_of = {leaf: n for n, leaf in enumerate(step.leaves.leaf_N.tolist())}
    old_of = {handle: old for old, handle in new.items()}
    old_N = [old_of[branch] for branch in branch_N.tolist()]
    leaf_N = np.array([row_of[old] for old in old_N if old in row_of], np.int64)
    rows = pack_flat(forest, branch_N[: len(leaf_N)])
    token_N = [forest.path(branch).tokens for branch in branch_N.tolist()]
    text_N, end_T, spelled = _spelled(token_N, step.leaves.decode)
    advantage_T = _advantages(step, leaf_N)
    pruned_T = np.full(len(end_T) - len(advantage_T), np.nan)
    record = {
        "format": FORMAT,
        "step": number,
        "spelled": spelled,
        "questions": _questions(step, count),
        "branches": [
            {"text": text} | about
            for text, about in zip(
                text_N, [*_leaves(step, leaf_N), *_pruned(step, old_N[len(leaf_N) :])], strict=True
            )
        ],
    }
    columns: dict[str, NDArray[Any]] = {
        "forest": np.frombuffer(forest.save(), np.uint8),
        "end_T": end_T,
        "advantage_T": np.concatenate([advantage_T, pruned_T]).astype(np.float32),
        "after_T": np.concatenate([after(rows), pruned_T]).astype(np.float32),
    }
    path = output / TREES / f"{number}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(save(columns, {"record": json.dumps(record, allow_nan=False)}))
    os.replace(part, path)


def saved_steps(output: Path) -> list[tuple[int, Path]]:
    """Steps of which a run has saved trees, ascending, and their files."""
    found = (output / TREES).glob("*.safetensors")
    return sorted((int(path.stem), path) for path in found if path.stem.isdigit())


def read_trees(path: Path) -> SavedTrees:
    """What `save_trees` wrote; ValueError says what is wrong with the file."""
    try:
        with safe_open(path, "numpy") as file:
            record = json.loads((file.metadata() or {})["record"])
            columns = {name: file.get_tensor(name) for name in sorted(file.keys())}
        if (written := record["format"]) != FORMAT:
            raise ValueError(
                f"expected trees of format {FORMAT}, got format {written}: another version of "
                f"pyrl wrote them"
            )
        forest = Forest.load(columns.pop("forest").tobytes())
        return SavedTrees(record["step"], forest, _branches(forest), record, **columns)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected saved trees, got {type(error).__name__}: {error}; "
            f"without this file the report has the other ones"
        ) from error


def _branches(forest: Forest) -> NDArray[np.int64]:
    return np.concatenate([forest.leaves(), forest.open()])


def _spelled(
    token_N: Sequence[NDArray[np.int32]], decode: Decode
) -> tuple[list[str], NDArray[np.int32], bool]:
    """Texts, where their tokens end, and whether the tokens spell the texts."""
    text_N = decode(token_N)
    try:
        return text_N, Texts(tuple(text_N), tuple(token_N), decode).span_T2[:, 1].astype("i4"), True
    except ValueError:
        # A decoder that changes what it has said: each token is shown as it reads alone.
        piece_NT = [decode([*tokens.reshape(-1, 1)]) for tokens in token_N]
        end_NT = [np.cumsum([len(piece) for piece in pieces]) for pieces in piece_NT]
        return ["".join(pieces) for pieces in piece_NT], np.concatenate(end_NT).astype("i4"), False


def _advantages(step: Step, leaf_N: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of the tokens of these leaves of a step, NaN where the leaf does not train."""
    kept = step.leaves.length_N[step.kept_N]
    parts = np.split(step.advantage_T, np.cumsum(kept)[:-1]) if len(kept) else []
    of = dict(zip(step.kept_N.tolist(), parts, strict=True))
    nothing = [np.full(length, np.nan) for length in step.leaves.length_N[leaf_N].tolist()]
    return np.concatenate(
        [of.get(n, none) for n, none in zip(leaf_N.tolist(), nothing, strict=True)]
    )


def _questions(step: Step, count: int) -> list[dict[str, Any]]:
    votes, prompts = step.votes, step.prompts[:count]
    right_G = right(votes.label_G[:count], prompts, step.answers.equivalence)
    return [
        plain_row(
            {
                "text": prompt.text,
                "answer": prompt.answer,
                "label": votes.label_G[g],
                "label_right": right_G[g],
                "share": votes.ratio_G[g],
                "margin": votes.margin_G[g],
            }
        )
        for g, prompt in enumerate(prompts)
    ]


def _leaves(step: Step, leaf_N: NDArray[np.int64]) -> list[dict[str, Any]]:
    leaves, answers = step.leaves.take(leaf_N), step.answers.take(leaf_N)
    right_N = grade(leaves, answers, step.prompts, answers.equivalence)
    trains = set(step.kept_N.tolist())
    return [
        plain_row(
            {
                "answer": answers.answer_N[i],
                "elects": answers.class_N[i] >= 0
                and answers.class_N[i] == step.votes.class_G[leaves.group_N[i]],
                "right": right_N[i],
                "reward": step.reward_N[n],
                "weight": leaves.weight_N[i],
                "log_mass": leaves.log_mass_N[i],
                "trains": n in trains,
            }
        )
        for i, n in enumerate(leaf_N.tolist())
    ]


def _pruned(step: Step, old_N: Sequence[int]) -> list[dict[str, Any]]:
    return [{"pruned": REASONS[step.rollout.pruned[old].reason]} for old in old_N]
