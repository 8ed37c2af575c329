"""Training on trees against training on flat rows: the same numbers, from fewer tokens."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from learner_batch import (
    PLAIN,
    assert_close,
    demo_model,
    gradient,
    moved,
    on_policy,
    settings,
    taken_gradient,
)
from model_families import exact_norms, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from pyrl._core.tree import pack_flat
from pyrl.forest import Forest
from pyrl.learner import Learner, reader
from pyrl.logits import lm_head
from pyrl.loss import KL, ExpertLeak, Loss
from pyrl.loss.presets import PRESETS
from pyrl.pack import TokenBatch, pack, pack_given

torch.set_num_threads(1)

PREFIX = [[3, 4, 5, 12, 6], [3, 4, 5, 7]]
"""Two questions behind one text."""


class Matrices(TorchDispatchMode):
    """Operations whose tensors of so many elements lie in memory of their own."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.made = elements, dict[str, Tensor]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.elements:
            known = {tensor.data_ptr() for tensor in self.made.values()}
            if out.data_ptr() not in known:
                self.made[str(function)] = out
        return out


def logits_of(learner: Learner, batch: TokenBatch) -> Matrices:
    """Watches for the [U, V] logits of these rows."""
    tree = learner.reader._packed(batch)
    return Matrices(len(tree.label_U) * learner.model.get_output_embeddings().weight.shape[0])


def in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of any pass are made four tokens at a time."""
    monkeypatch.setattr(reader, "SMALL_LOGITS", -1)
    monkeypatch.setattr(lm_head, "USUAL_CHUNK", {"cpu": 4})
    monkeypatch.setattr(lm_head, "LEAST_CHUNK", 1)


def tree_batch(seed: int, forks: int = 5) -> TokenBatch:
    """Leaves of two trees: forks at the first token and at the end, forced tokens, leaves that are
    the start of another one or equal to it, and numbers of their own for each."""
    rng, forest = np.random.default_rng(seed), Forest()
    for prompt in PREFIX:
        forest.add_trunk(forest.add_tree(np.array(prompt, np.int32)), 1)
    for step in range(forks):
        branch_B = forest.open()
        for _ in range(int(rng.integers(1, 5))):
            rows = len(branch_B)
            entropy_B, confidence_B = rng.random((2, rows)).astype(np.float32)
            token_B, forced_B = rng.integers(2, 6, rows).astype(np.int32), rng.random(rows) < 0.2
            logprob_B = rng.normal(-2, 0.3, rows).astype(np.float32)
            forest.append(branch_B, token_B, logprob_B, entropy_B, confidence_B, forced=forced_B)
        source = int(rng.choice(branch_B))
        at = int(rng.integers(0, forest.length(source) + 1))
        forest.fork(source, at, np.array([step, step + 50], np.uint64))
    leaf_N = rng.permutation(forest.open())
    rows = pack_flat(forest, leaf_N)
    batch = pack(
        rows, rng.normal(size=len(rows.label_T)), rng.integers(0, 2, len(leaf_N)) * 2.0 - 1
    )
    return replace(batch, group_N=forest.leaf_table(leaf_N).tree_N)


def model_of(name: str) -> PreTrainedModel:
    return exact_norms(demo_model() if name == "demo" else tiny(name, torch.float64))


def shares(batch: TokenBatch) -> float:
    learner = Learner(demo_model(), None, settings())
    list(learner.reader.passes(batch))
    found = learner.reader.metrics()
    return 1 - found["pack/unique"] / found["pack/tokens"]


@pytest.mark.parametrize("name", ["demo", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("tokens_per_pass", [1, 25, 10_000])
@hypothesis(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_gradient_of_a_forest_is_that_of_its_rows(
    name: str, tokens_per_pass: int, seed: int
) -> None:
    batch, model = tree_batch(seed), model_of(name)
    assert shares(batch) > 0.2
    flat = Learner(copy.deepcopy(model), None, settings(pack="flat"))
    tree = Learner(model, None, settings(pack="tree", tokens_per_pass=tokens_per_pass))
    expected, found = flat.gradient(batch), tree.gradient(batch)
    assert found.loss == pytest.approx(expected.loss, rel=1e-10)
    assert found.metrics() == pytest.approx(expected.metrics(), rel=1e-9, abs=1e-9)
    assert_close(gradient(tree, batch), gradient(flat, batch), 1e-10)


def preset(name: str) -> Loss:
    return PRESETS[name]()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_loss_moves_the_weights_as_on_flat_rows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a whole update, with the learner's own pass over the samples where the loss needs it.

    Plain descent in the place of Adam: the weights move by the gradient, and not by its sign.
    """
    # The samples are no policy's to four digits; what that stops has tests of its own.
    monkeypatch.setattr(Learner, "check", lambda *_, **__: None)
    batch, model = tree_batch(5), model_of("demo")
    noise_T = np.random.default_rng(6).normal(0, 0.02, len(batch.label_T)).astype(np.float32)
    batch = replace(batch, old_logprob_T=on_policy(batch, model).old_logprob_T + noise_T)
    experts = None
    if any(isinstance(penalty, ExpertLeak) for penalty in preset(name).penalties):
        prompts = [np.array(prompt, np.int64) for prompt in PREFIX]
        experts = pack_given(prompts, [np.array([2, 3, 4]), np.array([4, 4])])
    moved_to = {}
    for how in ("flat", "tree", "hidden states"):
        if how == "hidden states":
            in_small_chunks(monkeypatch)
        run = settings(preset(name), pack="flat" if how == "flat" else "tree")
        learner = Learner(copy.deepcopy(model), moved(model), run)
        learner.optimizer = torch.optim.SGD(learner.parameters, lr=1.0)
        learner.update(batch, batch.group_N, 0, experts)
        moved_to[how] = {
            n: p.detach() - dict(model.named_parameters())[n].detach()
            for n, p in learner.model.named_parameters()
        }
    assert_close(moved_to["tree"], moved_to["flat"], 1e-9)
    assert_close(moved_to["hidden states"], moved_to["flat"], 1e-9)


def test_rows_that_share_nothing_give_the_bits_of_flat_rows() -> None:
    rng = np.random.default_rng(0)
    rows = [np.append(n + 2, rng.integers(2, 31, 3 + n % 4)) for n in range(8)]
    batch = given_batch(rows, [2] * len(rows))
    found = {
        how: gradient(Learner(demo_model(), None, settings(pack=how, tokens_per_pass=12)), batch)
        for how in ("flat", "tree")
    }
    for name in found["flat"]:
        assert torch.equal(found["flat"][name], found["tree"][name])


def given_batch(rows: list[np.ndarray], prompt_N: list[int]) -> TokenBatch:
    batch = pack_given(
        [row[:n] for row, n in zip(rows, prompt_N, strict=True)],
        [row[n:] for row, n in zip(rows, prompt_N, strict=True)],
    )
    rng, tokens = np.random.default_rng(1), len(batch.label_T)
    return replace(
        batch,
        mask_T=np.ones(tokens, np.bool_),
        old_logprob_T=rng.normal(-3, 0.1, tokens).astype(np.float32),
        advantage_T=rng.normal(size=tokens),
    )


ROWS = st.lists(
    st.tuples(st.lists(st.integers(2, 4), min_size=1, max_size=8), st.integers(1, 4)),
    min_size=1,
    max_size=9,
)


@hypothesis(deadline=None, max_examples=150)
@given(drawn=ROWS, tokens=st.integers(1, 30), how=st.sampled_from(["tree", "flat"]))
def test_passes_hold_each_leaf_once_and_are_full(
    drawn: list[tuple[list[int], int]], tokens: int, how: str
) -> None:
    rows = [np.array(row, np.int64) for row, _ in drawn]
    prompt_N = [min(prompt, len(row)) for row, (_, prompt) in zip(rows, drawn, strict=True)]
    batch = given_batch(rows, prompt_N)
    run = reader.Reader.of(settings(pack=how, tokens_per_pass=tokens))
    passes = [leaf_N.tolist() for leaf_N in run.passes(batch)]
    assert sorted(leaf for leaf_N in passes for leaf in leaf_N) == list(range(len(rows)))

    def size(leaf_N: list[int]) -> int:
        """Tokens of these rows, what they share once."""
        if how == "flat":
            return sum(len(rows[n]) for n in leaf_N)
        return len({tuple(rows[n][: end + 1]) for n in leaf_N for end in range(len(rows[n]))})

    for leaf_N in passes:
        assert size(leaf_N) <= tokens or len(leaf_N) == 1
    for leaf_N, following in pairwise(passes):
        assert size([*leaf_N, following[0]]) > tokens
    found, whole = run.metrics(), size(list(range(len(rows))))
    assert found["pack/tokens"] == sum(map(len, rows))
    assert found["pack/unique"] == whole
    assert found["pack/repeated"] == pytest.approx(sum(map(size, passes)) / whole - 1)


def test_the_largest_trees_come_first_and_flat_rows_by_length() -> None:
    rows = [[9, 9], [3, 4, 5, 6], [3, 4, 7, 7], [8, 8, 8, 8, 8], [3, 4, 5, 6]]
    batch = given_batch([np.array(row) for row in rows], [1] * 5)
    order = {
        how: next(reader.Reader.of(settings(pack=how, tokens_per_pass=99)).passes(batch)).tolist()
        for how in ("tree", "flat")
    }
    assert order == {"tree": [1, 4, 2, 3, 0], "flat": [3, 1, 2, 4, 0]}
    assert list(reader.Reader.of(settings()).passes(batch.take(np.zeros(0, np.int64)))) == []


@pytest.mark.parametrize("how", ["tree", "flat"])
@pytest.mark.parametrize("chunked", [False, True])
def test_leaves_are_read_as_a_plain_forward_of_each_reads_them(
    how: str, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        in_small_chunks(monkeypatch)
    batch, plain = tree_batch(1), demo_model()
    learner = Learner(demo_model(), None, settings(pack=how))
    with torch.no_grad(), logits_of(learner, batch) as seen:
        found = learner.reader(learner.model, batch)
    assert bool(seen.made) != chunked
    with torch.no_grad():
        expected = []
        for n in range(len(batch)):
            row = torch.from_numpy(batch.input_I[slice(*batch.input_offset_N1[n : n + 2])])
            response = int(np.diff(batch.token_offset_N1)[n])
            logits = plain(input_ids=row[None], use_cache=False).logits[0].double()
            logprob_IV = (logits / learner.temperature).log_softmax(-1)
            answer = range(len(row) - response, len(row))
            expected += [float(logprob_IV[t - 1, row[t]]) for t in answer]
    assert found.logprob.tolist() == pytest.approx(expected, abs=1e-10)


def test_a_head_whose_chunks_are_made_twice_has_the_gradient_of_the_whole_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch, found = tree_batch(2), []
    for bound in (1 << 30, -1):
        monkeypatch.setattr(reader, "LARGE_LOGITS", bound)
        learner = Learner(demo_model(), None, settings(preset("gspo")))
        found.append(gradient(learner, batch))
        assert learner.reader.metrics()["pack/chunked_head"] == (bound == -1)
    assert_close(found[1], found[0], 1e-10)


@pytest.mark.parametrize("exact", [False, True])
def test_the_loss_from_hidden_states_is_that_from_logits(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reference and an entropy bonus; `exact`: the policy has not moved."""
    batch, loss = tree_batch(2), replace(PLAIN, kl=KL(0.1), entropy=0.01)
    found, metrics = [], []
    for chunked in (False, True):
        if chunked:
            in_small_chunks(monkeypatch)
        learner = Learner(demo_model(), moved(demo_model()), settings(loss))
        with logits_of(learner, batch) as seen:
            metrics.append(learner.gradient(batch, exact=exact).metrics())
        assert bool(seen.made) != chunked
        found.append(taken_gradient(learner.model))
    assert_close(found[1], found[0], 1e-10)
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-9, abs=1e-12)
    assert (metrics[0]["sampling/importance_sampling_ratio/mean"] == 1) == exact


def test_log_probs_that_differ_between_rows_of_one_token_are_kept_and_counted() -> None:
    rows = [np.array([3, 4, 5, 6]), np.array([3, 4, 5, 7])]
    batch = given_batch(rows, [2, 2])
    batch = replace(batch, old_logprob_T=np.array([-1.0, -2.0, -1.5, -3.0], np.float32))
    learner = Learner(demo_model(), None, settings())
    learner.gradient(batch)
    assert learner.reader.metrics()["pack/disagreeing"] == 0.5  # the 5 of both rows, of 4 tokens
    same = replace(batch, old_logprob_T=np.array([-1.0, -2.0, -1.0, -3.0], np.float32))
    expected = gradient(Learner(demo_model(), None, settings(pack="flat")), batch)
    assert_close(gradient(Learner(demo_model(), None, settings()), batch), expected, 1e-6)
    learner.gradient(same)
    assert learner.reader.metrics()["pack/disagreeing"] == 0


def test_a_pass_makes_one_matrix_of_logits_whose_gradient_takes_its_place() -> None:
    """Zeros that a gradient is written into would be a second one."""
    model, batch = demo_model(torch.float32), tree_batch(0)
    learner = Learner(model, None, settings())
    with logits_of(learner, batch) as seen:
        stats_T = learner.reader(model, batch)
        (stats_T.logprob.sum() + stats_T.entropy.sum()).backward()
    assert len(seen.made) == 1, seen.made.keys()
