"""Tokenizers: SentencePiece models and Hugging Face tokenizer.json files behind one interface."""
