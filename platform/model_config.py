"""What a run can be told of its language model: which, where it is cut, its adapters, its prompt.

It must not know how the model is built, nor what trains it.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from fellray.platform.section import Section


class LoraSpec(Section):
    """Low-rank adapters, by the field names of peft's `LoraConfig`."""

    r: int = Field(default=8, ge=1)
    """Rank."""
    lora_alpha: float = Field(default=16, gt=0)
    """Scale: the adapter's output is multiplied by lora_alpha / r (or / sqrt(r) with rslora)."""
    target_modules: tuple[str, ...] = ("query", "value")
    """Names of the projections that get an adapter, in every block of bottom, trunk and top."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""

    @property
    def scaling(self) -> float:
        """What the adapter's output is multiplied by."""
        return self.scaling_of(self.r)

    def scaling_of(self, rank: int) -> float:
        """The same for an adapter of another rank."""
        return self.lora_alpha / (rank**0.5 if self.use_rslora else rank)


Part = Literal["bottom", "trunk", "top"]
"""A part of the model that is cut; bottom and top are the client's."""


class AdapterLevels(Section):
    """Where a projection has adapters of two levels, a user's and a group's, and what lies between
    them. The method says so (`fedpa_lora`); how they are made is `levels`' business."""

    user: tuple[Part, ...] = ()
    """Parts with an adapter of the client's own."""
    group: tuple[Part, ...] = ()
    """Parts with an adapter of the client's group."""
    gated: bool = False
    """Where a projection has both, a gate weighs them."""


class GenerationConfig(Section):
    """How a decoder-only model (`llama`, `qwen2`, `qwen3`) is asked for the next title.

    The answer is the title in quotes, and the model's end of text. The title's embedding, and that
    of every item's title, are the last hidden state at the last token, of the model without
    adapters; items are ranked by L2 distance (BIGRec's grounding, Bao et al., 2023). The count
    prior and the temperature are not used.
    """

    template: str = (
        "### Instruction:\nHere is what somebody chose so far, the oldest first. Name one more "
        "title that this person will like.\n\n### Input:\n{history}\n\n### Response:\n"
    )
    """The prompt, the same in training and inference. `{history}` stands for the titles, each in
    quotes, with commas between them. The oldest are left out where prompt and answer together would
    be longer than `model.max_tokens`."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Most tokens of an answer, its end included; a longer title is cut off."""
    beams: int = Field(default=4, ge=1)
    """Beams of the search (transformers' `num_beams`); 1: the likeliest token each time."""
    at_once: int = Field(default=16, ge=1)
    """Texts of an evaluation that are written side by side. Each has as many rows in the caches as
    there are beams."""
    train_on_inputs: bool = False
    """The prompt's tokens are in the loss too, as in the published code."""
    published_whitespace: bool = False
    """A defect of the published code: in training every line of the prompt, and the answer's,
    begins with 16 spaces that inference does not have, and an answer's quotes are taken off only
    where nothing stands before them."""

    @model_validator(mode="after")
    def _one_history(self) -> Self:
        if self.template.count("{history}") != 1:
            raise ValueError("template must hold {history} once")
        return self


class ModelConfig(Section):
    """The language model, where it is cut, and how a history becomes a score."""

    name: str = "all-MiniLM-L6-v2"
    """`all-MiniLM-L6-v2` (comes with the installation), or any BERT-family encoder by Hugging
    Face name or by path; or a decoder of the families of Llama, Qwen2 and Qwen3, which then writes
    titles (`model.generation`)."""
    cut: int = Field(default=1, ge=0)
    """k: blocks 0..k-1 stay on the client with the embeddings (the bottom)."""
    cuts: tuple[int, int] | None = None
    """The smallest and the largest cut of any client. The run enters it where `clients.own` gives
    cuts; what is written here does not count."""
    top: int = Field(default=1, ge=0)
    """How many of the last blocks stay on the client with the pooling (the top)."""
    lora: LoraSpec = LoraSpec()
    """The trained adapters."""
    levels: AdapterLevels | None = Field(default=None, exclude=True)
    """Adapters of two levels. The method enters it; what is written here does not count, and it is
    not written down."""
    max_history: int = Field(default=8, ge=1)
    """How many of a user's last items are read."""
    max_tokens: int = Field(default=96, ge=16)
    """Longest input in tokens, special tokens included; the oldest items are cut off."""
    pad_multiple: int = Field(default=16, ge=8, multiple_of=8)
    """A row is padded to a multiple of this, at least 16 tokens, by its own length alone: whoever
    shares its batch never changes its bits."""
    temperature: float = Field(default=0.5, gt=0)
    """Cosine scores are divided by this. Beside the prior 0.5 ranks better than RecFormer's 0.05
    (docs/tables.md); without it try 0.05."""
    generation: GenerationConfig = GenerationConfig()
    """Prompt and answer of a model that writes."""
    prior: bool = True
    """Add log(1 + the item's count in this client's own training split) to the scores."""
    freeze_bottom: bool = False
    """The bottom has no adapters: a history's hidden states at the lower cut never change, no
    gradient is sent down there, and with `wire.keep_rows_mib` a history is sent once. Not with cuts
    in `clients.own`."""

    @property
    def span(self) -> tuple[int, int]:
        """The smallest and the largest cut."""
        return self.cuts or (self.cut, self.cut)

    @model_validator(mode="after")
    def _room_for_a_padded_row(self) -> Self:
        if self.max_tokens % self.pad_multiple:
            raise ValueError(
                f"max_tokens ({self.max_tokens}) must be a multiple of pad_multiple "
                f"({self.pad_multiple})"
            )
        return self
