"""Engines of other sizes, one after the other in this process."""

from pathlib import Path

import numpy as np
import pytest
from driven_engine import PROMPTS
from small_llama import Small, assert_same, small_llama

from pyrl.engine import EngineError
from pyrl.engine.vllm.engine import VLLMEngine
from pyrl.engine.vllm.release import BatchUpdate
from pyrl.engine.vllm.tap import Tap
from pyrl.sync import Sync, SyncError


def test_a_cache_too_small_for_all_loses_no_leaf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache holds 1024 tokens of 64 x 60: vLLM preempts branches and computes them again."""
    returned = []
    update_state = Tap.update_state

    def watched(tap: Tap, update: BatchUpdate | None) -> None:
        returned.extend(drawn for *_, drawn in (update.added if update else ()) if drawn)
        update_state(tap, update)

    monkeypatch.setattr(Tap, "update_state", watched)
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
        metrics = Sync(made.engine, learner, probe, "float32")(version)
        assert 0 < metrics["sync/difference"] < 1e-4
    if tied:
        other = small_llama(seed=3, tie_word_embeddings=False, vocab_size=vocabulary)
        named = "1 of .* damaged: lm_head.weight$" if vocabulary == 64 else "computes with others"
        with pytest.raises(SyncError, match=named):
            Sync(made.engine, other, probe, "float32")(3)
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
