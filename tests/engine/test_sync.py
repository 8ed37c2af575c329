"""Digests of weights, which a sync compares; the rest is in tests/on_vllm/test_vllm_sync.py."""

import torch

from pyrl.engine.sync import digest, digests


def test_a_tied_weight_has_one_digest_and_no_other_tensor_has_it() -> None:
    """Of the same memory with another shape or order, or of another dtype, it is computed anew."""
    memory = torch.arange(24.0)
    tied = memory.view(4, 6)
    weights = {
        "embedding": tied,
        "head": tied,
        "turned": tied.t(),
        "flat": memory[:20],
        "bytes": memory.view(torch.int32),
        "odd": torch.arange(5, dtype=torch.uint8),
    }
    found = digests(weights)
    assert found == {name: digest(tensor) for name, tensor in weights.items()}
    assert found["embedding"] == found["head"] != found["flat"]
    before = found["head"]
    tied[3, 5] += 1
    assert digests(weights)["head"] != before
