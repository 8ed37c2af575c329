"""One attention function: packed rows equal lone sequences, and what it lacks it refuses."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from model_families import exact_norms
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pyrl._core.tree import pack_rows
from pyrl.attention import Layout, attending, layout, use_pyrl_attention
from pyrl.learner import recompute_layers
from pyrl.pack import offsets

SHAPE = {
    "vocab_size": 37,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "multi-head": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_key_value_heads": 6})),
}
LENGTHS = [1, 4, 4, 4, 9, 2, 2]


def pair(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights, under transformers' sdpa too: its eager softmax is float32 always."""
    torch.manual_seed(0)
    ours = MODELS[name]().to(dtype)
    sdpa = MODELS[name]().to(dtype)
    sdpa.load_state_dict(ours.state_dict())
    sdpa.set_attn_implementation("sdpa")
    use_pyrl_attention(ours)
    return ours, sdpa


def packed(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    layout = Layout.of_rows(np.array([len(s) for s in sequences]))
    return model(
        input_ids=torch.cat(sequences)[None],
        position_ids=torch.from_numpy(layout.position_J)[None],
        layout=layout,
        use_cache=False,
    ).logits[0]


def sequences() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(0, SHAPE["vocab_size"], (length,)) for length in LENGTHS]


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_packed_logits_and_gradients_equal_those_of_lone_sequences(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    ours, sdpa = pair(name, dtype)
    logits = packed(ours, sequences())
    expected = torch.cat([sdpa(input_ids=s[None], use_cache=False).logits[0] for s in sequences()])
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn(logits.shape, dtype=dtype)
    (logits.log_softmax(-1) * weight).sum().backward()
    (expected.log_softmax(-1) * weight).sum().backward()
    for mine, theirs in zip(ours.parameters(), sdpa.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=10 * tolerance * scale)


def test_gradient_checkpointing_carries_the_packing() -> None:
    ours, _ = pair("llama", torch.float64)
    first = ours.model.layers[0].self_attn.q_proj.weight
    expected = torch.autograd.grad(packed(ours, sequences()).square().sum(), first)
    recompute_layers(ours)
    got = torch.autograd.grad(packed(ours, sequences()).square().sum(), first)
    torch.testing.assert_close(got, expected)


def test_equal_rows_need_no_packing() -> None:
    ours, sdpa = pair("qwen2", torch.float64)
    rows = torch.stack([s for s in sequences() if len(s) == 4])
    torch.testing.assert_close(
        ours(input_ids=rows, use_cache=False).logits, sdpa(input_ids=rows, use_cache=False).logits
    )


def test_generation_by_transformers_itself_still_works() -> None:
    ours, sdpa = pair("llama", torch.float64)
    prompt = torch.tensor([[5, 6, 7]])
    arguments = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    got = ours.generate(prompt, attention_mask=mask, **arguments)
    assert torch.equal(got, sdpa.generate(prompt, attention_mask=mask, **arguments))


def test_padding_is_refused() -> None:
    ours, _ = pair("llama", torch.float64)
    mask = torch.tensor([[0, 1, 1]])
    with pytest.raises(ValueError, match="expected no padding"):
        ours(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=mask)


def test_positions_that_restart_without_offsets_are_refused() -> None:
    ours, _ = pair("llama", torch.float64)
    with pytest.raises(ValueError, match="pass a layout"):
        ours(
            input_ids=torch.tensor([[1, 2, 3, 4]]),
            position_ids=torch.tensor([[0, 1, 0, 1]]),
            use_cache=False,
        )


def test_offsets_that_do_not_cover_the_row_are_refused() -> None:
    ours, _ = pair("llama", torch.float64)
    with pytest.raises(ValueError, match="expected one row of 3 queries"):
        ours(
            input_ids=torch.tensor([[1, 2, 3, 4]]),
            layout=Layout.of_rows(np.array([3])),
            use_cache=False,
        )


WINDOWED = {
    "full": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SHAPE,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}
"""A window in no layer, in every one, and in some."""


@pytest.mark.parametrize("name", list(WINDOWED))
@pytest.mark.parametrize("block", [2, 5, 128])
def test_a_tree_of_rows_has_the_logits_and_gradients_of_its_rows(
    name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "BLOCK", block)
    rng = np.random.default_rng(block)
    rows = [[7, 8, 9, *rng.integers(0, 3, rng.integers(1, 12)), 5] for _ in range(12)]
    rows += [[1, 2, 3], [1, 2, 4, 4], [6] * 9]
    length_N = np.array([len(row) for row in rows])
    token_I = np.concatenate(rows).astype(np.int64)
    tree = pack_rows(token_I, offsets(length_N), np.full(len(rows), 2))
    assert len(tree.input_J) < len(token_I) - len(rows)
    torch.manual_seed(0)
    model = exact_norms(WINDOWED[name]().double())
    plain = copy.deepcopy(model)
    use_pyrl_attention(model)
    logits = model(
        input_ids=torch.from_numpy(tree.input_J)[None],
        position_ids=torch.from_numpy(tree.position_J)[None],
        layout=Layout.of_tree(tree),
        use_cache=False,
    ).logits[0]
    of_T = torch.stack(
        [logits[p].log_softmax(-1)[y] for p, y in zip(tree.predictor_U, tree.label_U, strict=True)]
    )[torch.from_numpy(tree.unique_T)]
    alone = []
    for row in rows:
        logprob = plain(input_ids=torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
        alone.append(logprob[1:-1].gather(1, torch.tensor(row[2:])[:, None])[:, 0])
    expected = torch.cat(alone)
    torch.testing.assert_close(of_T, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn(len(expected), dtype=torch.float64)
    (of_T * weight).sum().backward()
    (expected * weight).sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-11 * max(scale, 1))


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_a_sliding_window_holds_for_packed_and_for_equal_rows(name: str) -> None:
    torch.manual_seed(0)
    model = WINDOWED[name]().double()
    rows = torch.randint(0, 37, (3, 11))
    expected = model(input_ids=rows, use_cache=False).logits
    use_pyrl_attention(model)
    torch.testing.assert_close(model(input_ids=rows, use_cache=False).logits, expected)
    torch.testing.assert_close(packed(model, list(rows)), expected.flatten(0, 1))


def test_soft_capped_attention_is_refused() -> None:
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8))
    use_pyrl_attention(model)
    with pytest.raises(ValueError, match="softcap is not supported"):
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False)


def test_layers_that_are_not_causal_attention_are_refused() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="LlamaForCausalLM has \\['linear_attention'\\]"):
        use_pyrl_attention(model)


def test_a_saved_model_does_not_name_the_function(tmp_path: Path) -> None:
    ours, _ = pair("llama", torch.float32)
    ours.save_pretrained(tmp_path)
    assert "pyrl" not in (tmp_path / "config.json").read_text()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    rows = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(input_ids=rows).logits, ours(input_ids=rows).logits)


def test_a_model_attends_through_pyrl_for_a_while() -> None:
    model = MODELS["llama"]()
    before = model.config._attn_implementation
    padded = {"input_ids": torch.tensor([[0, 3]]), "attention_mask": torch.tensor([[0, 1]])}
    with attending(model), pytest.raises(ValueError, match="expected no padding"):
        model(**padded)
    assert model.config._attn_implementation == before != "pyrl"
    model(**padded)
