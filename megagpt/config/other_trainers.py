"""The names that other trainers have for settings of ours, for messages about unknown keys.

They are those of nanoGPT, of Hugging Face's TrainingArguments and GPT2Config, of Megatron-LM and of Lightning.
"""

# Our key -> its names elsewhere.
NAMES = {
    "train_batch_size": "batch_size global_batch_size total_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size per_gpu_train_batch_size micro_batch_size "
    "device_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accumulation_steps accumulate_grad_batches",
    "gradient_clipping": "max_grad_norm grad_clip clip_grad clip_grad_norm gradient_clip_val",
    "optimizer.params.lr": "learning_rate max_lr peak_lr adam_lr",
    "optimizer.params.muon_lr": "matrix_lr lr_muon muon_learning_rate",
    "optimizer.params.lr_scale": "embedding_lr unembedding_lr head_lr scalar_lr embed_lr lr_mult lr_scales",
    "optimizer.params.momentum": "muon_momentum",
    "optimizer.params.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.params.eps": "adam_epsilon adam_eps epsilon",
    "optimizer.params.weight_decay": "wd decay",
    "optimizer.params.cautious_weight_decay": "cautious cautious_wd",
    "optimizer.type": "optim",
    "bf16.enabled": "dtype precision mixed_precision",
    "wandb.enabled": "report_to wandb_log",
    "wandb.project": "wandb_project",
    "megagpt.out_dir": "output_dir save_dir checkpoint_dir run_name wandb_run_name logging_dir",
    "megagpt.init_from": "model_name_or_path model_name pretrained",
    "megagpt.seed": "random_seed",
    "megagpt.compile": "torch_compile",
    "megagpt.model.n_layer": "n_layers num_layers num_hidden_layers layers depth",
    "megagpt.model.n_head": "n_heads num_heads num_attention_heads heads",
    "megagpt.model.n_embd": "n_embed d_model hidden_size hidden_dim embed_dim emb_dim embedding_dim",
    "megagpt.model.seq_len": "block_size context_length context_size max_seq_len max_seq_length seq_length "
    "sequence_length max_length n_ctx n_positions max_position_embeddings",
    "megagpt.model.n_kv_head": "n_kv_heads num_key_value_heads num_kv_heads num_query_groups",
    "megagpt.model.position": "position_embedding_type pos_emb use_rotary_position_embeddings",
    "megagpt.model.rotary_base": "rope_theta rope_base rope_freq_base",
    "megagpt.model.norm": "normalization norm_type",
    "megagpt.model.norm_eps": "layer_norm_epsilon layer_norm_eps layernorm_epsilon norm_epsilon rms_norm_eps",
    "megagpt.model.mlp": "activation activation_function hidden_act",
    "megagpt.model.mlp_width": "intermediate_size ffn_hidden_size ffn_dim n_inner d_ff",
    "megagpt.model.bias": "use_bias add_bias_linear",
    "megagpt.model.tied": "tie_word_embeddings tie_weights weight_tying",
    "megagpt.model.logit_softcap": "final_logit_softcapping softcap",
    "megagpt.model.value_residual": "resformer use_value_residual value_lambdas",
    "megagpt.model.embedding_shortcut": "x0_lambdas resid_lambdas embedding_residual",
    "megagpt.model.sliding_window": "window_size attention_window local_window sliding_window_size attn_window",
    "megagpt.model.sliding_window_pattern": "window_pattern window_attn_skip_freq local_attention_pattern",
    "megagpt.data.train": "dataset data_dir data_path dataset_name train_data train_file training_data",
    "megagpt.data.val": "val_data valid_data validation_file eval_data eval_dataset eval_file",
    "megagpt.data.val_tokens": "eval_iters limit_val_batches",
    "megagpt.data.seed": "data_seed",
    "megagpt.schedule.max_steps": "max_iters train_iters num_steps total_steps n_steps iterations",
    "megagpt.schedule.max_epochs": "epochs n_epochs num_epochs num_train_epochs train_epochs",
    "megagpt.schedule.first_batch": "rampup_batch_size batch_size_rampup",
    "megagpt.schedule.warmup_steps": "warmup warmup_iters lr_warmup_iters num_warmup_steps warmup_ratio",
    "megagpt.schedule.shape": "lr_scheduler_type lr_scheduler lr_schedule lr_decay_style decay_lr",
    "megagpt.schedule.end_step": "lr_decay_iters lr_decay_steps",
    "megagpt.schedule.min_lr_ratio": "min_lr lr_min final_lr",
    "megagpt.regularization.dropout": "dropout_rate hidden_dropout",
    "megagpt.regularization.embedding_dropout": "embd_pdrop embd_dropout emb_dropout embed_dropout",
    "megagpt.regularization.attention_dropout": "attn_pdrop attn_dropout",
    "megagpt.regularization.residual_dropout": "resid_pdrop resid_dropout",
    "megagpt.regularization.stochastic_depth": "drop_path drop_path_rate layerdrop layer_drop stochastic_depth_rate "
    "layer_dropout",
    "megagpt.regularization.label_smoothing": "label_smoothing_factor",
    "megagpt.early_stopping.patience": "early_stopping_patience early_stopping_rounds",
    "megagpt.early_stopping.patience_tokens": "patience_in_tokens token_patience",
    "megagpt.early_stopping.smoothing": "smoothing_window smooth_window",
    "megagpt.early_stopping.max_gap": "train_val_gap generalization_gap overfit_threshold overfitting_threshold",
    "megagpt.early_stopping.min_delta": "early_stopping_threshold",
    "megagpt.early_stopping.min_steps": "start_from_epoch",
    "megagpt.early_stopping.monitor": "metric_for_best_model",
    "megagpt.early_stopping.restore_best": "load_best_model_at_end restore_best_weights",
    "megagpt.every.log": "log_interval log_every logging_steps log_steps logging_interval",
    "megagpt.every.eval": "eval_interval eval_every eval_steps val_interval val_check_interval",
    "megagpt.every.save": "save_interval save_every save_steps checkpoint_interval ckpt_interval",
    "megagpt.every.sample": "sample_interval sample_every",
    "megagpt.keep.last": "save_total_limit",
    "megagpt.recompute.policy": "gradient_checkpointing activation_recomputation",
}
# Our key, or one of those names -> what differs in its value.
NOTES = {
    "train_batch_size": "It counts the sequences of a step over all ranks; train_micro_batch_size_per_gpu those of one "
    "pass on a rank.",
    "optimizer.params.betas": "It is a list of two, such as [0.9, 0.95].",
    "optimizer.params.lr_scale": 'It holds factors on optimizer.params.lr, such as {"embeddings": 2, "head": 0.5}.',
    "optimizer.type": 'It is "AdamW", "Adam" or "Muon".',
    "bf16.enabled": "It is true or false, as is fp16.enabled; without both, fp32.",
    "wandb.enabled": "It is true or false, as are tensorboard.enabled and comet.enabled.",
    "megagpt.data.train": 'It is a list such as [{"path": "data/mine"}].',
    "megagpt.data.val_tokens": "It is a number of tokens.",
    "warmup_ratio": "It is a number of updates.",
    "megagpt.init_from": "It is a run's folder, one of its steps, or what `megagpt import` made.",
    "megagpt.early_stopping.monitor": 'It is "val/loss" or "val/ema_loss", or one of them with the name of a set.',
    "start_from_epoch": "It counts updates.",
    "megagpt.schedule.shape": 'It is "cosine", "linear", "constant" or "warmup-stable-decay".',
    "megagpt.schedule.min_lr_ratio": "It is a share of optimizer.params.lr.",
    "megagpt.recompute.policy": 'It is "none", "selective", "every_k", "full" or "budget".',
}
# Names of settings that have no key here -> why.
REMOVED = {
    "ns_method ns_steps nesterov": "Muon is that of Jordan et al. (2024), with Nesterov momentum and five iterations; "
    "remove it",
    "vocab_size tokenizer tokenizer_name": "the vocabulary is that of the dataset's tokenizer; remove it",
    "device accelerator use_cpu no_cuda": "a GPU is used where there is one, and none where CUDA_VISIBLE_DEVICES is "
    "empty; remove it",
    "n_gpu num_gpus gpus devices world_size num_nodes nproc_per_node nnodes num_processes backend local_rank": ""
    "`megagpt train` starts one rank for each GPU, or --nproc N of them, and a launcher its own number; remove it",
    "num_workers dataloader_num_workers dataloader_pin_memory pin_memory": "data is read ahead by a thread; remove it",
    "resume resume_from_checkpoint": "a run resumes by itself when megagpt.out_dir holds a checkpoint; remove it",
    "deepspeed deepspeed_config": "DeepSpeed's keys stand in the run file itself; write them into it",
    "overwrite_output_dir": "remove it, and give --fresh to start again",
    "greater_is_better": "a loss is better where it is lower; remove it",
    "per_device_eval_batch_size eval_batch_size": "validation uses train_micro_batch_size_per_gpu; remove it",
    "bias activation_function n_inner intermediate_size": "it is as in GPT-2; remove it",
}

OUR_KEY = {name: key for key, names in NAMES.items() for name in names.split()}
WITHOUT_KEY = {name: why for names, why in REMOVED.items() for name in names.split()}
