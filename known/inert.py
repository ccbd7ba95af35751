"""Fields of configurations that say nothing of what a model computes from given tokens.

They are about training, first weights, generation, saving, or other heads than the language
model's. `docs/known.md` says so of dropout and of the losses of routers.
"""

from __future__ import annotations

INERT = frozenset(
    {
        # how it is saved and called
        "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "model_type",
        "transformers_version", "attn_implementation", "experts_implementation", "id2label",
        "label2id", "num_labels", "problem_type", "return_dict", "output_hidden_states",
        "output_attentions", "chunk_size_feed_forward", "is_decoder", "is_encoder_decoder",
        "finetuning_task", "tokenizer_class", "task_specific_params", "use_cache",
        # tokens and ids
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "eod_token_id",
        "unk_token_id", "mask_token_id", "decoder_start_token_id", "bad_words_ids",
        "num_logits_to_keep", "generation_config", "image_token_id",
        # dropout, which ours has none of
        "attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "attn_dropout",
        "resid_pdrop", "residual_dropout", "residual_dropout_prob", "embd_pdrop", "embed_pdrop",
        "emb_pdrop", "embedding_dropout", "embed_dropout", "hidden_dropout",
        "hidden_dropout_prob", "dropout", "activation_dropout", "layerdrop", "classifier_dropout",
        "classifier_dropout_prob", "ffn_dropout", "summary_first_dropout", "expert_dropout",
        "resid_dropout", "attn_config.attn_pdrop",
        # first weights
        "initializer_range", "init_std", "initializer_factor", "initializer_cutoff_factor",
        "init_device", "lambda_std_dev", "embedding_initializer_range",
        "rescale_prenorm_residual", "time_step_init_scheme", "time_step_max", "time_step_floor",
        "w_init_variance_scale", "final_w_init_variance_scale", "embed_init_std",
        # losses in training
        "output_router_logits", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux",
        "router_z_loss_coef", "z_loss_coefficient", "router_jitter_noise", "input_jitter_noise",
        "pretraining_tp", "ep_size",
        # other heads
        "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
        # lengths, precision, ways to compute
        "max_position_embeddings", "model_max_length", "n_positions", "max_seq_len", "n_ctx",
        "context_length", "rescale_every",
        "max_sequence_length", "slow_but_exact", "attention_softmax_in_fp32",
        "scale_attention_softmax_in_fp32", "reorder_and_upcast_attn", "residual_in_fp32",
        "use_mambapy", "use_associative_scan", "use_mamba_kernels", "chunk_size",
        "mamba_chunk_size", "rope_parameters.max_position_embeddings",
        # predictions of later tokens
        "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers",
    }
)  # fmt: skip

DERIVED = {  # fields that a class makes others of, or makes of others, which are read
    "use_sliding_window": ("layer_types",),
    "max_window_layers": ("layer_types",),
    "sliding_window_pattern": ("layer_types",),
    "_sliding_window_pattern": ("layer_types",),
    "layer_types": ("indexer_types", "use_sliding_window"),
    "num_kv_heads": ("multi_query",),
    "num_key_value_heads": ("multi_query",),
    "qk_head_dim": ("qk_nope_head_dim",),
    "expand": ("intermediate_size",),
    "mamba_expand": ("mamba_d_ssm",),
    "time_step_rank": ("num_heads",),
    "head_dim": ("qk_rope_head_dim",),
    "no_rope_layer_interval": ("no_rope_layers",),
    "attention_types": ("attention_layers",),
}
