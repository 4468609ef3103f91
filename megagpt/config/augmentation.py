"""The part of the schema that says how documents become training samples: packing and augmentations."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megagpt.config.parsing import Strict
from megagpt.options import MANY


class FimConfig(Strict):
    """Fill-in-the-middle (Bavarian et al. 2022): a document's part of a sample is cut in three, its middle put last."""

    rate: float = Field(default=0.0, ge=0.0, le=1.0, description="share of the documents' parts that are rearranged")
    spm_rate: float = Field(default=0.5, ge=0.0, le=1.0, description="share of those with the suffix before the prefix")
    pieces: tuple[str, str, str] | None = Field(
        default=None,
        description="the tokenizer's pieces for prefix, suffix and middle; null: ids that pad the vocabulary",
    )


class SpanCorruptionConfig(Strict):
    """Span corruption (Raffel et al. 2020): spans in a document's part of a sample become sentinels, and follow it."""

    rate: float = Field(default=0.0, ge=0.0, le=1.0, description="share of the documents' parts that are corrupted")
    density: float = Field(default=0.15, gt=0.0, le=0.5, description="share of their tokens that is in spans")
    mean_span: float = Field(default=3.0, ge=1.0, le=1e6, description="tokens per span")
    sentinels: int = Field(
        default=16, gt=0, le=10_000, description="number of sentinel ids, used in turn, where pieces is null"
    )
    pieces: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="the tokenizer's pieces for sentinels; null: ids that pad the vocabulary",
    )


class TokenDropoutConfig(Strict):
    """Word dropout (Bowman et al. 2016): inputs are hidden, targets stay."""

    rate: float = Field(default=0.0, ge=0.0, lt=1.0, description="share of the inputs that is hidden")
    piece: str = Field(default="<unk>", description="the tokenizer's piece that replaces them")


class GoldfishConfig(Strict):
    """Goldfish loss (Hans et al. 2024): one target in k, chosen by the tokens before it, has no loss.

    As the same target is dropped in every copy of a text, the model cannot memorize the text verbatim.
    """

    k: int = Field(default=0, ge=0, le=MANY, description="drop one target in k; 0: none")
    context: int = Field(default=13, gt=0, le=1000, description="number of tokens before a target that decide on it")

    @model_validator(mode="after")
    def _something_is_left_to_learn(self) -> Self:
        if self.k == 1:
            raise ValueError(
                "megagpt.augment.goldfish.k=1 would drop every target; set megagpt.augment.goldfish.k to 2 or more, or "
                "to 0 for none"
            )
        return self


class AugmentConfig(Strict):
    """Augmentations of the training samples, each off by default; data/augmentation.py gives their order."""

    fim: FimConfig = FimConfig()
    span_corruption: SpanCorruptionConfig = SpanCorruptionConfig()
    token_dropout: TokenDropoutConfig = TokenDropoutConfig()
    goldfish: GoldfishConfig = GoldfishConfig()

    @model_validator(mode="after")
    def _one_rearrangement_for_each_part(self) -> Self:
        if self.fim.rate + self.span_corruption.rate > 1.0:
            raise ValueError(
                f"megagpt.augment.fim.rate={self.fim.rate} + megagpt.augment.span_corruption.rate="
                f"{self.span_corruption.rate} exceed 1, but at most one of them can act on a document's part of a "
                "sample; lower one"
            )
        return self


class PackingConfig(Strict):
    """The way in which documents become samples of seq_len tokens."""

    kind: Literal["concatenate", "concatenate-masked", "best-fit"] = Field(  # data/packing.py: PACKING
        default="concatenate",
        description="concatenate: windows of all documents joined; concatenate-masked: the same without attention "
        "across documents; best-fit: whole documents, padded",
    )
