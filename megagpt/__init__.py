"""megagpt: a small, typed, tested GPT-2 pretrainer on DeepSpeed."""

__version__ = "0.1.0"
