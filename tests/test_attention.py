"""One attention function: packed rows equal lone sequences, and what it lacks it refuses."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pyrl.attention import use_pyrl_attention
from pyrl.learner import recompute_layers

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
    offsets = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    return model(
        input_ids=torch.cat(sequences)[None],
        position_ids=positions[None],
        cu_seq_lens_q=offsets.to(torch.int32),
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
    with pytest.raises(ValueError, match="pass cu_seq_lens_q"):
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
            cu_seq_lens_q=torch.tensor([0, 3]),
            use_cache=False,
        )


def test_a_sliding_window_holds_for_shorter_sequences_and_refuses_longer_ones() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)).double()
    rows = torch.tensor([[1, 2, 3, 4]])
    expected = model(input_ids=rows, use_cache=False).logits
    use_pyrl_attention(model)
    torch.testing.assert_close(model(input_ids=rows, use_cache=False).logits, expected)
    short = [torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 4])]
    torch.testing.assert_close(packed(model, short)[:4], expected[0])
    with pytest.raises(ValueError, match="exceed the sliding window of 4"):
        packed(model, [torch.tensor([1, 2, 3, 4, 5])])


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
