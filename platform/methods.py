"""The methods a run can name, and the door for a user's own.

One method is one pure file; the three that need no file of their own stand here. To add one: a
subclass of `Method` with a `kind`, and its name in `AnyMethod`. To use one without touching this
repository: `method: {kind: file, path: mine.py, name: Mine, options: {...}}`.
"""

import importlib.util
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PrivateAttr, ValidationError

from fellray.platform.aggregation import Meta, Method, Plan, Source
from fellray.platform.averaging import Averaging
from fellray.platform.ditto import Ditto
from fellray.platform.errors import FellrayError
from fellray.platform.fedamp import FedAmp
from fellray.platform.fedex_lora import FedExLora, FedExLoraBounded
from fellray.platform.fedopt import FedOpt
from fellray.platform.fedpa import Fedpa
from fellray.platform.fedpa_lora import FedpaLora
from fellray.platform.fedprox import FedProx
from fellray.platform.fedsa_lora import FedSaLora
from fellray.platform.fellrec import Fellrec
from fellray.platform.ffa_lora import FfaLora
from fellray.platform.local import LocalRule
from fellray.platform.model_config import AdapterLevels
from fellray.platform.qffl import QFfl
from fellray.platform.scaffold import Scaffold
from fellray.platform.shrinkage import Shrinkage


class FedAvg(Averaging):
    """McMahan et al. 2017: everybody receives the same mean."""

    kind: Literal["fedavg"] = "fedavg"


class Local(Method):
    """No federation: every client trains alone (the trunk's frozen blocks are still shared)."""

    kind: Literal["local"] = "local"

    def compares(self) -> Collection[Source]:
        """Nobody with anybody."""
        return ()

    def reads_losses(self) -> bool:
        """No."""
        return False

    def plan(self, meta: Meta) -> Plan:
        """The identity."""
        return Plan(torch.eye(len(meta.clients), dtype=torch.float64))


class Central(Method):
    """No privacy: one set of adapters trained on the union of all clients' data.

    The orientation row of the papers. It reads as many histories a round as all clients together.
    """

    kind: Literal["central"] = "central"

    def seat(self, clients: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """One learner reads every shard."""
        return {"central": tuple(clients)}

    def compares(self) -> Collection[Source]:
        """Nobody with anybody."""
        return ()

    def reads_losses(self) -> bool:
        """No."""
        return False

    def plan(self, meta: Meta) -> Plan:
        """The identity."""
        return Plan(torch.eye(len(meta.clients), dtype=torch.float64))


class FromFile(Method):
    """A method of the user's own, in the user's own file."""

    kind: Literal["file"] = "file"
    path: Path
    """A Python file. It is run: name only files you trust."""
    name: str
    """The class in it, a subclass of `fellray.platform.aggregation.Method`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its fields."""
    _method: Method = PrivateAttr()

    def seat(self, clients: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """As the user's class says."""
        return self._method.seat(clients)

    def compares(self) -> Collection[Source]:
        """As the user's class says."""
        return self._method.compares()

    def local(self) -> LocalRule:
        """As the user's class says."""
        return self._method.local()

    def compares_layers(self) -> bool:
        """As the user's class says."""
        return self._method.compares_layers()

    def begins_alike(self) -> bool:
        """As the user's class says."""
        return self._method.begins_alike()

    def mixes_products(self) -> bool:
        """As the user's class says."""
        return self._method.mixes_products()

    def levels(self) -> AdapterLevels | None:
        """As the user's class says."""
        return self._method.levels()

    def moves_base(self) -> bool:
        """As the user's class says."""
        return self._method.moves_base()

    def sends(self, block: str) -> bool:
        """As the user's class says."""
        return self._method.sends(block)

    def reads_losses(self) -> bool:
        """As the user's class says."""
        return self._method.reads_losses()

    def plan(self, meta: Meta) -> Plan:
        """As the user's class says."""
        return self._method.plan(meta)

    def model_post_init(self, context: object, /) -> None:
        """Fail where the config is read, not in round 1."""
        self._method = self._load()

    def _load(self) -> Method:
        where = f"method.path {self.path}"
        spec = importlib.util.spec_from_file_location("fellray_method_of_user", self.path)
        if spec is None or spec.loader is None or not self.path.is_file():
            raise FellrayError(f"{where}: there is no such Python file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the user's file raises is the user's to read
            raise FellrayError(
                f"{where}: cannot be run: {type(error).__name__}: {error}"
            ) from error
        cls = getattr(module, self.name, None)
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise FellrayError(
                f"{where}: method.name {self.name!r} must be a subclass of "
                "fellray.platform.aggregation.Method in that file"
            )
        try:
            return cls(**self.options)
        except ValidationError as error:
            raise FellrayError(f"{where}: method.options do not fit {self.name}: {error}") from None


AnyMethod = Annotated[
    Fellrec
    | FedAvg
    | FedProx
    | Scaffold
    | Ditto
    | FedAmp
    | FfaLora
    | FedOpt
    | QFfl
    | FedSaLora
    | FedExLora
    | FedExLoraBounded
    | Shrinkage
    | Fedpa
    | FedpaLora
    | Local
    | Central
    | FromFile,
    Field(discriminator="kind"),
]
