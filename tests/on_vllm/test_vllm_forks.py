"""What a fork copies from its source's last block, and when it has to compute it again."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driven_engine import PROMPTS, Driver
from small_llama import Small, assert_same

from pyrl.engine.vllm import release
from pyrl.engine.vllm.forks import KEY, Copies, ForkCopies

pytestmark = pytest.mark.skipif(
    not release.HAS_FORK_COPIES, reason="older releases compute a fork's last block again"
)
BLOCK = 32


def grown(small: Small, length: int, *, ended: bool = False) -> tuple[Driver, Driver]:
    """A response of that length on both engines, and no prompt in vLLM's cache before it."""
    small.engine.load_weights(small.model.state_dict().items(), 1)
    drivers = small.drivers()
    seed = small.long_seed(0, length + 1)
    for driver in drivers:
        driver.submit([0], limit=length if ended else length + 9, seed_B=[seed], retain=ended)
        driver.step(length)
    return drivers


def fork_all(drivers: tuple[Driver, ...], places: list[int]) -> None:
    for driver in drivers:
        for i, keep in enumerate(places):
            driver.fork(0, keep, seed=100 + i)
        driver.step()


@pytest.mark.parametrize("keep", [0, 1, 20, 26, 27, 28, 40, 58, 59, 60])
def test_a_fork_of_a_running_branch_computes_one_token_again(small: Small, keep: int) -> None:
    drivers = grown(small, 60)
    before = small.engine.work()
    fork_all(drivers, [keep, keep])
    after = small.engine.work()
    # The newest token of the source has no cache yet: whoever has it computes it.
    assert after.recomputed_tokens - before.recomputed_tokens == 2 * (keep < 60)
    assert after.copied_tokens - before.copied_tokens == 2 * (len(PROMPTS[0]) + keep - 1)
    for driver in drivers:
        driver.finish()
    assert_same(*drivers)


def test_forks_of_an_ended_branch_copy_from_full_blocks(small: Small) -> None:
    """Its path of 75 tokens has filled two; the others begin in the first one's second block."""
    drivers = grown(small, 70, ended=True)
    before = small.engine.work().recomputed_tokens
    fork_all(drivers, [59, 28, 40, 50])
    assert small.engine.work().recomputed_tokens - before == 4
    fork_all(drivers, [68])
    past = len(PROMPTS[0]) + 68 - 2 * BLOCK
    assert small.engine.work().recomputed_tokens - before == 4 + past
    for driver in drivers:
        driver.finish()
    small.clear(drivers[0])
    assert_same(*drivers)


def test_a_fork_of_a_fork_enters_with_it(small: Small) -> None:
    drivers = grown(small, 60)
    for driver in drivers:
        (child,) = driver.fork(0, 40, seed=7)
        (grandchild,) = driver.fork(child, 38, seed=8)
        driver.fork(grandchild, 3, seed=9)
        driver.finish()
    assert_same(*drivers)


def test_a_later_branch_copies_what_it_shares_of_the_prompt(small: Small) -> None:
    drivers = grown(small, 40)
    before = small.engine.work().copied_tokens
    for driver in drivers:
        driver.submit([0, 0], limit=5)
        driver.finish()
    assert small.engine.work().copied_tokens - before == 2 * (len(PROMPTS[0]) - 1)
    assert_same(*drivers)


# -- what an engine hardly ever comes to --


class Scheduler:
    """vLLM's side of a connector, over blocks of four tokens; block 9's content is "a"."""

    def __init__(self, *, layers: int = 1) -> None:
        spec = release.AttentionSpec(block_size=4, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.connector = ForkCopies(
            SimpleNamespace(kv_transfer_config=release.KVTransferConfig()),
            release.KVConnectorRole.SCHEDULER,
            SimpleNamespace(
                num_blocks=12, kv_cache_groups=layers * [SimpleNamespace(kv_cache_spec=spec)]
            ),
        )
        self.contents = [SimpleNamespace(block_hash=None) for _ in range(12)]
        self.blocks: dict[str, list[int]] = {}
        manager = SimpleNamespace(
            get_block_ids=lambda name: (self.blocks.get(name, []),),
            block_pool=SimpleNamespace(blocks=self.contents),
        )
        self.connector.bind_kv_cache_manager(manager)

    def enter(
        self, name: str, blocks: list[int], tokens: int, source: str = "", shared: int = 0
    ) -> tuple[Any, int]:
        """The request and how many tokens it was spared."""
        request = SimpleNamespace(
            request_id=name,
            num_tokens=tokens,
            num_computed_tokens=0,
            sampling_params=SimpleNamespace(extra_args={KEY: [source, shared]}),
        )
        spared, later = self.connector.get_num_new_matched_tokens(request, 0)
        assert not later
        self.blocks[name] = blocks
        given = SimpleNamespace(get_block_ids=lambda: (blocks,))
        self.connector.update_state_after_alloc(request, given, spared)
        request.num_computed_tokens = spared  # as vLLM counts, before anything is copied
        return request, spared

    def step(self, **scheduled: int) -> list[tuple[int, int]]:
        output = SimpleNamespace(num_scheduled_tokens=scheduled)
        return self.connector.build_connector_meta(output).blocks

    def ended_source(self) -> None:
        """Seven tokens in blocks 9 and 3, of which the first was filled."""
        request, _ = self.enter("s", [9, 3], 7)
        self.step(s=7)
        request.num_computed_tokens = 7
        self.contents[9].block_hash = "a"
        self.connector.request_finished_all_groups(request, ([9, 3],))
        del self.blocks["s"]


def test_the_block_that_is_left_is_copied_once() -> None:
    scheduler = Scheduler()
    scheduler.ended_source()
    assert scheduler.enter("f", [5, 6], 7, "s", 6)[1] == 4
    assert scheduler.step(f=3) == [(9, 5)]
    assert scheduler.step(f=1) == []


def test_a_source_that_is_not_computed_yet_is_not_copied() -> None:
    scheduler = Scheduler()
    source, _ = scheduler.enter("s", [1, 2], 8)
    assert scheduler.enter("f", [3, 4], 8, "s", 7)[1] == 0  # enters in the same step
    scheduler.step(s=8, f=8)
    source.num_computed_tokens = 5  # preempted, and read again in parts
    assert scheduler.enter("g", [5, 6], 8, "s", 7)[1] == 5
    assert scheduler.step(s=3, g=3) == [(1, 5), (2, 6)]
    scheduler.blocks["s"] = []  # preempted
    assert scheduler.enter("h", [7, 8], 8, "s", 7)[1] == 0


def test_what_a_source_copies_itself_is_not_copied_in_the_same_step() -> None:
    """All blocks are read before one is written."""
    scheduler = Scheduler()
    scheduler.ended_source()
    assert scheduler.enter("f", [5, 6], 7, "s", 6)[1] == 4
    assert scheduler.enter("g", [7, 8], 7, "f", 6)[1] == 0
    assert scheduler.step(f=3, g=7) == [(9, 5)]
    assert scheduler.enter("h", [1, 2], 7, "f", 6)[1] == 4
    assert scheduler.step(h=3) == [(5, 1)]


def test_an_evicted_block_is_not_copied() -> None:
    scheduler = Scheduler()
    scheduler.ended_source()
    scheduler.contents[9].block_hash = "b"
    assert scheduler.enter("f", [5, 6], 7, "s", 6)[1] == 0


def test_a_block_with_the_same_hash_is_not_copied_before_it_is_computed() -> None:
    """Evicted, and given to a request with the same tokens in the step in which the fork enters."""
    scheduler = Scheduler()
    scheduler.ended_source()
    scheduler.enter("same", [9], 5)
    assert scheduler.enter("f", [5, 6], 7, "s", 6)[1] == 0
    scheduler.step(same=2, f=7)  # read in parts: the rest of block 9 follows
    assert scheduler.enter("g", [7, 8], 7, "s", 6)[1] == 0
    scheduler.step(same=3, g=7)


def test_no_more_blocks_are_remembered_than_there_are() -> None:
    scheduler = Scheduler()
    for i in range(5):
        request, _ = scheduler.enter(f"s{i}", [1, 2, 3], 12)
        scheduler.step(**{f"s{i}": 12})
        request.num_computed_tokens = 12
        scheduler.connector.request_finished_all_groups(request, ([1, 2, 3],))
    assert list(scheduler.connector._ended) == ["s1", "s2", "s3", "s4"]


def test_a_cache_of_several_kinds_of_layers_is_left_alone() -> None:
    scheduler = Scheduler(layers=2)
    scheduler.ended_source()
    assert scheduler.enter("f", [5, 6], 7, "s", 6)[1] == 0
    assert scheduler.step(f=7) == []


def test_all_blocks_are_read_before_one_is_written() -> None:
    """A block that was evicted in this step can be another fork's."""
    connector = Scheduler().connector
    cache = torch.arange(12.0)[:, None].repeat(1, 4)
    connector.register_kv_caches({"layer": cache})
    connector.bind_connector_metadata(Copies([(1, 2), (2, 3)]))
    connector.start_load_kv(None)
    assert cache[:5, 0].tolist() == [0, 1, 1, 2, 4]
