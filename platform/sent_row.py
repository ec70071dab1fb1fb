"""A learner's row as it is sent: its columns, whose they are, and what of it each side is given.

First comes what a client holds, then what the server holds of it; a block that some clients hold
themselves stands once (`Middle`). It must not know how rows are mixed, nor where pages lie.

Shapes: C learners, P sent parameters of one learner.
"""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from fellray.platform.adapters import cut_, find_columns, name_blocks, start, views
from fellray.platform.aggregation import Plan
from fellray.platform.config import RunConfig
from fellray.platform.middle import Middle
from fellray.platform.own import Own
from fellray.platform.split import Cut


class SentRow:
    """The row of every learner of a run: all have one layout."""

    def __init__(self, config: RunConfig, cut: Cut, own: Own):
        """Args: cut: of the run. own: who differs."""
        self._lora, self._method, self._own = config.model.lora, config.method, own
        self._share = config.train.share
        rank = self._lora.r
        ends = cut.outer if self._share == "all" else []
        trunk = cut.sites["trunk"] if self._share != "none" else []
        self._middle = Middle(ends, rank)
        self.sites = ends + (trunk if self._middle.empty else self._middle.without(trunk))
        """What it is the adapters of."""
        self.client_width, self.width = (
            sum(site.num_parameters(rank) for site in own) for own in (ends, self.sites)
        )
        self.blocks = name_blocks(self.sites, rank)
        self.up_columns = find_columns(name_blocks(ends, rank), self._method.sends)
        """The columns of a client's row that reach the driver; None: all."""
        self._frozen_P = self._freeze(config.seed) if self._method.local().freezes_a else None
        """Where A stands its frozen numbers, elsewhere NaN."""

    def cuts_of(self, clients: Sequence[str]) -> list[int] | None:
        """Their cuts; None: all have one."""
        return None if self._middle.empty else self._own.cuts_of(clients)

    def lay(self, reported: Sequence[np.ndarray]) -> Tensor:
        """Rows [C, P] in which what the clients reported stands; the server's part is not filled.

        Args:
            reported: by actor, what its clients sent.
        """
        width, rows = self.client_width, sum(len(theta) for theta in reported)
        whole = np.empty((rows, self.width), np.float32)
        if self.up_columns is None:
            np.concatenate(reported, out=whole[:, :width])
        else:
            whole[:, :width] = 0.0 if self._frozen_P is None else self._frozen_P[:width]
            whole[:, self.up_columns.numpy()] = np.concatenate(reported)
        return torch.from_numpy(whole)

    def join_(self, sent_CP: Tensor, held: Sequence[np.ndarray], clients: Sequence[str]) -> None:
        """Put what the server holds into rows in which the clients' part stands, in place."""
        cuts = self.cuts_of(clients)
        if cuts is None:
            np.concatenate(held, out=sent_CP.numpy()[:, self.client_width :])
        else:
            self._middle.join_(sent_CP, torch.from_numpy(np.concatenate(held)), cuts)

    def join_loaded(self, parts: Sequence[Tensor], clients: Sequence[str]) -> Tensor:
        """Rows of a page's parts: of the client's, where it sends any, and of the server's."""
        cuts = self.cuts_of(clients)
        if cuts is None:
            return torch.cat(list(parts), dim=1)
        loaded = torch.empty(len(clients), self.width)
        loaded[:, : self.client_width] = parts[0]
        self._middle.join_(loaded, parts[1], cuts)
        return loaded

    def name_parts(self, kind: str) -> list[str]:
        """Names of a page's parts, as `join_loaded` takes them."""
        names = [f"client.{kind}", f"trunk.{kind}"]
        return {"all": names, "trunk_only": names[1:]}.get(self._share, [])

    def part(
        self, sent_CP: Tensor, rows: Sequence[int], at_server: bool, cuts: Sequence[int] | None
    ) -> Tensor:
        """One side's columns of some rows, a copy; of its cut only, where a row is one client's."""
        width = self.client_width
        if not at_server:
            part = sent_CP[rows, :width]
        elif self._middle.empty:
            return sent_CP[rows, width:]
        else:
            part = torch.cat([sent_CP[rows, self._middle.columns], sent_CP[rows, width:]], 1)
        if cuts is not None:
            self._middle.clear_(part, at_server, cuts)
        return part

    def cut_(self, clients: Sequence[str], sent_CP: Tensor) -> None:
        """Leave each of the clients' rows what its own rank has, in place."""
        if self._own.ranks:
            largest = self._lora.r
            ranks_C = torch.tensor(self._own.ranks_of(clients, largest), dtype=torch.int64)
            cut_(views(sent_CP, self.sites, largest), torch.arange(len(clients)), ranks_C)

    def clear_kept_(self, sent_CP: Tensor) -> None:
        """Make zeros of what stays with clients, in place, as it stands in what they report."""
        if self.up_columns is not None and self._frozen_P is None:
            stays_P = torch.ones(self.client_width, dtype=torch.bool)
            stays_P[self.up_columns] = False
            sent_CP[:, : self.client_width][:, stays_P] = 0.0

    def keep_frozen(self, mixed_CP: Tensor, common: bool) -> Tensor:
        """The mixture, of which the first row only is needed where it is everyone's, with a frozen
        A as it was."""
        if self._frozen_P is None:
            return mixed_CP
        # a mean of equal numbers may be another one
        mixed_CP = mixed_CP[:1] if common else mixed_CP
        return torch.where(self._frozen_P.isnan(), mixed_CP, self._frozen_P)

    def check_private(self, plan: Plan, blocks: Collection[str]) -> None:
        """See that what clients keep is mixed with nobody's.

        Raises:
            ValueError: the plan mixes it.
        """
        if self.up_columns is None or self._frozen_P is not None:
            return
        matrices = {id(part.mixing_CC): part.mixing_CC for part in plan.blocks.values()}
        matrices[id(plan.mixing_CC)] = plan.mixing_CC
        eye = torch.eye(len(plan.mixing_CC), dtype=torch.float64)
        alone = {key for key, mixing_CC in matrices.items() if torch.equal(mixing_CC, eye)}
        for name in blocks:
            mixing_CC = plan.blocks[name].mixing_CC if name in plan.blocks else plan.mixing_CC
            if id(mixing_CC) not in alone and not self._method.sends(name):
                raise ValueError(
                    f"clients do not send block {name!r}, and the plan mixes it; give it the "
                    "identity"
                )

    def _freeze(self, seed: int) -> Tensor:
        """A row of what is sent [P]: A's frozen numbers, and NaN where B stands."""
        assert self._method.begins_alike(), "a frozen A is one for all"
        frozen_P = start(self.sites, self._lora, seed)
        for name, columns in self.blocks.items():
            if name.endswith(".lora_B"):
                frozen_P[columns] = torch.nan
        return frozen_P
