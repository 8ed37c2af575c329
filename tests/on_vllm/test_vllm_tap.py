"""The taps alone: whose row is whose, what is written, and that vLLM takes the drawn token."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrl.engine.vllm import release
from pyrl.engine.vllm.channel import Channel, Frame
from pyrl.engine.vllm.tap import KEY, UNCLAIMED, Drawing, Tap, TapV2
from pyrl.logits.sample_tokens import sample_tokens
from pyrl.logits.sampling import Exclude, Sampling

ONE_WAY = next(way for way in type(release.SWAP) if way is not release.SWAP)
NAMES = (f"tap test {number}" for number in count())


def params(
    ticket: int, seed: int, first: int = 0, prompt: int = 5, exclude: Sequence[int] = ()
) -> release.SamplingParams:
    return release.SamplingParams(extra_args={KEY: [ticket, seed, first, prompt, [*exclude]]})


def config() -> Any:
    return SimpleNamespace(instance_id=next(NAMES))


def drawing(settings: Any, folder: Path) -> Drawing:
    found = UNCLAIMED.pop()
    found.channel, found.version = Channel.create(folder / settings.instance_id, 4096), 3
    return found


def frame(made: Drawing) -> Frame:
    assert made.channel is not None
    found = made.channel.read()
    assert found is not None
    return found


@pytest.fixture
def v1(tmp_path: Path) -> tuple[Tap, Drawing]:
    settings = config()
    tap = Tap(settings, torch.device("cpu"), False)
    return tap, drawing(settings, tmp_path)


def normal(rows: int, vocabulary: int = 50, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


Rows = list[tuple[int, list[int]] | None]


def shuffle(rows: Rows, rng: np.random.Generator, tickets: "count[int]") -> release.BatchUpdate:
    """One step of a batch as vLLM keeps it, applied to `rows`: (ticket, drawn tokens) each."""
    leave = rng.random(len(rows)) < 0.2
    removed = np.flatnonzero(leave).tolist()
    for index in removed:
        rows[index] = None
    added = []
    for _ in range(int(rng.integers(0, 4))):
        index = rows.index(None) if None in rows else len(rows)
        ticket, drawn = next(tickets), [0] * int(rng.integers(0, 3))
        rows[index : index + 1] = [(ticket, drawn)]
        added.append((index, params(ticket, ticket + 10, first=ticket % 4), None, drawn))
    moved = []
    while None in rows:
        last = rows.pop()
        if last is not None:
            hole = rows.index(None)
            rows[hole] = last
            moved.append((len(rows), hole, ONE_WAY))
    for _ in range(int(rng.integers(0, 3)) if len(rows) > 1 else 0):
        a, b = rng.choice(len(rows), 2, replace=False).tolist()
        rows[a], rows[b] = rows[b], rows[a]
        moved.append((a, b, release.SWAP))
    replaced = [index for index in removed if index not in {x[0] for x in added}]
    return release.BatchUpdate(len(rows), replaced, added, moved)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_followed_wherever_they_go(v1: tuple[Tap, Drawing], seed: int) -> None:
    tap, made = v1
    rng, tickets = np.random.default_rng(seed), count()
    rows: Rows = []
    for _ in range(60):
        update = shuffle(rows, rng, tickets)
        tap.update_state(update if update.removed or update.added or update.moved else None)
        if not rows:
            continue
        alive = [row for row in rows if row is not None]
        ticket_B = np.array([ticket for ticket, _ in alive])
        position_B = np.array([ticket % 4 + len(drawn) for ticket, drawn in alive])
        logits = normal(len(rows), seed=seed)
        expected = sample_tokens(logits, (ticket_B + 10).astype(np.uint64), position_B, Sampling())
        tap.apply(logits)
        seen = frame(made)
        assert seen.version == 3
        assert seen.records_B["ticket"].tolist() == ticket_B.tolist()
        assert seen.records_B["position"].tolist() == position_B.tolist()
        assert seen.records_B["token"].tolist() == expected.token_B.tolist()
        for (_, drawn), token in zip(alive, expected.token_B.tolist(), strict=True):
            drawn.append(token)  # vLLM's own list: the next position


def test_excluded_tokens_are_those_of_the_first_draw_alone(v1: tuple[Tap, Drawing]) -> None:
    """Also after the row has moved, and has left the batch and come back."""
    tap, made = v1
    drawn: dict[int, list[int]] = {row: [] for row in range(3)}
    taken = [range(10, 50), (), range(10)]
    added = [
        (row, params(row, 100 + row, first=4, exclude=taken[row]), None, drawn[row])
        for row in range(3)
    ]
    tap.update_state(release.BatchUpdate(3, [], added, []))
    tap.update_state(release.BatchUpdate(3, [], [], [(0, 2, release.SWAP)]))
    again = [(2, params(0, 100, first=4, exclude=taken[0]), None, drawn[0])]
    tap.update_state(release.BatchUpdate(3, [], again, []))
    for position in (4, 5):
        logits, keys = normal(3), np.array([102, 101, 100], np.uint64)
        exclude = Exclude.of_rows([np.array(taken[row], np.int32) for row in (2, 1, 0)])
        expected = sample_tokens(
            logits, keys, np.full(3, position), Sampling(), exclude if position == 4 else None
        )
        tap.apply(logits)
        token_B = frame(made).records_B["token"]
        assert token_B.tolist() == expected.token_B.tolist()
        for row, token in zip((2, 1, 0), token_B.tolist(), strict=True):
            drawn[row].append(token)


def filled(tap: Tap, rows: int) -> None:
    added = [(row, params(row, 100 + row), None, []) for row in range(rows)]
    tap.update_state(release.BatchUpdate(rows, [], added, []))


def test_rows_that_are_not_read_to_the_end_are_not_written(v1: tuple[Tap, Drawing]) -> None:
    tap, made = v1
    filled(tap, 4)
    made.discarded = lambda rows: np.array([True, False, True, False])[:rows]
    tap.apply(normal(4))
    assert frame(made).records_B["ticket"].tolist() == [1, 3]
    made.discarded = lambda rows: np.ones(rows, bool)
    tap.apply(normal(4))
    assert made.channel is not None
    assert made.channel.read() is None


def test_a_row_that_is_no_number_is_token_minus_one_and_vllm_can_go_on(
    v1: tuple[Tap, Drawing],
) -> None:
    tap, made = v1
    filled(tap, 4)
    logits = normal(4)
    logits[1, 7], logits[2] = torch.nan, -torch.inf
    tap.apply(logits)
    token_B = frame(made).records_B["token"]
    assert token_B.tolist()[1:3] == [-1, -1]
    assert (token_B[[0, 3]] >= 0).all()
    assert not logits.isnan().any()
    assert logits.argmax(1).tolist() == np.maximum(token_B, 0).tolist()


def argmaxes() -> dict[str, Any]:
    """Those that vLLM may take the greedy token with."""
    found: dict[str, Any] = {"torch": lambda logits: logits.argmax(-1)}
    if hasattr(torch.ops._C, "greedy_argmax"):
        found["vllm"] = torch.ops._C.greedy_argmax
    return found


@pytest.mark.parametrize("name", argmaxes())
@pytest.mark.parametrize("vocabulary", [2, 31, 1000, 49152])
def test_the_greedy_token_is_the_drawn_one(
    v1: tuple[Tap, Drawing], name: str, vocabulary: int
) -> None:
    tap, made = v1
    filled(tap, 33)
    logits = normal(33, vocabulary)
    unlike = logits.argmax(1)
    tap.apply(logits)
    token_B = frame(made).records_B["token"]
    assert argmaxes()[name](logits).flatten().tolist() == token_B.tolist()
    assert (token_B != unlike.numpy()).any()


def v2(folder: Path, slots: int = 6) -> tuple[TapV2, Drawing]:
    nobody: Any = None
    prefill: Any = SimpleNamespace(np=np.zeros(slots, np.int32))
    state = release.LogitsProcRequestState(
        device=torch.device("cpu"),
        max_num_reqs=slots,
        vocab_size=50,
        all_token_ids=nobody,
        prompt_len=nobody,
        prefill_len=prefill,
        total_len=nobody,
    )
    settings = config()
    tap = TapV2(settings, state)
    return tap, drawing(settings, folder)


def enter(
    tap: TapV2,
    slot: int,
    ticket: int,
    seed: int,
    first: int = 0,
    prompt: int = 5,
    exclude: Sequence[int] = (),
) -> None:
    """A request that comes with `first` response tokens, as vLLM adds it."""
    tap._prefill.np[slot] = prompt + first
    assert tap.add_request(slot, params(ticket, seed, first, prompt, exclude))


def context(slot_B: list[int], pos_B: list[int]) -> release.LogitsContext:
    """Rows in slots; `pos_B`: of the newest token that the model has read, from the start."""
    index_B = torch.tensor(slot_B, dtype=torch.int32)
    return release.LogitsContext(
        expanded_idx_mapping=index_B,
        idx_mapping=index_B,
        idx_mapping_np=index_B.numpy(),
        expanded_local_pos=torch.zeros_like(index_B),
        input_ids=torch.zeros_like(index_B),
        pos=torch.tensor(pos_B, dtype=torch.int64),
        seq_lens_upper_bound_np=np.array(pos_B) + 1,
    )


needs_v2 = pytest.mark.skipif(not release.HAS_V2, reason="V2 takes logits processors from 0.31 on")


@needs_v2
def test_v2_draws_what_v1_draws(v1: tuple[Tap, Drawing], tmp_path: Path) -> None:
    """Rows 0 to 2 lie in slots 4, 0, 3; row 1 is a fork that came with two response tokens."""
    first, drawn = [0, 2, 0], [[], [9], [8, 8, 8]]
    tap, made = v1
    taken = [range(25), range(9), range(25, 50)]  # row 1 and 2 have drawn, and may draw them
    added = [
        (row, params(row, 100 + row, first[row], exclude=taken[row]), None, drawn[row])
        for row in range(3)
    ]
    tap.update_state(release.BatchUpdate(3, [], added, []))
    tap.apply(one := normal(3))
    tap2, made2 = v2(tmp_path)
    for row, slot in enumerate([4, 0, 3]):
        enter(tap2, slot, row, 100 + row, first[row], exclude=taken[row])
    # A prompt of 5: the newest read token is its last, at 4, and then those of the response.
    tap2.apply(two := normal(3), context([4, 0, 3], [4, 7, 7]))
    records_B = frame(made).records_B
    assert records_B["token"][0] not in taken[0]
    np.testing.assert_array_equal(records_B, frame(made2).records_B)
    assert torch.equal(one, two)


@needs_v2
def test_v2_rows_may_come_in_any_order(tmp_path: Path) -> None:
    tap, made = v2(tmp_path)
    for slot in range(4):
        enter(tap, slot, 10 + slot, slot, prompt=slot + 1)
    logits = normal(4)
    tap.apply(logits.clone(), context([0, 1, 2, 3], [0, 1, 2, 3]))
    forward = frame(made).records_B
    order = [2, 0, 3, 1]
    tap.apply(logits[order], context(order, order))
    np.testing.assert_array_equal(frame(made).records_B, forward[order])
    assert (forward["position"] == 0).all()


@needs_v2
def test_v2_slots_are_used_again(tmp_path: Path) -> None:
    tap, made = v2(tmp_path)
    enter(tap, 2, 1, 11, first=3, prompt=9)
    enter(tap, 2, 7, 17, first=0, prompt=2)
    logits = normal(1)
    expected = sample_tokens(logits, np.array([17], np.uint64), np.array([4]), Sampling())
    tap.apply(logits, context([2], [5]))
    record = frame(made).records_B[0]
    assert (record["ticket"], record["position"], record["token"]) == (7, 4, expected.token_B[0])


@needs_v2
def test_v2_prompts_that_are_partly_read_are_not_written(tmp_path: Path) -> None:
    """A fork's prompt ends with its shared response tokens: 5 + 3, of which 7 are read."""
    tap, made = v2(tmp_path)
    enter(tap, 0, 1, 11, first=3)
    enter(tap, 1, 2, 12)
    tap.apply(normal(2), context([0, 1], [6, 4]))
    assert frame(made).records_B["ticket"].tolist() == [2]
    tap.apply(normal(2), context([0, 1], [7, 3]))
    records_B = frame(made).records_B
    assert (records_B["ticket"].tolist(), records_B["position"].tolist()) == ([1], [3])


@needs_v2
def test_v2_what_a_preempted_branch_reads_again_is_not_written(tmp_path: Path) -> None:
    """It had drawn 7 tokens after a prompt of 5; its first pass reads 8 of the 12 again."""
    tap, made = v2(tmp_path)
    enter(tap, 0, 1, 11)
    tap._prefill.np[0] = 12
    tap.apply(normal(1), context([0], [7]))
    assert made.channel is not None
    assert made.channel.read() is None
    tap.apply(normal(1), context([0], [11]))
    assert frame(made).records_B["position"].tolist() == [7]


@needs_v2
def test_v2_takes_the_requests_that_vllm_warms_up_with(tmp_path: Path) -> None:
    tap, made = v2(tmp_path)
    assert tap.add_request(0, release.SamplingParams.for_sampler_warmup())
    enter(tap, 1, 2, 12)
    tap.apply(normal(2), context([0, 1], [0, 4]))
    assert frame(made).records_B["ticket"].tolist() == [-1, 2]
