"""Forks without a prefill: the part of a block that a fork shares is copied, not computed again.

vLLM's prefix cache shares whole blocks. A connector, vLLM's interface for caches that come from
elsewhere, takes what follows them from another request of the same engine: before the forward pass
in which a fork enters, the block in which it leaves its source is copied.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyrl.engine.vllm import release
from pyrl.engine.vllm.table import FORK as KEY
from pyrl.engine.vllm.table import TAP


@dataclass(frozen=True)
class Copies(release.KVConnectorMetadata):
    """What the scheduler tells its workers in each step."""

    blocks: list[tuple[int, int]]
    """Blocks to copy: from, to."""


class ForkCopies(release.KVConnectorBase_V1, release.SupportsHMA):
    """Copies blocks of sources that run, and of sources that have ended and are still cached.

    Only tokens that a source had computed by the step before are copied. The rest (an evicted
    block, the unfilled last block of an ended source, a cache with several kinds of layers) is
    computed again, as it is without a connector.
    """

    def __init__(
        self,
        vllm_config: release.VllmConfig,
        role: release.KVConnectorRole,
        kv_cache_config: release.KVCacheConfig,
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        self._uniform = len(specs) == 1 and isinstance(specs[0], release.AttentionSpec)
        self._block_size: int = specs[0].block_size if specs else 1
        self._num_blocks: int = kv_cache_config.num_blocks
        self._manager: Any = None
        self._running: dict[str, Any] = {}
        """Requests that hold blocks."""
        self._ended: OrderedDict[str, list[tuple[int, object]]] = OrderedDict()
        """Requests that ended: their full blocks, and the hashes of the contents of these."""
        self._remembered = 0
        """Blocks in `_ended`; the cache has no more than `_num_blocks`."""
        self._plans: dict[str, tuple[list[int], int]] = {}
        """Requests that are about to enter: blocks of their sources, tokens found cached."""
        self._fresh: set[int] = set()
        """Blocks of requests that enter in this step: they are hashed, but not computed yet."""
        self._entered: dict[str, Any] = {}
        """Requests that copy: vLLM counts what they copy, or have found cached, as computed."""
        self._unread: list[Any] = []
        """Requests that entered earlier, and whose prompts are read in parts."""
        self._copies: list[tuple[int, int]] = []
        self._caches: list[Tensor] = []

    # -- in the scheduler --

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Remember the manager, which knows the blocks of a request and their contents."""
        self._manager = kv_cache_manager

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Tokens to copy beyond those in whole cached blocks; False: they need no later step."""
        blocks, size = self._source(request)
        self._plans[request.request_id] = blocks, num_computed_tokens
        return max(0, size - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request enters: note the copies into its blocks."""
        own = blocks.get_block_ids()[0]
        found, cached = self._plans.pop(request.request_id, ([], 0))
        first, last = cached // self._block_size, cached + num_external_tokens
        if num_external_tokens:
            part = slice(first, -(-last // self._block_size))
            self._copies += zip(found[part], own[part], strict=True)
        self._fresh.update(own[first:])
        self._running[_name(request)] = request
        self._entered[_name(request)] = request

    def build_connector_meta(self, scheduler_output: Any) -> Copies:
        """The copies that the workers make in this step."""
        scheduled = scheduler_output.num_scheduled_tokens
        self._unread = [
            request
            for request in (*self._unread, *self._entered.values())
            if _name(request) in self._running
            and request.num_computed_tokens + scheduled.get(request.request_id, 0)
            < request.num_tokens
        ]
        self._entered.clear()
        self._fresh.clear()
        copies, self._copies = self._copies, []
        return Copies(copies)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, None]:
        """A request ends and its blocks go back to the cache: remember the full ones."""
        self._plans.pop(request.request_id, None)
        if self._running.pop(_name(request), None) is None or not self._uniform:
            return False, None
        full = block_ids[0][: request.num_computed_tokens // self._block_size]
        pool = self._manager.block_pool.blocks
        self._ended[_name(request)] = [(block, pool[block].block_hash) for block in full]
        self._remembered += len(full)
        while self._remembered > self._num_blocks:
            self._remembered -= len(self._ended.popitem(last=False)[1])
        return False, None

    def _source(self, request: Any) -> tuple[list[int], int]:
        """The blocks of a request's source, and the number of the request's tokens in them."""
        name, shared = (request.sampling_params.extra_args or {}).get(KEY, ("", 0))
        blocks: list[int] = []
        computed = 0
        if not self._uniform:
            pass
        elif (source := self._running.get(name)) is not None:
            blocks = self._manager.get_block_ids(source.request_id)[0]
            there = blocks and name not in self._entered
            computed = source.num_computed_tokens if there else 0
        elif not self._unread:
            pool = self._manager.block_pool.blocks
            for block, content in self._ended.get(name, []):
                if content is None or pool[block].block_hash != content or block in self._fresh:
                    break
                blocks.append(block)
            computed = len(blocks) * self._block_size
        # The last token is always computed: its logits are drawn from.
        return blocks, min(shared, request.num_tokens - 1, computed)

    # -- in the workers --

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        """Remember the caches of all layers."""
        self._caches = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy blocks before the forward pass; all are read before any is written."""
        metadata = self._get_connector_metadata()
        release.copy_kv_cache_blocks_inplace(self._caches, self._num_blocks, metadata.blocks)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: the copies are made before the forward pass."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing to store: the caches stay where they are."""

    def wait_for_save(self) -> None:
        """Nothing to wait for: nothing is stored."""


def _name(request: Any) -> str:
    """The ticket of a request's branch: a server gives the request a name of another kind."""
    ticket = (request.sampling_params.extra_args or {}).get(TAP, (-1,))[0]
    return str(ticket) if ticket >= 0 else str(request.request_id)
