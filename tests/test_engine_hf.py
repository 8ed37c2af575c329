"""The embedded engine against transformers itself: forks, aborts and limits change no number."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pyrl.engine import RUNNING, STOPPED, TRUNCATED, Branches, Sampling, Work
from pyrl.engine.hf import HFEngine

SHAPE = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
PROMPTS = [np.array(p, np.int32) for p in ([5, 6, 7, 8, 9], [10, 11], [12], [13, 14, 15, 16, 17])]
EOS = 3


def llama(dtype: torch.dtype = torch.float64, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | more)).to(dtype)


def qwen2(dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(dtype)


@dataclass
class Trace:
    """What a driver has seen of one branch; a fork starts with what it shares."""

    prompt: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    finish: int = RUNNING

    def shared(self, keep: int) -> "Trace":
        lists = (self.tokens, self.logprobs, self.entropies)
        return Trace(self.prompt, *(values[:keep] for values in lists))


class Driver:
    """Records every branch of an engine."""

    def __init__(self, engine: HFEngine, temperature: float = 1.0) -> None:
        self.engine = engine
        self.traces: dict[int, Trace] = {}
        engine.start(Sampling(temperature=temperature))

    def submit(
        self,
        prompt_B: list[int],
        *,
        limit: int | list[int] = 8,
        seed_B: Iterable[int] | None = None,
        retain: bool = False,
    ) -> list[int]:
        ids = [len(self.traces) + b for b in range(len(prompt_B))]
        self.engine.submit(
            Branches(
                PROMPTS,
                np.array(prompt_B, np.int64),
                np.array(ids, np.int64),
                np.array(ids if seed_B is None else seed_B, np.uint64),
                np.broadcast_to(np.array(limit, np.int64), len(ids)),
                retain,
            )
        )
        self.traces |= {b: Trace(PROMPTS[p]) for b, p in zip(ids, prompt_B, strict=True)}
        return ids

    def fork(self, parent: int, keep: int, count: int = 1, seed: int = 100) -> list[int]:
        ids = [len(self.traces) + b for b in range(count)]
        seed_B = np.arange(seed, seed + count).astype(np.uint64)
        self.engine.fork(parent, keep, np.array(ids), seed_B)
        self.traces |= {b: self.traces[parent].shared(keep) for b in ids}
        return ids

    def abort(self, *branches: int) -> None:
        self.engine.abort(np.array(branches))

    def step(self, count: int = 1) -> list[int]:
        for _ in range(count):
            sampled = self.engine.step()
            columns = (
                sampled.branch_B,
                sampled.token_B,
                sampled.logprob_B,
                sampled.entropy_B,
                sampled.finish_B,
            )
            for branch, token, logprob, entropy, finish in zip(*columns, strict=True):
                trace = self.traces[int(branch)]
                trace.tokens.append(int(token))
                trace.logprobs.append(float(logprob))
                trace.entropies.append(float(entropy))
                trace.finish = int(finish)
        return sampled.branch_B.tolist()

    def finish(self) -> None:
        while self.step():
            pass


def assert_as_a_fresh_forward(
    driver: Driver, model: PreTrainedModel, temperature: float = 1.0, tolerance: float = 2e-6
) -> None:
    """Every recorded number equals that of one forward over the whole path, nothing cached."""
    assert driver.traces
    for trace in driver.traces.values():
        if not trace.tokens:
            continue
        path = torch.tensor([*trace.prompt.tolist(), *trace.tokens])
        with torch.no_grad():
            logits = model(input_ids=path[None], use_cache=False).logits[0].double()
        logp = (logits[len(trace.prompt) - 1 : -1] / temperature).log_softmax(-1)
        chosen = logp[torch.arange(len(trace.tokens)), trace.tokens]
        np.testing.assert_allclose(trace.logprobs, chosen, rtol=tolerance, atol=tolerance)
        entropy = -(logp.exp() * logp).sum(-1)
        np.testing.assert_allclose(trace.entropies, entropy, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", [llama, qwen2])
@pytest.mark.parametrize("max_rows", [2, 256])
def test_greedy_tokens_equal_those_of_generate(
    make: Callable[[], PreTrainedModel], max_rows: int
) -> None:
    reference = make()
    driver = Driver(HFEngine(make(), [EOS], max_rows=max_rows), temperature=0)
    limits = [9, 4, 12, 7, 9]
    driver.submit([0, 1, 2, 3, 0], limit=limits)
    driver.finish()
    reasons = set()
    for trace, limit in zip(driver.traces.values(), limits, strict=True):
        prompt = torch.from_numpy(trace.prompt).long()[None]
        expected = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=EOS,
            pad_token_id=0,
        )[0, prompt.shape[1] :].tolist()
        assert trace.tokens == expected
        assert trace.finish == (STOPPED if expected[-1] == EOS else TRUNCATED)
        reasons.add(trace.finish)
    assert TRUNCATED in reasons


@pytest.mark.parametrize("make", [llama, qwen2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 2e-6)])
def test_sampled_statistics_equal_a_fresh_forward(
    make: Callable[..., PreTrainedModel], dtype: torch.dtype, tolerance: float
) -> None:
    driver = Driver(HFEngine(make(dtype), [EOS], max_rows=3), temperature=0.7)
    driver.submit([0, 1, 2, 3, 0, 1], limit=[20, 9, 14, 1, 20, 3])
    driver.finish()
    assert_as_a_fresh_forward(driver, make(dtype), 0.7, tolerance)


def test_a_seed_replays_whatever_runs_beside_it() -> None:
    crowd = Driver(HFEngine(llama(), [EOS], max_rows=3))
    crowd.submit([0, 1, 2, 3, 0, 1], limit=12, seed_B=[7, 8, 9, 10, 2**64 - 1, 12])
    crowd.finish()
    for branch, (prompt, seed) in {4: (0, 2**64 - 1), 5: (1, 12)}.items():
        alone = Driver(HFEngine(llama(), [EOS]))
        alone.submit([prompt], limit=12, seed_B=[seed])
        alone.finish()
        assert alone.traces[0].tokens == crowd.traces[branch].tokens


def test_different_seeds_draw_different_responses() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0] * 8, limit=8)
    driver.finish()
    assert len({tuple(trace.tokens) for trace in driver.traces.values()}) == 8


def test_a_fork_at_0_is_a_fresh_branch() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0], limit=10, seed_B=[1])
    driver.step(4)
    (fork,) = driver.fork(0, 0, seed=55)
    driver.finish()
    fresh = Driver(HFEngine(llama(), []))
    fresh.submit([0], limit=10, seed_B=[55])
    fresh.finish()
    assert driver.traces[fork].tokens == fresh.traces[0].tokens


def test_forks_change_nothing_for_their_parent() -> None:
    lone = Driver(HFEngine(llama(), []))
    lone.submit([0], limit=12, seed_B=[1])
    lone.finish()
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0], limit=12, seed_B=[1])
    driver.step(5)
    driver.fork(0, 5, 2)
    driver.step(2)
    driver.fork(0, 3, 2)
    driver.finish()
    assert driver.traces[0].tokens == lone.traces[0].tokens
    assert_as_a_fresh_forward(driver, llama())


def test_no_prefix_is_computed_twice() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 0, 0, 1], limit=10)
    driver.step(4)
    assert driver.engine.work() == Work(7, 4 * 3, 5 + 5)
    driver.fork(0, 2, 3)  # inside
    driver.fork(1, 4, 2)  # at the end: the fourth token has been sampled and not computed
    driver.fork(3, 0)
    copied = 10 + 3 * (5 + 2) + 2 * (5 + 4) + 2
    driver.step()
    assert driver.engine.work() == Work(7, 4 * 4, copied)
    driver.finish()
    # A leaf's last token is never computed.
    decoded = 4 * 9 + 3 * (9 - 2) + 2 * (9 - 4) + 9
    assert driver.engine.work() == Work(7, decoded, copied)
    assert_as_a_fresh_forward(driver, llama())


def test_forks_at_the_end_outlive_a_parent_aborted_in_the_same_step() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1], limit=8)
    driver.step(3)
    first = driver.fork(0, 3, 2)
    driver.abort(0)
    assert driver.step() == [1, *first]
    assert driver.engine.work() == Work(7, 2 * 3, 2 * (5 + 3))
    driver.finish()
    assert len(driver.traces[first[0]].tokens) == 8
    assert_as_a_fresh_forward(driver, llama())


def test_an_abandoned_token_is_not_computed() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1], limit=8)
    driver.step(3)
    driver.abort(0, *driver.fork(0, 3, 2))
    assert driver.step() == [1]
    assert driver.engine.work() == Work(7, 2 * 2 + 1, 0)


def test_a_fork_in_the_middle_outlives_an_aborted_parent() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1], limit=8)
    driver.step(3)
    (fork,) = driver.fork(0, 1)
    driver.abort(0)
    driver.finish()
    assert len(driver.traces[fork].tokens) == 8
    assert_as_a_fresh_forward(driver, llama())


def test_finished_branches_fork_while_retained() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1], limit=6, retain=True)
    driver.finish()
    late = driver.fork(0, 4, 2) + driver.fork(1, 5) + driver.fork(1, 0)
    driver.finish()
    assert [len(driver.traces[b].tokens) for b in late] == [6] * 4
    assert driver.engine.work().decode_tokens == 2 * 5 + 2 * 1 + 0 + 5
    assert_as_a_fresh_forward(driver, llama())
    again = driver.fork(late[0], 5)  # a sibling inherits retain
    driver.abort(0, 1, *late)
    driver.finish()
    assert_as_a_fresh_forward(driver, llama())
    driver.abort(*again)
    driver.engine.load_weights(None, 1)


def test_forks_wait_for_rows_and_go_before_new_prompts() -> None:
    driver = Driver(HFEngine(llama(), [], max_rows=2))
    driver.submit([0, 1, 2], limit=4)
    assert driver.step() == [0, 1]
    driver.step()
    forks = driver.fork(0, 2, 2)
    nested = driver.fork(forks[0], 1)  # of a branch that itself still waits
    driver.step(2)
    assert driver.step() == forks
    driver.step()
    assert driver.step() == [nested[0], 2]
    driver.finish()
    assert {len(trace.tokens) for trace in driver.traces.values()} == {4}
    assert driver.engine.work().decode_tokens == 3 * 3 + 2 * 1 + 2
    assert_as_a_fresh_forward(driver, llama())


def test_branches_are_reported_in_the_order_of_entry() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1, 2, 3, 0], limit=[2, 9, 9, 3, 9])
    assert driver.step() == [0, 1, 2, 3, 4]
    driver.fork(1, 0)
    driver.step()
    assert driver.step() == [1, 2, 3, 4, 5]
    driver.abort(2)
    assert driver.step() == [1, 4, 5]
    driver.finish()
    assert_as_a_fresh_forward(driver, llama())


@pytest.mark.parametrize("trial", range(12))
def test_random_forks_and_aborts_change_no_number_and_compute_each_token_once(trial: int) -> None:
    rng = np.random.default_rng(trial)
    retain = bool(trial % 2)
    driver = Driver(HFEngine(llama(), [EOS], max_rows=int(rng.integers(2, 12))))
    driver.submit(rng.integers(0, 4, 6).tolist(), limit=12, retain=retain)
    origin = {b: (b, 0) for b in driver.traces}  # parent and keep
    aborted: set[int] = set()
    for _ in range(25):
        driver.step()
        for parent in rng.permutation(list(driver.traces))[:2].tolist():
            trace = driver.traces[parent]
            if parent in aborted or (trace.finish and not retain) or len(driver.traces) > 24:
                continue
            keep = int(rng.integers(0, len(trace.tokens) + (trace.finish == RUNNING)))
            origin |= dict.fromkeys(driver.fork(parent, keep, 2), (parent, keep))
            if len(trace.tokens) > origin[parent][1] and rng.random() < 0.5:
                driver.abort(parent)
                aborted.add(parent)
    driver.finish()
    assert aborted
    assert_as_a_fresh_forward(driver, llama())

    def owner(branch: int, token: int) -> tuple[int, int]:
        while token < origin[branch][1]:
            branch = origin[branch][0]
        return branch, token

    # A token is computed if something was drawn after it, by whichever branch.
    computed = {owner(b, t) for b, x in driver.traces.items() for t in range(len(x.tokens) - 1)}
    assert driver.engine.work().decode_tokens == len(computed)


def test_dropout_is_off_while_sampling() -> None:
    model = llama(attention_dropout=0.5)
    driver = Driver(HFEngine(model, []))
    model.train()
    driver.submit([0, 1], limit=8)
    driver.finish()
    assert_as_a_fresh_forward(driver, llama())


def test_weights_are_replaced_by_name_and_version() -> None:
    other = llama()
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    engine = HFEngine(llama(), [])
    engine.load_weights(other.state_dict().items(), version=4)
    assert engine.weight_version() == 4
    driver = Driver(engine)
    driver.submit([0, 1], limit=8)
    driver.finish()
    assert_as_a_fresh_forward(driver, other)


def test_shared_weights_that_the_learner_changed_are_sampled_from() -> None:
    model = llama()
    driver = Driver(HFEngine(model, []))
    driver.submit([0], limit=4)
    driver.finish()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    driver.engine.load_weights(None, 1)
    driver.traces.clear()
    driver.submit([0, 1], limit=8)
    driver.finish()
    assert_as_a_fresh_forward(driver, model)


def test_weights_must_fit_exactly() -> None:
    engine = HFEngine(llama(), [])
    state = llama().state_dict()
    before = engine._model.lm_head.weight.clone()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    missing = {name: value for name, value in state.items() if name != "model.norm.weight"}
    for weights, message in (
        (missing, r"missing names \['model.norm.weight'\]"),
        (state | {"extra": torch.zeros(1)}, r"unknown names \['extra'\]"),
        (state | {"model.norm.weight": torch.zeros(3)}, r"expected \(24,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load_weights(weights.items(), 1)
    assert engine.weight_version() == 0
    assert torch.equal(engine._model.lm_head.weight, before)


def test_tied_weights_need_one_name_and_must_agree() -> None:
    source = llama(tie_word_embeddings=True)
    engine = HFEngine(llama(tie_word_embeddings=True), [])
    state = {name: value + 0.1 for name, value in source.state_dict().items()}
    with pytest.raises(ValueError, match="equal tensors for the tied weights"):
        engine.load_weights((state | {"lm_head.weight": state["lm_head.weight"] + 1}).items(), 1)
    state.pop("lm_head.weight")
    engine.load_weights(state.items(), 1)
    assert torch.equal(engine._model.lm_head.weight, state["model.embed_tokens.weight"])


def test_weights_never_change_under_a_cache() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0], limit=3, retain=True)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="1 branches are running, queued or retained"):
            driver.engine.load_weights(None, 1)
        driver.step(2)
    driver.abort(0)
    driver.engine.load_weights(None, 1)
    assert driver.engine.weight_version() == 1


def test_bad_requests_say_what_was_expected() -> None:
    driver = Driver(HFEngine(llama(), []))
    with pytest.raises(
        ValueError, match="prompt of 5 tokens fits the model's 64 positions, got 60"
    ):
        driver.submit([0], limit=60)
    with pytest.raises(ValueError, match="limit of at least 1"):
        driver.submit([0], limit=0)
    driver.submit([0], limit=5)
    driver.step(2)
    with pytest.raises(RuntimeError, match="1 branches are running"):
        driver.engine.start(Sampling())
    with pytest.raises(ValueError, match=r"keep in 0\.\.2 \(running parent\), got 3"):
        driver.fork(0, 3)
    with pytest.raises(ValueError, match="branch 77 is unknown"):
        driver.fork(77, 0)
    with pytest.raises(ValueError, match="branch 77 is unknown"):
        driver.abort(77)
    with pytest.raises(ValueError, match="identifiers that are not in use"):
        driver.engine.fork(0, 1, np.array([5, 5]), np.array([1, 2], np.uint64))
    with pytest.raises(ValueError, match="identifiers that are not in use"):
        driver.engine.fork(0, 1, np.array([0]), np.array([1], np.uint64))
    driver.finish()
    with pytest.raises(ValueError, match="branch 0 is unknown"):
        driver.fork(0, 1)
    with pytest.raises(ValueError, match="max_rows: expected at least 1"):
        HFEngine(llama(), [], max_rows=0)


def test_a_finished_branch_cannot_be_forked_behind_its_last_token() -> None:
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0], limit=3, retain=True)
    driver.finish()
    with pytest.raises(ValueError, match=r"keep in 0\.\.2 \(finished parent\), got 3"):
        driver.fork(0, 3)


def test_branches_must_name_a_prompt() -> None:
    one = np.zeros(1, np.int64)
    branches = Branches(PROMPTS, one - 1, one, one.astype(np.uint64), one + 1)
    with pytest.raises(ValueError, match=r"expected prompt_B in 0\.\."):
        HFEngine(llama(), []).submit(branches)


@pytest.mark.parametrize("prompt", [[], [5, 31], [-1]])
def test_prompts_must_have_tokens_of_the_vocabulary(prompt: list[int]) -> None:
    one = np.zeros(1, np.int64)
    branches = Branches([np.array(prompt, np.int32)], one, one, one.astype(np.uint64), one + 1)
    with pytest.raises(ValueError, match="prompt 0: expected at least one token, and ids below 31"):
        HFEngine(llama(), []).submit(branches)


def test_an_engine_that_was_not_started_does_not_step() -> None:
    with pytest.raises(RuntimeError, match="call start first"):
        HFEngine(llama(), []).step()


def test_an_idle_engine_samples_nothing() -> None:
    engine = HFEngine(llama(), [])
    engine.start(Sampling())
    assert engine.step().branch_B.size == 0


def test_models_that_rescale_their_logits_are_refused() -> None:
    model = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=8.0))
    with pytest.raises(ValueError, match="changes its hidden states or its logits"):
        HFEngine(model, [])


def test_long_prompts_are_prefilled_in_several_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyrl.engine.hf.PREFILL_TOKENS", 6)
    driver = Driver(HFEngine(llama(), []))
    driver.submit([0, 1, 2, 3], limit=5)
    driver.finish()
    assert driver.engine.work().prompt_tokens == 13
    assert_as_a_fresh_forward(driver, llama())
