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

# With a head_dim of its own, which is one that cuDNN takes.
APART = dict(hidden_size=40, intermediate_size=28, num_hidden_layers=2, num_attention_heads=3,
             num_key_value_heads=1, head_dim=24, vocab_size=61)
SMALL = dict(hidden_size=40, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, vocab_size=61)

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
}
