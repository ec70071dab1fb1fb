"""A small BERT made on the spot: no pretrained weights, a vocabulary of the given texts' words.

For runs that measure how training scales and not how well it recommends. It knows nothing of data
folders, clients or rounds.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fellray.platform.encoder import SEPARATOR

_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
"""By role, in the order of their ids."""
_SCALE = 0.3
"""Standard deviation of the weights: large enough for every block to matter."""


def make_encoder(
    folder: Path, texts: Sequence[str], blocks: int, width: int, max_tokens: int, seed: int
) -> Path:
    """Write a model folder that transformers loads; the same arguments give the same weights.

    Args:
        blocks: transformer blocks.
        width: d; heads are 16 wide, the inner layer is twice as wide as d.
        max_tokens: positions there are.
    """
    split = Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    rest = [word for word in words if word != SEPARATOR and word not in _SPECIAL.values()]
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL.values(), SEPARATOR, *rest])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=_SPECIAL["unk"]))
    tokenizer.pre_tokenizer = split
    first, last = _SPECIAL["cls"], _SPECIAL["sep"]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(s, vocabulary[s]) for s in (first, last)]
    )
    names = {f"{role}_token": token for role, token in _SPECIAL.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        num_hidden_layers=blocks,
        hidden_size=width,
        num_attention_heads=max(1, width // 16),
        intermediate_size=2 * width,
        max_position_embeddings=max_tokens,
    )
    model = BertModel(config, add_pooling_layer=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, _SCALE, generator=generator)
            if name.endswith("LayerNorm.weight"):
                parameter.add_(1.0)
    model.save_pretrained(folder)
    return folder
