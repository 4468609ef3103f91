"""The tokenizer.json of an export: the one that the data was built with, or our SentencePiece model converted.

The conversion gives the same ids, but for ties of unigram's scores.
Two segmentations of equal probability differ by the last bit of a sum, which SentencePiece takes in 32 bits and
`tokenizers` in 64.
"""

import json
import re
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from megagpt.errors import UserError
from megagpt.tokenizer.sentencepiece_model import META_SPACE
from megagpt.tokenizer.tokenizer import Tokenizer
from megagpt.tokenizer.tokenizer_json import without_additions

NEVER = -1e4  # the score of what text must not be matched with: control tokens, and bytes by their names


def exported_json(tokenizer: Tokenizer) -> str:
    """Return the tokenizer.json to export. Raises UserError for a SentencePiece model that cannot be converted.

    One that was given is returned as it is, unless it adds tokens to a text or cuts it, which training did not see.
    """
    if tokenizer.tokenizer_json is None:
        return str(fast_tokenizer(tokenizer).to_str(pretty=True))
    return without_additions(tokenizer.tokenizer_json)


def fast_tokenizer(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """Convert a tokenizer that keeps every byte of a text (`is_lossless`). Raises UserError for another one.

    Spaces are spelled as spaces, so that a U+2581 in a text, which SentencePiece spells them with, stays what it is.
    """
    if not tokenizer.is_lossless:
        raise UserError(
            f"the tokenizer normalizes text ({tokenizer.normalizer or 'its own rules'}) or cannot spell every byte, "
            "which is not converted; export a model whose tokenizer data_tools has trained"
        )
    fast = tokenizers.Tokenizer(models.BPE())
    names = [name.replace(META_SPACE, " ") for name in tokenizer.names()]
    pieces = {name.replace(META_SPACE, " "): score for name, (_, score) in tokenizer.pieces().items()}
    if tokenizer.kind == "unigram":
        scores = [(name, pieces.get(name, NEVER)) for name in names]
        # NEVER keeps a text such as "<0x41>" from being one token only if each of its characters has a piece. One
        # without is in no longer piece either, so that the text may be cut around it.
        if spelled := "".join(sorted(set("".join(names)) - pieces.keys())):
            fast.pre_tokenizer = pre_tokenizers.Split(Regex(f"[{re.escape(spelled)}]"), "isolated")
        fast.model = models.Unigram(scores, unk_id=tokenizer.unknown_id, byte_fallback=True)
    else:
        vocab = {name: i for i, name in enumerate(names)}
        merges = _merges(pieces) if tokenizer.kind == "bpe" else []
        unknown = names[tokenizer.sentencepiece.unknown_id]
        fast.model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    # SentencePiece cuts the text at these first, which it calls user-defined symbols.
    fast.add_tokens([AddedToken(name, normalized=False) for name in ("\n", "\t") if name in pieces])
    fast.add_special_tokens([AddedToken(names[i], normalized=False) for i in tokenizer.control_ids()])
    fast.encode_special_tokens = True  # "</s>" in a text is four characters
    return fast


def _merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """Return the pairs that BPE joins, in order: SentencePiece stores none, but the rank of what each gives."""
    ranked = []
    for piece, score in pieces.items():
        halves = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        ranked += [(-score, pair) for pair in halves if pair[0] in pieces and pair[1] in pieces]
    return [pair for _, pair in sorted(ranked, key=lambda entry: entry[0])]


def write_tokenizer(tokenizer_json: str, tokenizer: Tokenizer, seq_len: int, folder: Path) -> None:
    """Write what AutoTokenizer reads."""
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    names = tokenizer.names()
    end = names[tokenizer.eod_id]
    unknown = {} if tokenizer.unknown_id is None else {"unk_token": names[tokenizer.unknown_id]}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "bos_token": end,
        "eos_token": end,
        **unknown,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
