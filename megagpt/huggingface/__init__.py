"""A trained model as a Hugging Face folder: GPT-2's weights, a fast tokenizer, and a model card."""
