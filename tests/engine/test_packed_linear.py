"""Packed linear layers: the same numbers, never stale, and gone when sampling is over."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyrl.engine import Branches
from pyrl.engine.hf import HFEngine
from pyrl.engine.packed_linear import SMALLEST, PackedLinears
from pyrl.logits.sampling import Sampling


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 768), nn.Linear(768, 512, bias=False), nn.Linear(512, 8))


def packed(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), PackedLinears(model).active():
        return model(rows)


@pytest.mark.parametrize("shape", [(1, 512), (33, 512), (5, 1, 512), (1, 70, 512)])
def test_packed_layers_equal_dense_ones(shape: tuple[int, ...]) -> None:
    model = layers()
    rows = torch.randn(shape)
    torch.testing.assert_close(packed(model, rows), model(rows).detach(), rtol=1e-5, atol=1e-5)


def test_only_large_float32_layers_are_packed() -> None:
    model = layers()
    assert model[0].weight.numel() > SMALLEST > model[2].weight.numel()
    with PackedLinears(model).active():
        assert ["forward" in layer.__dict__ for layer in model] == [True, True, False]
    with PackedLinears(model.double()).active():
        assert not any("forward" in layer.__dict__ for layer in model)


def test_a_learners_step_is_never_missed() -> None:
    model = layers()
    rows = torch.randn(3, 512)
    linears = PackedLinears(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        with torch.no_grad(), linears.active():
            sampled = model(rows)
        trained = model(rows)
        torch.testing.assert_close(sampled, trained.detach(), rtol=1e-5, atol=1e-5)
        trained.sum().backward()
        optimizer.step()


def test_weights_written_behind_the_engine_are_noticed_when_it_starts() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=512,
            intermediate_size=512,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=16,
        )
    )
    engine = HFEngine(model, [])
    one = np.zeros(1, np.int64)
    engine.start(Sampling())
    engine.submit(Branches([np.array([1, 2])], one, one, one.astype(np.uint64), one + 1))
    engine.step()
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] += 1
    with pytest.raises(RuntimeError, match=r"written \(through .data\) .* call load_weights"):
        engine.start(Sampling())
    engine.load_weights(None, 1)
    engine.start(Sampling())


def test_layers_are_dense_again_afterwards_even_after_an_error() -> None:
    model = layers()
    with pytest.raises(RuntimeError), torch.no_grad(), PackedLinears(model).active():
        model(torch.randn(3, 7))
    assert not any("forward" in layer.__dict__ for layer in model)
    model(torch.randn(3, 512)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_engine_samples_from_packed_layers_what_the_dense_model_gives() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 600, "hidden_size": 512, "intermediate_size": 640}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.1))
    engine = HFEngine(model, [])
    engine.start(Sampling())
    prompt, ids = np.array([5, 6, 7], np.int32), np.arange(2)
    branches = Branches([prompt], ids * 0, ids, ids.astype(np.uint64), ids * 0 + 6)
    for _ in range(2):
        engine.submit(branches)
        steps = [engine.step() for _ in range(6)]
        token_BT = torch.from_numpy(np.stack([step.token_B for step in steps], 1)).long()
        path_BT = torch.cat([torch.from_numpy(prompt).long().expand(2, -1), token_BT], 1)
        with torch.no_grad():
            logp = model(input_ids=path_BT, use_cache=False).logits[:, 2:-1].log_softmax(-1)
        expected = logp.gather(2, token_BT[..., None])[..., 0]
        got = np.stack([step.logprob_B for step in steps], 1)
        np.testing.assert_allclose(got, expected, atol=1e-4)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(-1.0)
        engine.load_weights(None, 1)
