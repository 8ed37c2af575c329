"""Engines of other sizes, one after the other in this process."""

from pathlib import Path

import numpy as np
import pytest
from driven_engine import PROMPTS, Driver, assert_as_a_fresh_forward
from model_families import tiny
from small_llama import Small, assert_same, small_llama

from pyrl.engine import RUNNING, EngineError, EngineFailure
from pyrl.engine.sync import Sync, SyncError
from pyrl.engine.vllm.channel import Frame
from pyrl.engine.vllm.engine import VLLMEngine
from pyrl.engine.vllm.release import BatchUpdate, EngineCoreOutput, FinishReason
from pyrl.engine.vllm.tap import Tap


def preempted(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What branches had drawn that came back after a preemption; it grows."""
    returned: list[list[int]] = []
    update_state = Tap.update_state

    def watched(tap: Tap, update: BatchUpdate | None) -> None:
        returned.extend(drawn for *_, drawn in (update.added if update else ()) if drawn)
        update_state(tap, update)

    monkeypatch.setattr(Tap, "update_state", watched)
    return returned


def test_a_cache_too_small_for_all_loses_no_leaf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds 1024 tokens of 64 x 60: vLLM preempts branches and computes them again."""
    returned = preempted(monkeypatch)
    crowded = Small(small_llama(), tmp_path, kv_cache_gib=0.0005)
    drivers = crowded.drivers()
    for driver in drivers:
        driver.submit([0, 1, 2, 3] * 16, limit=120)
        driver.finish()
    assert len(returned) > 10
    assert_same(*drivers)
    crowded.engine.close()


def test_a_crowded_cache_copies_what_is_left_of_it(tmp_path: Path) -> None:
    """1024 tokens of cache for 31 paths of 68: sources are preempted, and evicted when ended."""
    crowded = Small(small_llama(), tmp_path, kv_cache_gib=0.0005)
    drivers = crowded.drivers()
    for driver in drivers:
        driver.submit([0], limit=62, retain=True)
        driver.finish()
        driver.submit([1, 2, 3] * 10, limit=60)
        driver.step(30)
        for parent in (0, 5, 6, 7, 0):
            if parent == 0 or driver.traces[parent].finish == 0:
                driver.fork(parent, min(25, len(driver.traces[parent].tokens)), 3, seed=parent)
        driver.finish()
        driver.abort(0)
    assert_same(*drivers)
    crowded.engine.close()


def test_forks_of_branches_that_come_back_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Branches fork at their newest token, without some tokens, while others are preempted and
    resume by a copy."""
    returned = preempted(monkeypatch)
    crowded = Small(small_llama(), tmp_path, kv_cache_gib=0.0005)
    for seed in range(4):
        rng, driver = np.random.default_rng(seed), Driver(crowded.engine)
        driver.submit([0, 1, 2, 3] * 8, limit=60, seed_B=range(100 * seed, 100 * seed + 32))
        while driver.step():
            running = [b for b, trace in driver.traces.items() if trace.finish == RUNNING]
            if len(driver.traces) < 80 and running:
                parent = int(rng.choice(running))
                keep = len(driver.traces[parent].tokens)
                taken = rng.integers(0, 31, 12).tolist()
                driver.fork(parent, keep, 2, seed=int(rng.integers(1 << 30)), exclude=taken)
        # When a branch comes back decides where others fork: no reference grows the same trees.
        assert_as_a_fresh_forward(driver, crowded.model, 1.0, 1e-4)
    assert len(returned) > 10
    assert crowded.engine.work().copied_tokens > 300
    crowded.engine.close()


def planted(small: Small, records: str, change: int) -> None:
    """Change a column of the next frame."""
    frame = small.engine._core.frame

    def changed() -> Frame | None:
        found = frame()
        if found is not None:
            found.records_B[records] += change
        return found

    small.engine._core.frame = changed  # type: ignore[method-assign]


@pytest.mark.parametrize("column", ["position", "token"])
def test_numbers_of_another_token_end_the_engine(tmp_path: Path, column: str) -> None:
    """And an engine that has failed says so, whatever it is asked."""
    small = Small(small_llama(), tmp_path)
    driver, _ = small.drivers()
    driver.submit([0, 1])
    driver.step(2)
    planted(small, column, 1)
    with pytest.raises(EngineFailure, match=r"were given tokens .* but .* were drawn at"):
        driver.step()
    with pytest.raises(EngineFailure, match="the engine is closed, or has failed before"):
        driver.step()
    small.engine.abort(np.array([0, 1]))
    with pytest.raises(EngineFailure, match="the engine is closed, or has failed before"):
        small.engine.load_weights(small.model.state_dict().items(), 2)


def test_a_request_that_ends_before_its_branch_loses_no_token(tmp_path: Path) -> None:
    small = Small(small_llama(), tmp_path)
    driver, _ = small.drivers()
    driver.submit([0, 1])
    driver.step(2)
    outputs = small.engine._core.outputs

    def ended() -> list[EngineCoreOutput]:
        found = outputs()
        found[0].finish_reason = FinishReason.ABORT
        return found

    small.engine._core.outputs = ended  # type: ignore[method-assign]
    lengths = small.engine._table.length_R.copy()
    with pytest.raises(EngineFailure, match="ended before their branches"):
        driver.step()
    assert (small.engine._table.length_R == lengths).all()


def test_a_thousand_branches_at_once(tmp_path: Path) -> None:
    many = Small(small_llama(), tmp_path, max_rows=1024)
    drivers = many.drivers()
    for driver in drivers:
        driver.submit([0, 1, 2, 3] * 256, limit=6)
        driver.finish()
    assert len(drivers[0].traces) == 1024
    assert_same(*drivers)
    many.engine.close()


def test_a_model_that_vllm_cannot_run_is_refused(tmp_path: Path) -> None:
    small_llama(hidden_size=24, num_attention_heads=6, num_key_value_heads=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(EngineError, match=r"cannot run .*head_dim"):
        VLLMEngine(str(tmp_path), [2])
    with pytest.raises(EngineError, match=r"cannot run .*nowhere"):
        VLLMEngine(str(tmp_path / "nowhere"), [2])


@pytest.mark.parametrize(("tied", "vocabulary"), [(False, 31), (True, 31), (True, 64)])
def test_a_tied_head_is_carried_too(tmp_path: Path, tied: bool, vocabulary: int) -> None:
    """vLLM pads a vocabulary of 31: then not only the layers, the embedding goes by its loader."""
    made = Small(small_llama(tie_word_embeddings=tied, vocab_size=vocabulary), tmp_path)
    probe = np.arange(4, 31, dtype=np.int32)
    for version in (1, 2):  # by then the head has been packed with weights of another version
        learner = small_llama(version, tie_word_embeddings=tied, vocab_size=vocabulary)
        metrics = Sync(made.engine, learner, probe)(version)
        assert 0 < metrics["sync/difference"] < 1e-4
    if tied:
        other = small_llama(seed=3, tie_word_embeddings=False, vocab_size=vocabulary)
        named = "1 of .* damaged: lm_head.weight$" if vocabulary == 64 else "computes with others"
        with pytest.raises(SyncError, match=named):
            Sync(made.engine, other, probe)(3)
    made.engine.close()


def test_copies_can_be_left_out(tmp_path: Path) -> None:
    plain = Small(small_llama(), tmp_path, copy_forks=False)
    driver, _ = plain.drivers()
    driver.submit([0], limit=100, seed_B=[plain.long_seed(0, 71)])
    driver.step(60)
    driver.fork(0, 50)
    driver.step()
    assert plain.engine.work().recomputed_tokens == len(PROMPTS[0]) + 50 - 32
    plain.engine.close()


def test_a_model_that_vllm_wraps_is_sent_to_a_process_of_its_own(tmp_path: Path) -> None:
    tiny("olmo2").save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=r"code of transformers.*\(--vllm.own-process True\)"):
        VLLMEngine(str(tmp_path), [2])


def test_experts_that_would_go_stale_on_a_cpu_are_refused(tmp_path: Path) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    with pytest.raises(EngineError, match="does not compute with new weights of a mixture of exp"):
        VLLMEngine(str(tmp_path), [2])
