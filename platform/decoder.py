"""What a decoder-only model has that an encoder has not: its projections, its head, its limits.

Families of Llama and Qwen. It must not know where a model is cut, nor what is written with it.

Shapes: n rows of one padded length T, d width, V tokens of the vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fellray.platform.encoder import Backbone
from fellray.platform.errors import FellrayError

ROWS = 16
"""Rows of the head's product are filled up to a multiple of this: fewer take kernels of their own.
"""
STEADY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions whose angles do not depend on how long a batch is."""


class Head(nn.Module):
    """The last normalisation, and the scores of the next token."""

    def __init__(self, norm: nn.Module, vocabulary: nn.Module):
        super().__init__()
        self.norm = norm
        self.vocabulary = vocabulary

    def forward(self, states_nd: Tensor) -> Tensor:
        """Logits [n, V] of normalised hidden states."""
        n = len(states_nd)
        logits: Tensor = self.vocabulary(F.pad(states_nd, (0, 0, 0, -n % ROWS)))
        return logits[:n]


def find_projections(backbone: Backbone) -> dict[str, tuple[str, int, int]]:
    """A block's linear layers by name, in their order: path in the block, width in, width out."""
    config = backbone.config
    d, wide, heads = backbone.dim, int(config["intermediate_size"]), config["num_attention_heads"]
    width = config.get("head_dim") or d // heads
    of_queries, of_keys = heads * width, config["num_key_value_heads"] * width
    attention = {
        "q_proj": (d, of_queries),
        "k_proj": (d, of_keys),
        "v_proj": (d, of_keys),
        "o_proj": (of_queries, d),
    }
    inner = {"gate_proj": (d, wide), "up_proj": (d, wide), "down_proj": (wide, d)}
    return {name: (f"self_attn.{name}", *size) for name, size in attention.items()} | {
        name: (f"mlp.{name}", *size) for name, size in inner.items()
    }


def check_decoder(backbone: Backbone) -> None:
    """Refuse what would be computed wrongly.

    Raises:
        FellrayError: some layers see a window only, or positions change with the input's length.
    """
    config = backbone.config
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise FellrayError(
            f"model.name {backbone.name}: has layers with sliding windows, which are not "
            "supported; set use_sliding_window to false in its config.json if its inputs are short"
        )
    kind = (config.get("rope_parameters") or {}).get("rope_type", "default")
    if kind not in STEADY:
        raise FellrayError(
            f"model.name {backbone.name}: its rotary positions ({kind}) change with the length of "
            f"the input; supported: {', '.join(STEADY)}"
        )
