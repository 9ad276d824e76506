"""Every type of causal language models that the installed transformers has, small."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import CONFIG_MAPPING

VOCAB_SIZE = 256
SEQ_LEN = 16

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "attention_heads"), 2),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "dff", "dim_ff", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions"), 64),
    **dict.fromkeys(("max_source_positions", "context_length", "original_max_position_embeddings"), 64),
    **dict.fromkeys(("head_dim", "dim_head", "kv_channels", "attention_head_size", "swa_head_dim"), 16),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "dense_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "n_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("index_head_dim", "o_lora_rank"), 16),
    **dict.fromkeys(("index_n_heads", "o_groups", "swa_num_attention_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "zero_expert_num": 2,
}
"""What a key is set to, wherever a type has it."""

TEXT = {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")}
TEXT |= {key: SMALL[key] for key in ("intermediate_size", "max_position_embeddings", "head_dim")}
TEXT |= {"vocab_size": VOCAB_SIZE}
MIXTURE = {key: value for key, value in TEXT.items() if key != "intermediate_size"}
MIXTURE |= {"num_experts": 4, "num_experts_per_tok": 2}
LINEAR = {key: value for key, value in SMALL.items() if key.startswith("linear_")}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
ROBERTA = {"pad_token_id": 1}

OWN: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    **dict.fromkeys(("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"), ROBERTA),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), ROBERTA),
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "gptj": {"n_head": 2, "rotary_dim": 4},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": TEXT | {"pad_token_id": 0}, "vision_config": VISION},
    "emu3": {"text_config": TEXT | {"pad_token_id": 0}},
    "fuyu": {"text_config": TEXT},
    "gemma3": {"text_config": TEXT, "vision_config": VISION},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["full_attention", "sliding_attention"]},
    "gemma4": {"text_config": TEXT | {"vocab_size_per_layer_input": VOCAB_SIZE}},
    "gemma4_unified": {"text_config": TEXT},
    "git": {"vision_config": VISION},
    "got_ocr2": {
        "text_config": TEXT,
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MAMBA,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4": {"text_config": TEXT | {"intermediate_size_mlp": 64, "num_local_experts": 2}, "vision_config": VISION},
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "mllama": {"text_config": TEXT | {"pad_token_id": 0}, "vision_config": VISION},
    "modernbert-decoder": {"pad_token_id": 0},
    "moss_transcribe_diarize": {"text_config": TEXT, "audio_config": AUDIO},
    "prophetnet": {"num_buckets": 8, "relative_max_distance": 16},
    "qwen3_5": {"text_config": TEXT | LINEAR, "vision_config": VISION},
    "qwen3_5_moe": {"text_config": MIXTURE | LINEAR},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 4], "attn_layers": ["local", "local"]},
    "roc_bert": {"enable_pronunciation": False, "enable_shape": False},
    "xlm": {"emb_dim": 32, "causal": True},
    "xmod": {"default_language": "en_XX", "pad_token_id": 1},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}
"""What one type needs besides."""


def small(model_type: str) -> dict[str, Any]:
    """The ``[model.config]`` of a small model."""
    fields = inspect.signature(CONFIG_MAPPING[model_type].__init__).parameters
    config = {key: value for key, value in SMALL.items() if key in fields}
    return {"model_type": model_type, **config, **OWN.get(model_type, {})}


TAKEN = (
    *("afmoe", "apertus", "arcee", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "bart", "beam"),
    *("bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "bitnet", "blenderbot"),
    *("blenderbot-small", "bloom", "camembert", "codegen", "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm"),
    *("data2vec-text", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "diffllama", "doge"),
    *("dots1", "dots3_note_text", "electra", "emu3", "ernie", "ernie4_5", "ernie4_5_moe", "exaone4"),
    *("exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "flint", "fuyu", "gemma", "gemma2"),
    *("gemma3", "gemma3_text", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified"),
    *("gemma4_unified_text", "git", "glm", "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "got_ocr2"),
    *("gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj"),
    *("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"),
    *("helium", "hrm_text", "hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax"),
    *("inkling2_text", "inkling_text", "internlm3", "iquestcoder", "jais2", "jamba", "jetmoe", "kimi_linear"),
    *("kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama", "llama4", "llama4_text", "longcat_flash"),
    *("mamba", "mamba2", "marian", "mbart", "megatron-bert", "mellum", "minicpm3", "minimax", "minimax_m2"),
    *("minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "mllama", "modernbert-decoder"),
    *("moshi", "moss_transcribe_diarize", "mpt", "mvp", "nanochat", "nemotron", "nemotron_h", "olmo"),
    *("olmo2", "olmo3", "olmo_hybrid", "olmoe", "openai-gpt", "opt", "pegasus", "persimmon", "phi", "phi3"),
    *("phimoe", "plbart", "qwen2", "qwen2_moe", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen4_exp_text", "recurrent_gemma", "reformer", "rembert"),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "rwkv", "seed_oss", "smollm3", "solar_open"),
    *("stablelm", "starcoder2", "trocr", "vaultgemma", "whisper", "xglm", "xlm-roberta", "xlm-roberta-xl"),
    *("xlstm", "xmod", "youtu", "zamba", "zaya"),
)
"""Types that a run could have before models were rehearsed (transformers 5.23), and must go on having."""
