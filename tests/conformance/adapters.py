"""Rows of the table for peft's adapter types: setting -> second value; settings that keep an experiment small or suit a model of width
32; setting -> further settings without which it has no say."""

from __future__ import annotations

from typing import Any

LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3}

IDLE = {("boft", "boft_n_butterfly_factor"): "without its compiled kernel peft takes one factor"}
"""Settings that say nothing on this machine, and why."""

ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]] = {
    "adamss": (
        {"r": 4, "num_subspaces": 3, "subspace_rank": 2, "use_dynamic_rank": True, "svd_threshold": 0.9, "random_seed": 1},
        {"r": 8, "num_subspaces": 2},
        {"svd_threshold": {"use_dynamic_rank": True, "subspace_rank": 3}, "use_dynamic_rank": {"subspace_rank": 3, "svd_threshold": 0.9}},
    ),
    "adaption-prompt": ({"adapter_len": 4, "adapter_layers": 1}, {"adapter_len": 3}, {}),
    "beft": ({"init_weights": False}, {}, {}),
    "boft": (
        {
            "boft_block_size": 8,
            "boft_block_num": 8,
            "boft_n_butterfly_factor": 2,
            "boft_dropout": 0.5,
            "bias": "all",
            "init_weights": False,
        },
        {},
        {"boft_block_num": {"boft_block_size": 0, "boft_block_num": 4}, "boft_dropout": {"init_weights": False}},
    ),
    "c3a": (
        {"block_size": 8, "bias": "all", "block_size_pattern": {"q_proj": 8}, "init_weights": "gaussian"},
        {"block_size": 16},
        {},
    ),
    "cartridge": ({"num_virtual_tokens": 4, "num_frozen_tokens": 2}, {"num_virtual_tokens": 3}, {}),
    "deft": (
        {"r": 4, "decomposition_method": "qr", "init_scale": 2.0, "alpha": 4, "para": True, "deft_dropout": 0.5, "init_weights": False}
        | {"bias": "all"},
        {},
        {"init_scale": {"init_weights": False}},
    ),
    "delora": (
        {"r": 4, "delora_lambda": 5, "module_dropout": 0.9, "bias": "all", "init_weights": False}
        | {"rank_pattern": {"q_proj": 2}, "lambda_pattern": {"q_proj": 5.0}},
        {},
        {},
    ),
    "fourierft": (
        {"n_frequency": 20, "scaling": 10.0, "random_loc_seed": 1, "bias": "all", "n_frequency_pattern": {"q_proj": 20}}
        | {"init_weights": True},
        {"n_frequency": 40},
        {},
    ),
    "frod": (
        {"projection_prng_key": 1, "frod_dropout": 0.5, "bias": "all", "init_weights": False, "sparse_rate": 0.1}
        | {"regularization_alpha": 0.1},
        {},
        {},
    ),
    "glora": (
        {"r": 4, "bias": "all", "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector", "init_weights": False},
        {},
        {},
    ),
    "gralora": (
        {"r": 8, "hybrid_r": 8, "alpha": 8, "gralora_dropout": 0.5, "gralora_k": 4, "bias": "all", "init_weights": False},
        {"r": 16},
        {},
    ),
    "hira": ({"r": 4, "hira_dropout": 0.5, "init_weights": "gaussian"}, {}, {}),
    "hra": ({"r": 4, "apply_GS": True, "init_weights": False, "bias": "all"}, {}, {}),
    "ia3": ({"init_ia3_weights": False}, {}, {}),
    "ln-tuning": ({}, {}, {}),
    "loha": (
        {"r": 4, "alpha": 4, "rank_dropout": 0.5, "module_dropout": 0.3, "init_weights": False}
        | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1.0}},
        {},
        {},
    ),
    "lokr": (
        {"r": 2, "alpha": 4, "rank_dropout": 0.5, "module_dropout": 0.3, "decompose_both": True, "decompose_factor": 2}
        | {"rank_dropout_scale": True, "init_weights": "lycoris", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 1.0}},
        {"r": 1},
        {"rank_dropout_scale": {"rank_dropout": 0.5}},
    ),
    "miss": (
        {"r": 4, "miss_dropout": 0.5, "mini_r": 2, "init_weights": "bat", "bias": "all"},
        {"r": 8},
        {"mini_r": {"init_weights": "mini"}},
    ),
    "oft": (
        {"r": 2, "oft_block_size": 8, "bias": "all", "init_weights": False, "coft": True, "eps": 0.001}
        | {"block_share": True, "use_cayley_neumann": False, "num_cayley_neumann_terms": 2},
        {"oft_block_size": 16},
        {"r": {"oft_block_size": 0, "r": 4}, "eps": {"coft": True}},
    ),
    "osf": ({"effective_rank": 4, "rank_pattern": {"q_proj": 2}, "init_weights": False}, {}, {}),
    "p-tuning": (
        {"num_virtual_tokens": 4, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8, "encoder_num_layers": 1}
        | {"encoder_dropout": 0.5},
        {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
        {"encoder_num_layers": LSTM, "encoder_dropout": LSTM},
    ),
    "peanut": ({"r": 4, "depth": 1, "act_fn": "tanh", "scaling": 0.5, "init_weights": False}, {"r": 8}, {}),
    "peft-lora": (
        {"r": 4, "lora_alpha": 4, "lora_dropout": 0.5, "bias": "all", "use_rslora": True, "rank_pattern": {"q_proj": 2}}
        | {"alpha_pattern": {"q_proj": 1.0}, "trainable_token_indices": [5, 7], "use_dora": True, "lora_bias": True},
        {},
        {},
    ),
    "prefix-tuning": (
        {"num_virtual_tokens": 4, "init_weights": "zero", "encoder_hidden_size": 8, "prefix_projection": True},
        {"num_virtual_tokens": 3},
        {"encoder_hidden_size": {"prefix_projection": True}},
    ),
    "prompt-tuning": ({"num_virtual_tokens": 4}, {"num_virtual_tokens": 3}, {}),
    "psoft": (
        {"r": 2, "psoft_dropout": 0.5, "ab_svd_init": "pissa_init", "psoft_svd": "lowrank"}
        | {"psoft_svd_lowrank_niter": 1, "random_seed": 1, "psoft_orth": False, "psoft_mag_b": False, "psoft_mag_a": False}
        | {"use_cayley_neumann": True, "num_cayley_neumann_terms": 3, "cayley_neumann_eps": 0.01, "init_weights": False},
        {"r": 4},
        {
            "psoft_svd_lowrank_niter": {"psoft_svd": "lowrank"},
            "random_seed": {"psoft_svd": "lowrank"},
            "num_cayley_neumann_terms": {"use_cayley_neumann": True},
            "cayley_neumann_eps": {"use_cayley_neumann": True},
        },
    ),
    "pvera": (
        {"r": 4, "projection_prng_key": 1, "pvera_dropout": 0.5, "d_initial": 0.5, "bias": "all", "init_weights": False},
        {"r": 8},
        {},
    ),
    "randlora": (
        {"r": 2, "projection_prng_key": 1, "sparse": True, "very_sparse": True, "randlora_dropout": 0.5, "randlora_alpha": 40}
        | {"bias": "all", "init_weights": False},
        {"r": 4, "randlora_alpha": 80},
        {},
    ),
    "road": ({"variant": "road_2", "group_size": 8, "init_weights": False}, {"group_size": 16}, {"group_size": {"init_weights": False}}),
    "shira": ({"r": 1, "random_seed": 1, "init_weights": False}, {"r": 2}, {}),
    "supertuning": (
        {"sparsity": 0.9, "select_top": False, "r": 4, "lora_alpha": 1.0, "lora_dropout": 0.5, "init_weights": False},
        {},
        {"lora_alpha": {"r": 4}, "lora_dropout": {"r": 4}},
    ),
    "tinylora": (
        {"r": 1, "u": 8, "weight_tying": 1.0, "projection_seed": 1, "init_v_bound": 0.5, "tinylora_dropout": 0.5, "bias": "all"}
        | {"init_weights": "uniform"},
        {"u": 16},
        {"init_v_bound": {"init_weights": "uniform"}},
    ),
    "trainable-tokens": ({"token_indices": [5, 7], "init_weights": False}, {"token_indices": [5, 9, 70, 40]}, {}),
    "unilora": (
        {"r": 2, "proj_seed": 1, "theta_d_length": 64, "unilora_dropout": 0.5, "bias": "all", "init_theta_d_bound": 0.5}
        | {"init_weights": False},
        {},
        {},
    ),
    "vblora": (
        {"r": 2, "num_vectors": 16, "vector_length": 8, "topk": 1, "vblora_dropout": 0.5, "bias": "all", "init_vector_bank_bound": 0.5}
        | {"init_logits_std": 1.0},
        {"num_vectors": 8, "vector_length": 16},
        {},
    ),
    "vera": ({"r": 4, "projection_prng_key": 1, "vera_dropout": 0.5, "d_initial": 0.5, "bias": "all", "init_weights": False}, {"r": 8}, {}),
    "waveft": (
        {"n_frequency": 20, "scaling": 5.0, "wavelet_family": "db2", "use_idwt": False, "random_loc_seed": 1, "bias": "all"}
        | {"n_frequency_pattern": {"q_proj": 20}, "proportional_parameters": True, "init_weights": False},
        {"n_frequency": 40},
        {},
    ),
}
