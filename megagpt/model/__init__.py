"""GPT-2 in plain torch, without ranks or DeepSpeed."""
