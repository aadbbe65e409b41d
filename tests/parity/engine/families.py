"""The families' golden cases: config.json of a released model of each, with only its sizes cut.

`cut` is what differs from the release. Sizes are odd: a head that is no multiple of 16, a
vocabulary that is none of 64, windows and original contexts shorter than the documents. `gains`
multiplies the random weights whose names end so, where a softcap would otherwise do nothing.
"""

SMOLLM2 = dict(  # HuggingFaceTB/SmolLM2-135M
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=0, eos_token_id=0, hidden_act="silu", hidden_size=576,
    initializer_range=0.041666666666666664, intermediate_size=1536, is_llama_config=True,
    max_position_embeddings=8192, model_type="llama", num_attention_heads=9,
    num_hidden_layers=30, num_key_value_heads=3, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True,
    torch_dtype="bfloat16", transformers_version="4.40.1", use_cache=True, vocab_size=49152)

LLAMA2 = dict(  # meta-llama/Llama-2-7b-hf
    architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu",
    hidden_size=4096, initializer_range=0.02, intermediate_size=11008,
    max_position_embeddings=4096, model_type="llama", num_attention_heads=32,
    num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_scaling=None, tie_word_embeddings=False, torch_dtype="float16",
    transformers_version="4.31.0.dev0", use_cache=True, vocab_size=32000)

QWEN2_5 = dict(  # Qwen/Qwen2.5-7B-Instruct
    architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=151643,
    eos_token_id=151645, hidden_act="silu", hidden_size=3584, initializer_range=0.02,
    intermediate_size=18944, max_position_embeddings=32768, max_window_layers=28,
    model_type="qwen2", num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4,
    rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=131072, tie_word_embeddings=False,
    torch_dtype="bfloat16", transformers_version="4.43.1", use_cache=True,
    use_sliding_window=False, vocab_size=152064)

QWEN3 = dict(  # Qwen/Qwen3-0.6B
    architectures=["Qwen3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=1024,
    initializer_range=0.02, intermediate_size=3072, max_position_embeddings=40960,
    max_window_layers=28, model_type="qwen3", num_attention_heads=16, num_hidden_layers=28,
    num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
    sliding_window=None, tie_word_embeddings=True, torch_dtype="bfloat16",
    transformers_version="4.51.0", use_cache=True, use_sliding_window=False, vocab_size=151936)

MISTRAL = dict(  # mistralai/Mistral-7B-v0.1
    architectures=["MistralForCausalLM"], bos_token_id=1, eos_token_id=2, hidden_act="silu",
    hidden_size=4096, initializer_range=0.02, intermediate_size=14336,
    max_position_embeddings=32768, model_type="mistral", num_attention_heads=32,
    num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=10000.0,
    sliding_window=4096, tie_word_embeddings=False, torch_dtype="bfloat16",
    transformers_version="4.34.0.dev0", use_cache=True, vocab_size=32000)

PHI3 = dict(  # microsoft/Phi-3-mini-4k-instruct
    architectures=["Phi3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config",
              "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
    bos_token_id=1, embd_pdrop=0.0, eos_token_id=32000, hidden_act="silu", hidden_size=3072,
    initializer_range=0.02, intermediate_size=8192, max_position_embeddings=4096,
    model_type="phi3", num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
    original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0,
    rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, sliding_window=2047,
    tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.40.2",
    use_cache=True, vocab_size=32064)

PHI4_MINI = dict(  # microsoft/Phi-4-mini-instruct; of the factors the first
    architectures=["Phi3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_phi3.Phi3Config",
              "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
              "AutoTokenizer": "Xenova/gpt-4o"},
    bos_token_id=199999, embd_pdrop=0.0, eos_token_id=199999, full_attn_mod=1, hidden_act="silu",
    hidden_size=3072, initializer_range=0.02, interpolate_factor=1, intermediate_size=8192,
    lm_head_bias=False, max_position_embeddings=131072, mlp_bias=False, model_type="phi3",
    num_attention_heads=24, num_hidden_layers=32, num_key_value_heads=8,
    original_max_position_embeddings=4096, pad_token_id=199999, partial_rotary_factor=0.75,
    resid_pdrop=0.0, rms_norm_eps=1e-05,
    rope_scaling=dict(
        long_factor=[1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897,
                     1.956131817, 2.187582649, 2.446418898],
        short_factor=[1.0] * 9, type="longrope"),
    rope_theta=10000.0, sliding_window=262144, tie_word_embeddings=True, torch_dtype="bfloat16",
    transformers_version="4.45.0", use_cache=True, vocab_size=200064)

GEMMA = dict(  # google/gemma-2b-it
    architectures=["GemmaForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=2, eos_token_id=1, head_dim=256, hidden_act="gelu", hidden_size=2048,
    initializer_range=0.02, intermediate_size=16384, max_position_embeddings=8192,
    model_type="gemma", num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=1,
    pad_token_id=0, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=10000.0,
    torch_dtype="bfloat16", transformers_version="4.38.0.dev0", use_cache=True,
    vocab_size=256000)

GEMMA2 = dict(  # google/gemma-2-2b-it
    architectures=["Gemma2ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    attn_logit_softcapping=50.0, bos_token_id=2, cache_implementation="hybrid",
    eos_token_id=[1, 107], final_logit_softcapping=30.0, head_dim=256,
    hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=2304,
    initializer_range=0.02, intermediate_size=9216, max_position_embeddings=8192,
    model_type="gemma2", num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4,
    pad_token_id=0, query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_theta=10000.0,
    sliding_window=4096, torch_dtype="bfloat16", transformers_version="4.42.4", use_cache=True,
    vocab_size=256000)

GEMMA3 = dict(  # google/gemma-3-1b-it
    architectures=["Gemma3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    attn_logit_softcapping=None, bos_token_id=2, cache_implementation="hybrid",
    eos_token_id=[1, 106], final_logit_softcapping=None, head_dim=256,
    hidden_activation="gelu_pytorch_tanh", hidden_size=1152, initializer_range=0.02,
    intermediate_size=6912, max_position_embeddings=32768, model_type="gemma3_text",
    num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1, pad_token_id=0,
    query_pre_attn_scalar=256, rms_norm_eps=1e-06, rope_local_base_freq=10000, rope_scaling=None,
    rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, torch_dtype="bfloat16",
    transformers_version="4.50.0.dev0", use_cache=True, vocab_size=262144)

GRANITE = dict(  # ibm-granite/granite-3.1-2b-instruct
    architectures=["GraniteForCausalLM"], attention_bias=False, attention_dropout=0.1,
    attention_multiplier=0.015625, bos_token_id=0, embedding_multiplier=12.0, eos_token_id=0,
    hidden_act="silu", hidden_size=2048, initializer_range=0.02, intermediate_size=8192,
    logits_scaling=8.0, max_position_embeddings=131072, mlp_bias=False, model_type="granite",
    num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=8, pad_token_id=0,
    residual_multiplier=0.22, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=5000000.0,
    tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.47.0",
    use_cache=True, vocab_size=49155)

SMOLLM3 = dict(  # HuggingFaceTB/SmolLM3-3B
    architectures=["SmolLM3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
    bos_token_id=None, eos_token_id=128012, hidden_act="silu", hidden_size=2048,
    initializer_range=0.02, intermediate_size=11008, layer_types=["full_attention"] * 36,
    max_position_embeddings=65536, max_window_layers=28, mlp_bias=False, model_type="smollm3",
    no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, num_attention_heads=16,
    num_hidden_layers=36, num_key_value_heads=4, pad_token_id=128004, pretraining_tp=2,
    rms_norm_eps=1e-06, rope_scaling=None, rope_theta=5000000.0, sliding_window=None,
    torch_dtype="bfloat16", transformers_version="4.54.0.dev0", use_cache=False,
    use_sliding_window=False, vocab_size=128256)

# With a head_dim of its own, which is one that cuDNN takes.
APART = dict(hidden_size=40, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=24, vocab_size=61, pad_token_id=0)
SMALL = dict(hidden_size=40, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, vocab_size=61, pad_token_id=0)

FAMILIES = {
    "smollm2": dict(release=SMOLLM2, cut=SMALL),
    # The architecture's flags that its best known releases leave off.
    "llama_biases": dict(release=LLAMA2,
                         cut=dict(SMALL, num_key_value_heads=2, num_hidden_layers=1,
                                  attention_bias=True, mlp_bias=True)),
    "qwen2": dict(release=QWEN2_5, cut=SMALL),
    # With the context that its card tells how to extend, and the windows that it has switched off.
    "qwen2_long": dict(release=QWEN2_5,
                       cut=dict(SMALL, max_position_embeddings=128, use_sliding_window=True,
                                sliding_window=7, max_window_layers=1,
                                rope_scaling=dict(factor=4.0, type="yarn",
                                                  original_max_position_embeddings=32))),
    "qwen3": dict(release=QWEN3, cut=APART),
    "mistral": dict(release=MISTRAL, cut=dict(SMALL, sliding_window=7)),
    "phi3": dict(release=PHI3, cut=dict(SMALL, num_key_value_heads=2, num_hidden_layers=1,
                                        sliding_window=7)),
    # Heads of 24, 18 of them turned; documents on both sides of the original context.
    "phi4_mini": dict(release=PHI4_MINI,
                      cut=dict(SMALL, hidden_size=48, intermediate_size=30,
                               original_max_position_embeddings=16, max_position_embeddings=128,
                               sliding_window=23)),
    "gemma": dict(release=GEMMA, cut=APART),
    "gemma2": dict(release=GEMMA2, cut=dict(APART, sliding_window=7), lr=5e-3,
                   gains={"q_proj.weight": 5, "k_proj.weight": 5, "model.norm.weight": 8}),
    # Two layers with windows, and one without: the pattern is a size too.
    "gemma3": dict(release=GEMMA3,
                   cut=dict(APART, num_hidden_layers=3, sliding_window=7,
                            sliding_window_pattern=3)),
    "granite": dict(release=GRANITE, cut=SMALL, lr=4e-2,
                    gains={"embed_tokens.weight": 4, "q_proj.weight": 5, "k_proj.weight": 5}),
    "smollm3": dict(release=SMOLLM3, cut=dict(SMALL, layer_types=["full_attention"] * 2,
                                              no_rope_layers=[1, 0])),
}
