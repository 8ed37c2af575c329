"""Tiny random causal language models of the families that transformers has, by name.

A name is a model type of transformers, and after a colon what is special about its configuration.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

SHAPE = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
HEAD = {"head_dim": 8}
WINDOW = {"sliding_window": 16}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SHARED = {"shared_expert_intermediate_size": 16, "shared_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
STATE = {
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
STATE_2 = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
DECODER = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
}
ROPE = {"rope_theta": 1e4}
LONGROPE = {
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 32,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama:dynamic": {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}},
    "apertus": {},
    "arcee": HEAD,
    "bamba": STATE | {"attn_layer_indices": [1]},
    "bart": DECODER,
    "bert": {"is_decoder": True},
    "biogpt": {},
    "bitnet": {},
    "blenderbot": DECODER,
    "bloom": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": WINDOW,
    "ctrl": {"dff": 48},
    "cwm": HEAD | WINDOW,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "diffllama": HEAD,
    "doge": {},
    "dots1": HEAD | LATENT,
    "ernie4_5": HEAD,
    "ernie4_5_moe": HEAD | EXPERTS | {"moe_num_experts": 4, "moe_k": 2},
    "exaone4": HEAD | WINDOW,
    "exaone_moe": HEAD | EXPERTS,
    "falcon": {"alibi": False, "new_decoder_architecture": False, "multi_query": True},
    "falcon:alibi": {"alibi": True},
    "falcon_h1": STATE | HEAD,
    "falcon_mamba": {"state_size": 8},
    "flex_olmo": EXPERTS,
    "gemma": HEAD,
    "gemma2": HEAD | WINDOW,
    "gemma3_text": HEAD | WINDOW,
    "gemma4_text": HEAD,
    "glm": HEAD,
    "glm4": HEAD,
    "glm4_moe": HEAD | LATENT,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 16,
    },
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": HEAD | EXPERTS | WINDOW,
    "gptj": {"rotary_dim": 4},
    "granite": {},
    "granite:scaled": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
    "granitemoe": EXPERTS,
    "granitemoehybrid": EXPERTS | STATE | SHARED | {"layer_types": ["mamba", "attention"]},
    "granitemoeshared": EXPERTS | SHARED,
    "helium": HEAD,
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD | EXPERTS | {"moe_topk": 2},
    "internlm3": HEAD,
    "jais2": HEAD,
    "jamba": EXPERTS | STATE | {"attn_layer_period": 2, "attn_layer_offset": 1},
    "jetmoe": EXPERTS | {"kv_channels": 8},
    "lfm2": {"full_attn_idxs": [1]},
    "llama4_text": HEAD | EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 16},
    "mamba": {"state_size": 8},
    "mamba2": STATE_2,
    "marian": DECODER,
    "mbart": DECODER,
    "minicpm3": LATENT,
    "minimax": HEAD | EXPERTS,
    "minimax_m2": HEAD | EXPERTS | {"rotary_dim": 8},
    "ministral": HEAD | WINDOW,
    "ministral3": HEAD,
    "mistral": {"sliding_window": None},
    "mistral:window": WINDOW,
    "mixtral": EXPERTS | {"sliding_window": None},
    "mixtral:jitter": EXPERTS | {"sliding_window": None, "router_jitter_noise": 0.5},
    "modernbert-decoder": {"local_attention": 16, "cls_token_id": 1, "sep_token_id": 2},
    "mpt": {},
    "nanochat": HEAD,
    "nemotron": {},
    "nemotron_h": HEAD
    | {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1}
    | {"chunk_size": 8, "layers_block_type": ["mamba", "attention"]},
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "olmo_hybrid": {},
    "olmoe": EXPERTS,
    "openai-gpt": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "pegasus": DECODER,
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phi3:longrope": LONGROPE
    | {"rope_parameters": ROPE | LONGROPE | {"rope_type": "longrope"}}
    | {"short_factor": None, "long_factor": None},
    "phimoe": EXPERTS,
    "plbart": DECODER,
    "qwen2": {},
    "qwen2:window": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": EXPERTS | SHARED,
    "qwen3": HEAD,
    "qwen3_moe": HEAD | EXPERTS,
    "qwen3_next": HEAD | EXPERTS | SHARED | LINEAR,
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16},
    "roberta": {"is_decoder": True},
    "rwkv": {"context_length": 64, "attention_hidden_size": 32},
    "seed_oss": HEAD,
    "smollm3": {},
    "solar_open": HEAD | LATENT,
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "starcoder2:dropout": {"sliding_window": None, "residual_dropout": 0.5},
    "trocr": DECODER,
    "vaultgemma": HEAD | WINDOW,
    "xglm": {"ffn_dim": 48, "attention_heads": 4, "num_layers": 2},
    "youtu": LATENT,
    "zamba": {"mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2, "num_hidden_layers": 3}
    | {"attn_layer_period": 3, "attn_layer_offset": 1, "attention_head_dim": 16},
    "zamba2": {"mamba_d_state": 8, "mamba_headdim": 8, "n_mamba_heads": 8, "mamba_ngroups": 1}
    | {"layers_block_type": ["mamba", "hybrid"], "chunk_size": 8},
}


def tiny(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose weights are the same at each call, and large enough for attention to matter."""
    config = CONFIG_MAPPING[family.partition(":")[0]](**SHAPE | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.2 * values)
    return model


def exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' norms round to float32 on the way: gradients that meet there differ by 1e-7."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                gain = child.weight + 1 if "Gemma" in type(child).__name__ else child.weight
                eps = vars(child)["eps" if "eps" in vars(child) else "variance_epsilon"]
                norm = torch.nn.RMSNorm(len(gain), eps=eps, dtype=torch.float64)
                norm.weight.data.copy_(gain.detach())
                setattr(parent, name, norm)
    return model
