"""The schema of a run file's "megagpt.model" section: sizes, and the choices between GPT-2's parts and newer ones."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megagpt.config.parsing import Strict

# Bounds beyond what anybody trains with, and within what 64-bit arithmetic and a list can hold.
LONGEST = 2**24  # positions of a model
WIDEST = 10**6  # of the embeddings
DEEPEST = 10**4  # layers

# Choices that are made together. `llama` is the block of Touvron et al. 2023; `speedrun` is what lowered the loss of a
# small GPT-2 most in Jordan et al.'s modded-nanogpt and Karpathy's nanochat.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "position": "learned",
        "norm": "layernorm",
        "qk_norm": False,
        "n_kv_head": None,
        "mlp": "gelu",
        "bias": True,
        "tied": True,
        "init": "gpt2",
        "logit_softcap": None,
    },
    "llama": {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tied": False},
    "speedrun": {
        "position": "rotary",
        "norm": "rmsnorm_unweighted",
        "mlp": "relu2",
        "qk_norm": True,
        "bias": False,
        "tied": False,
        "init": "zero_out",
        "logit_softcap": 15.0,
    },
}
GATED = ("swiglu", "geglu")


class ModelConfig(Strict):
    """A decoder-only transformer, GPT-2 by default. The vocabulary is the tokenizer's, padded to a multiple of 128."""

    # Not written out with the other values, which say the same.
    preset: Literal["gpt2", "llama", "speedrun"] | None = Field(
        default=None, exclude=True, description="values for the choices below that are not given; null: GPT-2's"
    )
    n_layer: int = Field(default=12, gt=0, le=DEEPEST, description="number of transformer blocks")
    n_head: int = Field(
        default=12, gt=0, le=WIDEST, description="attention heads of each block; divides megagpt.model.n_embd"
    )
    n_kv_head: int | None = Field(
        default=None,
        gt=0,
        le=WIDEST,
        description="heads of keys and values, each shared by several of queries (grouped-query attention), whose "
        "number is a multiple; null: as many",
    )
    n_embd: int = Field(default=768, gt=0, le=WIDEST, description="width of embeddings and residuals")
    seq_len: int = Field(default=1024, gt=0, le=LONGEST, description="most positions, and tokens of an example")
    attention: Literal["sdpa", "eager"] = Field(
        default="sdpa", description="sdpa: torch's fused kernels; eager: plain matrix products"
    )
    position: Literal["learned", "sinusoidal", "rotary", "alibi"] = Field(
        default="learned",
        description="learned or sinusoidal embeddings, rotary embeddings of queries and keys, or ALiBi's biases",
    )
    rotary_base: float = Field(default=10_000.0, gt=1.0, le=1e12, description="longest wavelength / 2 pi, of rotary")
    rotary_scaling: float = Field(
        default=1.0, ge=1.0, le=1e4, description="positions are divided by it, for longer contexts; of rotary"
    )
    norm: Literal["layernorm", "rmsnorm", "rmsnorm_unweighted"] = Field(
        default="layernorm", description="LayerNorm, or RMSNorm with or without weights"
    )
    norm_eps: float = Field(
        default=1e-5, ge=1e-12, le=0.1, description="what every norm adds to the variance or mean square it divides by"
    )
    qk_norm: bool = Field(default=False, description="normalize queries and keys, with a norm of that kind")
    mlp: Literal["gelu", "relu2", "swiglu", "geglu"] = Field(
        default="gelu", description="GELU or squared ReLU; or a gated linear unit with SiLU or GELU"
    )
    mlp_width: int | None = Field(
        default=None,
        gt=0,
        le=4 * WIDEST,
        description="width between the MLP's layers; null: 4 times megagpt.model.n_embd, or 8/3 times, in whole 64s, "
        "for gated ones",
    )
    bias: bool = Field(default=True, description="linear layers and LayerNorms add biases")
    tied: bool = Field(default=True, description="the output head is the token embedding")
    init: Literal["gpt2", "zero_out"] = Field(
        default="gpt2", description="zero_out: projections into the residuals, and an untied head, begin at 0"
    )
    logit_softcap: float | None = Field(
        default=None, gt=0.0, le=1e6, description="logits become cap * tanh(logits / cap); null: no cap"
    )

    value_residual: bool = Field(
        default=False, description="blocks mix the first one's values into theirs, by two trained scalars"
    )
    embedding_shortcut: bool = Field(
        default=False, description="blocks mix the embeddings into their input, by two trained scalars"
    )

    sliding_window: int | None = Field(
        default=None,
        gt=0,
        le=LONGEST,
        description="positions that blocks attend to, the last one's own included; null: all",
    )
    sliding_window_pattern: int | None = Field(
        default=None,
        ge=2,
        le=DEEPEST,
        description="n: every n-th block attends to all positions, the others to the window; null: all have the window",
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """Fill in the preset's values. Raises ValueError for keys that contradict them."""
        name = given.get("preset") if isinstance(given, dict) else None
        if not isinstance(name, str) or name not in PRESETS:
            return given
        preset = PRESETS[name]
        if wrong := [key for key, value in preset.items() if given.get(key, value) != value]:
            keys = ", ".join(f"megagpt.model.{key}={given[key]!r}" for key in wrong)
            wanted = ", ".join(f"{key}={preset[key]!r}" for key in wrong)
            raise ValueError(
                f"{keys}: that contradicts megagpt.model.preset={name} ({wanted}); remove the preset, or those keys"
            )
        return {**preset, **given}

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"megagpt.model.n_embd={self.n_embd} is not a multiple of megagpt.model.n_head={self.n_head}; "
                f"set megagpt.model.n_embd to {round(self.n_embd / self.n_head) * self.n_head or self.n_head}"
            )
        if self.n_head % self.kv_heads:
            nearest = max(n for n in range(1, self.n_head + 1) if self.n_head % n == 0 and n <= self.kv_heads)
            raise ValueError(
                f"megagpt.model.n_head={self.n_head} is not a multiple of megagpt.model.n_kv_head={self.n_kv_head}, "
                f"and each head of keys serves as many of queries; set megagpt.model.n_kv_head to {nearest}"
            )
        if self.position in ("rotary", "sinusoidal") and self.rotated_width % 2:
            raise ValueError(
                f"megagpt.model.position={self.position} pairs numbers, and a width of {self.rotated_width} is odd; "
                "change megagpt.model.n_embd or megagpt.model.n_head"
            )
        return self

    @model_validator(mode="after")
    def _no_key_without_effect(self) -> Self:
        if self.position != "rotary":
            for key in ("rotary_base", "rotary_scaling"):
                if getattr(self, key) != ModelConfig.model_fields[key].default:
                    raise ValueError(
                        f"megagpt.model.{key}={getattr(self, key):g} has no effect with megagpt.model.position="
                        f"{self.position}; remove it, or set megagpt.model.position to rotary"
                    )
        every = self.sliding_window_pattern
        if every is not None and (self.sliding_window is None or every > self.n_layer):
            reason, way_out = f"megagpt.model.n_layer={self.n_layer}", ""
            if self.sliding_window is None:
                reason, way_out = "no megagpt.model.sliding_window", ", or set megagpt.model.sliding_window"
            raise ValueError(
                f"megagpt.model.sliding_window_pattern={every} has no effect with {reason}: it lets one block of "
                f"{every} attend to all positions; remove it{way_out}"
            )
        for key in ("value_residual", "embedding_shortcut"):
            if getattr(self, key) and self.n_layer == 1:
                raise ValueError(
                    f"megagpt.model.{key}=true has no effect with megagpt.model.n_layer=1, since it joins the later "
                    f"blocks to the first; remove it, or raise megagpt.model.n_layer"
                )
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def rotated_width(self) -> int:
        """Width that position encodings pair: of a head for rotary ones, of the embeddings for sinusoidal ones."""
        return self.head_dim if self.position == "rotary" else self.n_embd

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def windows(self) -> list[int | None]:
        """Positions that each block attends to; None: all."""
        every = self.sliding_window_pattern
        return [None if every and i % every == 0 else self.sliding_window for i in range(1, self.n_layer + 1)]

    @property
    def gated(self) -> bool:
        """Tell whether the MLP's first layer computes a gate as well."""
        return self.mlp in GATED

    @property
    def mlp_inner(self) -> int:
        """Width between the MLP's layers (for gated ones Shazeer 2020: as many parameters as without a gate)."""
        return self.mlp_width or (-(-8 * self.n_embd // (3 * 64)) * 64 if self.gated else 4 * self.n_embd)

    @classmethod
    def whole(cls, identity: Mapping[str, Any]) -> dict[str, Any]:
        """Return every choice of a checkpoint's `identity`, those of GPT-2 included, and widths in numbers."""
        cfg = cls(**identity)
        return cfg.model_dump() | {"n_kv_head": cfg.kv_heads, "mlp_width": cfg.mlp_inner}

    def identity(self) -> dict[str, Any]:
        """Return what checkpoints are compared by: the sizes, and the choices that are not GPT-2's."""
        usual = ModelConfig(n_embd=self.n_embd, n_head=self.n_head, mlp=self.mlp)
        defaults = usual.model_dump() | {"n_kv_head": usual.kv_heads, "mlp_width": usual.mlp_inner, "mlp": "gelu"}
        values = self.model_dump() | {"n_kv_head": self.kv_heads, "mlp_width": self.mlp_inner}
        always = ("n_layer", "n_head", "n_embd", "seq_len", "attention")
        return {key: value for key, value in values.items() if key in always or value != defaults[key]}
