"""Keys of other tools: those that are understood, and what to say to the others."""

from megatrain_io.config.schema import ROOT

__all__ = ["ALIASES", "ELSEWHERE"]

ALIASES: dict[tuple[str, str], str] = {
    (ROOT, "model_name_or_path"): "model",
    ("data", "sequence_len"): "max_length",
    ("data", "cutoff_len"): "max_length",
    ("data", "max_seq_length"): "max_length",
}

# Keys of other tools that are refused, and what to do instead.
ELSEWHERE: dict[str, str] = {
    name: sentence
    for names, sentence in (
        ("gradient_clipping clip_grad_norm max_norm grad_clip", "use train.max_grad_norm"),
        ("max_disk", "not available yet; remove it"),
        ("report_to run_name wandb_project logging_dir callbacks", "not available yet; remove it"),
        ("lora lora_r lora_rank lora_alpha lora_dropout lora_target peft", "not available yet; remove it"),
        ("lora_target_modules load_in_4bit load_in_8bit quantization_bit", "not available yet; remove it"),
        ("neftune_noise_alpha label_smoothing_factor group_by_length", "not available yet; remove it"),
        ("attn_implementation", "use model_options.attn_implementation"),
        ("flash_attention flash_attn torch_compile", "not available yet; remove it"),
        ("optim optimizer", "AdamW is the only optimizer so far; remove it"),
        ("method finetuning_type adapter stage", "not available yet: all parameters are trained; remove it"),
        (
            "save_steps save_strategy save_total_limit saves_per_epoch save_only_model",
            "every step is durable here; nothing to set; remove it",
        ),
        (
            "bf16 fp16 fp32 tf32 dtype torch_dtype mixed_precision pure_bf16",
            "use precision (train.precision: bf16 or fp32)",
        ),
        (
            "gradient_checkpointing gradient_checkpointing_kwargs activation_offloading",
            "always on here; remove it",
        ),
        (
            "deepspeed fsdp fsdp_config accelerator_config zero_stage",
            "not used here: the model is paged through NVMe instead; remove it",
        ),
        ("eval_strategy evaluation_strategy evals_per_epoch", "use train.eval_steps"),
        ("val_set_size val_size test_size eval_dataset test_datasets", "use data.eval"),
        ("datasets dataset dataset_dir dataset_name train_file", "use data.train"),
        ("micro_batch_size train_batch_size batch_size", "use train.per_device_train_batch_size"),
        ("num_epochs epochs", "use train.num_train_epochs"),
        ("lr_scheduler scheduler", "use train.lr_scheduler_type"),
        ("lr", "use train.learning_rate"),
        ("warmup_ratio", "not available yet; use train.warmup_steps"),
        ("base_model", "use model"),
        ("template", "use data.chat_template"),
        ("train_on_inputs completion_only_loss", "use data.assistant_only_loss"),
        ("sample_packing", "use data.packing"),
        ("resume_from_checkpoint", "resuming is the option --resume of the command line"),
        ("overwrite_output_dir", "a run folder is never overwritten; choose another output_dir"),
        ("trust_remote_code", "code from a model folder is never run; remove it"),
        ("push_to_hub hub_model_id", "nothing is ever uploaded; remove it"),
        ("do_train do_eval dataloader_num_workers dataset_num_proc", "not needed here; remove it"),
    )
    for name in names.split()
}
