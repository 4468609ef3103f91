"""A trained model for Python programs, which `megagpt.load` returns: logits, generated text, and scores of text.

Shapes: T tokens, V the tokenizer's vocabulary.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from megagpt.checkpoint.load import load_model
from megagpt.config.generation import GenerationConfig
from megagpt.config.mistakes import explain
from megagpt.data.loader import document_numbers
from megagpt.data.lost_text import changed_prompts, misspelt
from megagpt.data.packing import PACKING
from megagpt.errors import UserError, unusable_path
from megagpt.model.generate import complete
from megagpt.model.gpt import GPT
from megagpt.model.loss import token_nats
from megagpt.model.packed_weights import packed_weights
from megagpt.options import LARGEST
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.train.evaluate import Evaluation
from megagpt.user_paths import local_path

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES |= {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Ids = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer. Wrong arguments of its methods raise megagpt.errors.UserError, a ValueError.

    `model` is plain torch, in evaluation mode, and takes batches: tokens (B, T) -> logits (B, T, padded vocabulary).
    """

    model: GPT
    tokenizer: Tokenizer
    step_dir: Path  # which step this is
    masked: bool  # in training, attention stayed within documents

    def logits(self, text: str | Ids) -> Tensor:
        """Return what the model expects after each token: (T, V) in fp32, on the model's device.

        A text begins a document: row 0 is about its first token, and the last row about the one after its end. Token
        ids are read as they are: row i is about the token after ids[i].
        """
        ids = self._ids(text)
        if len(ids) > self.seq_len:
            counted = "the end-of-document token before it included" if isinstance(text, str) else "as given"
            raise UserError(
                f"the text is {len(ids):,} tokens, {counted}, and the model has {self.seq_len:,} positions; give a "
                "shorter one, or use `score`, which cuts longer text into windows"
            )
        inputs = ids.unsqueeze(0)
        with torch.no_grad():
            logits = self.model(inputs, documents=self._documents(inputs))[0, :, : self.tokenizer.vocab_size].float()
        self._check_finite(logits)
        return logits

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 50,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> str:
        """Return the prompt and its continuation, as `megagpt generate` does: the same seed gives the same text.

        It ends after max_tokens tokens, where the model ends the document, or before the first of the strings `stop`.
        Temperature 0 takes the likeliest token, top_k=0 the whole vocabulary.
        """
        if not isinstance(prompt, str):
            raise UserError(f"prompt={prompt!r:.40} is a {type(prompt).__name__}; give text, a str")
        if type(seed) is not int or abs(seed) > LARGEST:
            raise UserError(f"seed={seed!r} is no whole number of up to 63 bits; give another")
        settings = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        settings |= {"min_p": min_p, "repetition_penalty": repetition_penalty}
        try:
            cfg = GenerationConfig.model_validate({"prompts": (prompt,), "stop": _stops(stop), **settings})
        except ValidationError as error:
            raise UserError(explain(error, GenerationConfig, section="")) from None
        for line in changed_prompts(self.tokenizer, cfg.prompts, self.seq_len):
            warnings.warn(line, stacklevel=2)
        with packed_weights(self.model, steps=max_tokens):
            return complete(self.model, self.tokenizer, cfg.prompts, cfg, seed=seed)[0].whole

    def score(self, text: str | Ids) -> Evaluation:
        """Return how well the model predicts a text: loss in nats per token, bits_per_byte, perplexity, tokens, bytes.

        A text begins a document, and each of its tokens counts. Of token ids, the first is only read. What is longer
        than the model's positions is cut into windows, as in `megagpt evaluate`: a token is predicted from those of its
        own window.
        """
        ids = self._ids(text)
        if len(ids) < 2:
            raise UserError("nothing to score: give a text that is not empty, or two token ids or more")
        nats = 0.0
        for begin in range(0, len(ids) - 1, self.seq_len):
            window = ids[begin : begin + self.seq_len + 1].unsqueeze(0)
            inputs, targets = window[:, :-1], window[:, 1:]
            with torch.no_grad():
                each = self.model(inputs, documents=self._documents(inputs), score=token_nats(targets))
            self._check_finite(each)
            nats += each.double().sum().item()
        n_tokens = len(ids) - 1
        return Evaluation(nats / n_tokens, n_tokens, self._bytes_of(text, ids[1:]))

    @property
    def seq_len(self) -> int:
        """The model's positions: the most tokens that it reads at a time."""
        return self.model.cfg.seq_len

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.model.wte.weight.device

    def __repr__(self) -> str:
        n_params = sum(p.numel() for p in self.model.parameters())
        return (
            f"<megagpt model of {self.step_dir}: {n_params:,} parameters, {self.seq_len:,} positions, "
            f"{self.tokenizer.vocab_size:,} tokens, {self.model.wte.weight.dtype} on {self.device}>"
        )

    def _ids(self, text: str | Ids) -> Tensor:
        """Return the tokens to read, int64 (T,), on the model's device."""
        if isinstance(text, str):
            if change := misspelt(self.tokenizer, text):
                warnings.warn(f"the tokenizer cannot spell the text: {change}", stacklevel=3)
            return torch.tensor([self.tokenizer.eod_id, *self.tokenizer.encode(text).tolist()], device=self.device)
        try:
            ids = text if isinstance(text, Tensor) else torch.from_numpy(np.array(text))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise UserError(f"{text!r:.40} is neither text, a str, nor a sequence of token ids") from None
        if ids.dim() != 1 or len(ids) == 0:
            raise UserError(f"the token ids have shape {tuple(ids.shape)}; give those of one text, one at least")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise UserError(f"the token ids are {ids.dtype}; give whole numbers")
        ids = ids.to(self.device, torch.int64)
        most = self.model.wte.num_embeddings - 1
        if not 0 <= int(ids.min()) <= int(ids.max()) <= most:
            wrong = next(i for i in ids.tolist() if not 0 <= i <= most)
            raise UserError(f"token id {wrong} is none of the model's, which are 0 to {most}")
        return ids

    def _documents(self, inputs: Tensor) -> Tensor | None:
        """Number the documents of inputs (1, T) if the model was trained with attention within documents."""
        return document_numbers(inputs, self.tokenizer.eod_id) if self.masked else None

    def _bytes_of(self, text: str | Ids, targets: Tensor) -> int:
        if isinstance(text, str):
            return len(text.encode())
        token_bytes = np.zeros(self.model.wte.num_embeddings, np.int64)  # the ids that pad the vocabulary have none
        token_bytes[: self.tokenizer.vocab_size] = self.tokenizer.token_bytes()
        return int(token_bytes[targets.cpu().numpy()].sum())

    def _check_finite(self, numbers: Tensor) -> None:
        if not bool(numbers.isfinite().all()):
            raise UserError(
                f"the output of {self.step_dir} is not finite in {self.model.wte.weight.dtype}; load it with "
                'dtype="fp32", or use an earlier checkpoint'
            )


def load(
    run: str | os.PathLike[str], *, device: str | torch.device | None, dtype: str | torch.dtype, ema: bool
) -> LanguageModel:
    """Do what megagpt.load promises."""
    if dtype not in DTYPES and dtype not in DTYPES.values():
        raise UserError(f"dtype={dtype!r} is none of fp32, bf16, fp16")
    where = _usable(device)
    try:
        model, tokenizer, step_dir, packing = load_model(Path(local_path(os.fspath(run))), where, ema=ema)
    except OSError as error:
        raise unusable_path(error) or error from error
    number_type = dtype if isinstance(dtype, torch.dtype) else DTYPES[dtype]
    return LanguageModel(model.to(number_type), tokenizer, step_dir, PACKING[packing.kind].masked)


def _stops(stop: object) -> object:
    return (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop


def _usable(device: str | torch.device | None) -> torch.device:
    """Return the device, after a number was on it. Raises UserError."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except Exception as error:  # of many kinds, by the kind of device
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f'device={str(device)!r} cannot be used ({why:.200}); give device="cpu"') from error
    return found
