"""DeepSpeed: the only package that imports it or knows its internals."""

import os
import warnings

import torch

# Before the first import of deepspeed: left to itself, it guesses the same and warns that it did.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # names that DeepSpeed uses
