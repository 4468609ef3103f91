"""The schema of how texts are generated: the run file's `megagpt.sample`, and the options of `megagpt generate`."""

from pydantic import Field, field_validator

from megagpt.config.parsing import Strict
from megagpt.options import MANY

SMALLEST = 1e-30  # of a positive float32, with room to divide by it


class GenerationConfig(Strict):
    """The texts that are generated every `every.sample` steps, for people to read."""

    prompts: tuple[str, ...] = Field(default=("\n",), description="the beginnings to continue")
    max_tokens: int = Field(default=128, gt=0, le=MANY, description="tokens to generate for each prompt")
    temperature: float = Field(default=0.8, ge=0.0, le=1e6, description="divides logits; 0: the likeliest token")
    top_k: int = Field(default=50, ge=0, le=MANY, description="number of likeliest tokens to draw from; 0: all")
    top_p: float = Field(
        default=1.0, ge=1e-6, le=1.0, description="draw from the likeliest tokens of this total probability"
    )
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="draw from tokens at least this likely, relative to the likeliest"
    )
    repetition_penalty: float = Field(
        default=1.0, ge=0.01, le=100.0, description="above 1: tokens that the text has already become less likely"
    )
    stop: tuple[str, ...] = Field(default=(), description="a text ends before the first of these that it would have")

    @field_validator("temperature")
    @classmethod
    def _logits_can_be_divided_by_it(cls, temperature: float) -> float:
        if 0.0 < temperature < SMALLEST:
            raise ValueError(
                f"{temperature:g} is too small to divide by; set 0 for always the likeliest token, or 0.01"
            )
        return temperature

    @field_validator("stop")
    @classmethod
    def _is_text(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty string is before any text, so that none would be generated; leave it out")
        return stop
