"""The attribute backbone: an embedding per feature, an MLP, one number per sample: a click's logit.

One table holds the rows of all features one behind the other; after a feature's rows comes their
mean, which unseen values read. A layer's bias is the last row of its matrix, so that a batched
product is all there is to add up. This file must not know clients, nor where samples come from.

Shapes: N samples, F features, k width of an embedding, R rows of all tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fellray.platform.errors import FellrayError


@dataclass(frozen=True)
class Shape:
    """How large a backbone is."""

    user_rows: tuple[int, ...]
    """Rows of each user feature's table."""
    item_rows: tuple[int, ...]
    """Rows of each item feature's table."""
    dim: int
    layers: tuple[int, ...]

    @property
    def user_width(self) -> int:
        """Numbers of the input that come from the user."""
        return len(self.user_rows) * self.dim

    @property
    def widths(self) -> tuple[int, ...]:
        """Input, then each hidden layer."""
        return (self.user_width + len(self.item_rows) * self.dim, *self.layers)

    def count(self) -> dict[str, int]:
        """Parameters by part, and in all."""
        parts = {
            "user_tables": sum(self.user_rows) * self.dim,
            "item_tables": sum(self.item_rows) * self.dim,
            "layers": sum(
                (wide + 1) * narrow
                for wide, narrow in zip(self.widths, self.widths[1:], strict=False)
            ),
            "output": self.widths[-1] + 1,
        }
        return {**parts, "backbone": sum(parts.values())}

    def flops(self) -> int:
        """Of one sample's forward pass: two for each weight of a product."""
        pairs = [*zip(self.widths, self.widths[1:], strict=False), (self.widths[-1], 1)]
        return 2 * sum(wide * narrow for wide, narrow in pairs)


@dataclass(frozen=True)
class Backbone:
    """A backbone's numbers."""

    shape: Shape
    users: tuple[Tensor, ...]
    """[rows, k] of each user feature."""
    items: tuple[Tensor, ...]
    """[rows, k] of each item feature."""
    layers: tuple[Tensor, ...]
    """[in + 1, out] of each hidden layer; the last row is the bias."""
    output: Tensor
    """[h + 1, 1]"""

    @property
    def parameters(self) -> list[Tensor]:
        """All of them."""
        return [*self.users, *self.items, *self.layers, self.output]

    def tensors(self, user_names: Sequence[str], item_names: Sequence[str]) -> dict[str, Tensor]:
        """By the names under which an export has them; matrices are [out, in]."""
        named = {f"user.{n}.weight": t for n, t in zip(user_names, self.users, strict=True)}
        named |= {f"item.{n}.weight": t for n, t in zip(item_names, self.items, strict=True)}
        for at, layer in enumerate(self.layers):
            named[f"layers.{at}.weight"], named[f"layers.{at}.bias"] = layer[:-1].T, layer[-1]
        named["output.weight"], named["output.bias"] = self.output[:-1].T, self.output[-1]
        return {name: tensor.detach().contiguous() for name, tensor in named.items()}


def read_backbone(
    tensors: Mapping[str, Tensor],
    user_names: Sequence[str],
    item_names: Sequence[str],
    where: str,
) -> Backbone:
    """A backbone from what `Backbone.tensors` named.

    Raises:
        FellrayError: a feature's table or a layer is missing or does not fit the others.
    """
    try:
        users = tuple(tensors[f"user.{n}.weight"] for n in user_names)
        items = tuple(tensors[f"item.{n}.weight"] for n in item_names)
        layers, at = [], 0
        while f"layers.{at}.weight" in tensors:
            weight, bias = tensors[f"layers.{at}.weight"], tensors[f"layers.{at}.bias"]
            layers.append(torch.cat([weight.T, bias[None]]).contiguous())
            at += 1
        output = torch.cat([tensors["output.weight"].T, tensors["output.bias"][None]]).contiguous()
    except KeyError as error:
        raise FellrayError(
            f"{where}: holds no {error.args[0]}; run `fellray prepare` again"
        ) from None
    shape = Shape(
        tuple(len(t) for t in users),
        tuple(len(t) for t in items),
        users[0].shape[1],
        tuple(layer.shape[1] for layer in layers),
    )
    found = [*(len(layer) - 1 for layer in layers), len(output) - 1]
    if found != list(shape.widths):
        raise FellrayError(
            f"{where}: layers of {found} inputs do not fit features and layers of "
            f"{list(shape.widths)}; run `fellray prepare` again"
        )
    return Backbone(shape, users, items, tuple(layers), output)


def start_backbone(shape: Shape, draw: torch.Generator) -> Backbone:
    """A fresh one: tables N(0, 0.1), matrices and biases uniform within 1 / sqrt(inputs).

    The released code's tables are N(0, 1): with them rare values start, and stay, as loud noise.
    """

    def matrix(wide: int, narrow: int) -> Tensor:
        bound = wide**-0.5
        drawn: Tensor = (torch.rand(wide + 1, narrow, generator=draw) * 2 - 1) * bound
        return drawn

    def tables(rows: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(torch.randn(n, shape.dim, generator=draw) * 0.1 for n in rows)

    pairs = zip(shape.widths, shape.widths[1:], strict=False)
    users, items = tables(shape.user_rows), tables(shape.item_rows)
    layers = tuple(matrix(wide, narrow) for wide, narrow in pairs)
    return Backbone(shape, users, items, layers, matrix(shape.widths[-1], 1))


def look_up(tables: Sequence[Tensor], codes_NF: Tensor) -> Tensor:
    """The embeddings of some samples, side by side [N, F * k]; a code of -1 reads the mean row."""
    rows = [torch.cat([table, table.mean(0, keepdim=True)]) for table in tables]
    sizes = torch.tensor([len(table) for table in rows])
    codes_NF = torch.where(codes_NF < 0, sizes - 1, codes_NF.long())
    starts = sizes.cumsum(0) - sizes
    return torch.cat(rows)[codes_NF + starts].flatten(1)


def predict(backbone: Backbone, users_NF: Tensor, items_NF: Tensor) -> Tensor:
    """Logits [N] of the backbone as it is.

    Args:
        users_NF: user codes.
        items_NF: item codes.
    """
    x = torch.cat([look_up(backbone.users, users_NF), look_up(backbone.items, items_NF)], 1)
    for layer in backbone.layers:
        x = torch.relu(torch.addmm(layer[-1], x, layer[:-1]))
    return torch.addmm(backbone.output[-1], x, backbone.output[:-1])[:, 0]


def describe_backbone(shape: Shape) -> dict[str, Any]:
    """What an export's JSON says of its size."""
    return {
        "dim": shape.dim,
        "layers": list(shape.layers),
        "parameters": shape.count()["backbone"],
        "flops_per_sample": shape.flops(),
    }
