"""SASRec (Kang and McAuley 2018, arXiv 1808.09781), written here after the paper: for orientation.

Learned item and place embeddings, blocks of causal self-attention and a pointwise feed-forward
layer, each x + dropout(g(norm(x))); an item's score is the product of its embedding with the last
place's output. `loss: bce` is the paper's: at every place binary cross-entropy of what came next
and of one item that the user has not met; `softmax`, cross-entropy over all items, serves it better
(Klenitskiy and Vasilev 2023, arXiv 2309.07602). Places are counted from the newest item, as the
paper's padding on the left does. Draws, those of dropout too, come from one generator.

Written, since no kept library fits: RecBole 1.2.0 calls what numpy 2 dropped and 1.2.1 asks for Ray
2.6, Cornac 3.0.1 learns one place of a history at a time (two minutes an epoch on MovieLens 100K).
It must not know how it is tuned or evaluated.

Letters: B users of a batch, L places, d width, I items, M places with a target.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fellray.platform.union import Scorer, Union

STAGES = 15
"""How often it is looked at while it trains."""


class SelfAttention(nn.Module):
    """The network: histories -> for each place, what is likely next."""

    def __init__(
        self, num_items: int, width: int, blocks: int, places: int, draw: torch.Generator
    ) -> None:
        super().__init__()
        self.num_items = num_items
        self.places = places
        self.items = nn.Embedding(num_items + 1, width)  # the last stands for no item
        self.positions = nn.Embedding(places, width)
        self.attend = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(blocks))
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.outer = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks + 1))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith("norms"):
                    continue
                if parameter.ndim == 2:
                    parameter.normal_(
                        0, 0.02 if name.startswith("items") else width**-0.5 / 2, generator=draw
                    )
                else:
                    parameter.zero_()

    def forward(
        self, items_BL: Tensor, sizes_B: Tensor, dropout: float, draw: torch.Generator | None
    ) -> Tensor:
        """What each place leads to: [B, L, d].

        Args:
            items_BL: oldest first, `num_items` behind the last.
            sizes_B: how many are items.
            draw: of dropout; None leaves it out.
        """
        length = items_BL.shape[1]
        place_BL = (sizes_B[:, None] - 1 - torch.arange(length)).clamp(min=0)
        x_BLd = self.items(items_BL) * self.items.embedding_dim**0.5 + self.positions(place_BL)
        x_BLd = _drop(x_BLd, dropout, draw)
        for at, (attend, inner, outer) in enumerate(
            zip(self.attend, self.inner, self.outer, strict=True)
        ):
            q_BLd, k_BLd, v_BLd = attend(self.norms[2 * at](x_BLd)).chunk(3, dim=-1)
            # a place sees itself and what came before, so never what stands behind the last item
            seen_BLd = functional.scaled_dot_product_attention(q_BLd, k_BLd, v_BLd, is_causal=True)
            x_BLd = x_BLd + _drop(seen_BLd, dropout, draw)
            hidden_BLd = _drop(inner(self.norms[2 * at + 1](x_BLd)).relu(), dropout, draw)
            x_BLd = x_BLd + _drop(outer(hidden_BLd), dropout, draw)
        out_BLd: Tensor = self.norms[-1](x_BLd)
        return out_BLd

    def pad(self, histories: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """The newest `places` items of each as [B, L], and how many they are [B]."""
        newest = [history[-self.places :] for history in histories]
        sizes = [len(history) for history in newest]
        items_BL = np.full((len(newest), max(1, *sizes)), self.num_items, np.int64)
        for row, history in enumerate(newest):
            items_BL[row, : len(history)] = history
        return torch.from_numpy(items_BL), torch.tensor(sizes)

    def score(self, places_B: np.ndarray, histories: Sequence[np.ndarray]) -> Tensor:
        """A `Scorer`: what a history leads to, over all items, [B, I]."""
        del places_B
        items_BL, sizes_B = self.pad(histories)
        with torch.no_grad():
            out_BLd = self(items_BL, sizes_B, 0.0, None)
            last_Bd = out_BLd[torch.arange(len(sizes_B)), (sizes_B - 1).clamp(min=0)]
            scores_BI: Tensor = last_Bd @ self.items.weight[:-1].T
        return scores_BI


def fit_sasrec(union: Union, settings: Mapping[str, Any], seed: int) -> Iterator[Scorer]:
    """Train on each user's newest places, with Adam.

    Args:
        settings: `width`, `blocks`, `places`, `dropout`, `loss` (`bce` or `softmax`),
            `learning_rate`, `batch_size` (users), `epochs`.

    Yields:
        A scorer after each fifteenth of the epochs.
    """
    draw = torch.Generator().manual_seed(seed)
    places = settings["places"]
    model = SelfAttention(union.num_items, settings["width"], settings["blocks"], places, draw)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings["learning_rate"], betas=(0.9, 0.98)
    )
    met = np.split(union.items, union.offsets[1:-1])
    met_U = [history for history in met if len(history) > 1]
    for _ in range(STAGES):
        for _ in range(-(-settings["epochs"] // STAGES)):
            order = torch.randperm(len(met_U), generator=draw)
            for rows in order.split(settings["batch_size"]):
                loss = _lose(model, [met_U[row] for row in rows], settings, draw)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        yield copy.deepcopy(model).score


def _lose(
    model: SelfAttention,
    met: Sequence[np.ndarray],
    settings: Mapping[str, Any],
    draw: torch.Generator,
) -> Tensor:
    """Mean over all places of some users' histories."""
    items_BL, sizes_B = model.pad([history[:-1] for history in met])
    target_BL, _ = model.pad([history[1:] for history in met])
    out_BLd = model(items_BL, sizes_B, settings["dropout"], draw)
    known_BL = target_BL < model.num_items
    out_Md, target_M = out_BLd[known_BL], target_BL[known_BL]
    if settings["loss"] == "softmax":
        return functional.cross_entropy(out_Md @ model.items.weight[:-1].T, target_M)
    user_M = torch.arange(len(met))[:, None].expand_as(target_BL)[known_BL]
    other_M = draw_unmet(met, user_M, model.num_items, draw)
    right_M = (out_Md * model.items(target_M)).sum(-1)
    wrong_M = (out_Md * model.items(other_M)).sum(-1)
    return functional.softplus(-right_M).mean() + functional.softplus(wrong_M).mean()


def draw_unmet(
    met: Sequence[np.ndarray], user_M: Tensor, num_items: int, draw: torch.Generator
) -> Tensor:
    """An item for each entry, uniform among those that its user has not met: int64 [M].

    Who has met all gets any.
    """
    free_BI = torch.ones(len(met), num_items)
    for row, items in enumerate(met):
        free_BI[row, torch.from_numpy(items.astype(np.int64))] = 0
    free_BI[free_BI.sum(1) == 0] = 1
    counts = torch.bincount(user_M, minlength=len(met)).tolist()
    drawn = [
        torch.multinomial(free, count, replacement=True, generator=draw)
        for free, count in zip(free_BI, counts, strict=True)
        if count
    ]
    return torch.cat(drawn)  # entries stand user after user


def _drop(x: Tensor, share: float, draw: torch.Generator | None) -> Tensor:
    if draw is None or not share:
        return x
    return x * (torch.rand(x.shape, generator=draw) >= share) / (1 - share)
