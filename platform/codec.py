"""How numbers become bytes: float32, or 8 or 4 bits each with scales of their own.

A token's code is its numbers' and then its scales', so that a packed tensor [L, d] is one array
[L, bytes] whatever the form, and a token's bytes depend on that token alone. It must not know what
the numbers are, nor who sends them.

Shapes: L tokens, d width, G groups of a token that share a scale, g numbers in a group.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import from_dlpack

Form = Literal["float32", "int8", "int4"]

GROUP = 64
"""Numbers that share a scale in 4 bits. One outlier would leave a whole token two or three levels;
int8 has a scale for each token."""
_LARGEST = {"int8": 127, "int4": 7}
_NOT_A_NUMBER = 0x7FC0
_NOISE = 2**16


class Codec:
    """One form for tokens of one width.

    A number is `code * scale`, symmetric: codes -127..127 or -7..7, the scale bfloat16 and rounded
    up, so that the largest number has a code. Rounded to the nearest it is off by half a scale at
    most, with noise by less than one. A group with a NaN or an infinity comes out as NaN.
    """

    def __init__(self, form: Form, dim: int):
        self._form = form
        self._dim = dim
        self._group = min(GROUP, dim) if form == "int4" else dim
        self._scales = -(-dim // self._group)
        numbers = {"float32": dim, "int8": dim, "int4": -(-dim // 2)}[form]
        self._numbers = numbers
        self.exact = form == "float32"
        """Nothing is lost."""
        self.width = numbers if self.exact else numbers + 2 * self._scales
        """Columns of a coded array: numbers in float32, else bytes."""

    def fits(self, coded: np.ndarray) -> bool:
        """Whether this could be an array of coded tokens."""
        kind = np.float32 if self.exact else np.uint8
        return coded.ndim == 2 and coded.dtype == kind and coded.shape[1] == self.width

    def encode(self, x_Ld: Tensor, noise_Ld: np.ndarray | None = None) -> np.ndarray:
        """The array that is sent: float32 [L, d], or bytes [L, width].

        Args:
            noise_Ld: uint16, evenly drawn: rounds up or down at random, right on average. None: to
                the nearest.
        """
        if self.exact:
            plain: np.ndarray = x_Ld.cpu().float().numpy()
            return plain
        largest = _LARGEST[self._form]
        x_LGg = self._by_group(x_Ld.detach().float())
        peak_LG = x_LGg.abs().amax(2)
        bits_LG = ((peak_LG / largest).view(torch.int32) + 0xFFFF) >> 16
        bits_LG = torch.where(peak_LG.isfinite(), bits_LG, _NOT_A_NUMBER)
        scale_LG1 = _as_float(bits_LG)[..., None]
        steps_LGg = torch.where(scale_LG1 > 0, x_LGg / scale_LG1, 0.0)
        if noise_Ld is None:
            steps_LGg = steps_LGg.round()
        else:
            # 16 bits, because sums with finer noise are rounded themselves
            noise = torch.from_numpy(noise_Ld.astype(np.float32)).to(x_Ld.device) / _NOISE
            steps_LGg = (steps_LGg + self._by_group(noise)).floor()
        codes_Ld = steps_LGg.clamp(-largest, largest).flatten(1)[:, : self._dim].to(torch.int8)
        numbers = codes_Ld.view(torch.uint8) if self._form == "int8" else _pack(codes_Ld)
        scales = torch.stack([bits_LG & 255, bits_LG >> 8], 2).flatten(1).to(torch.uint8)
        coded: np.ndarray = torch.cat([numbers, scales], 1).cpu().numpy()
        return coded

    def decode(self, coded: np.ndarray) -> Tensor:
        """The numbers [L, d], float32, on the CPU."""
        taken = from_dlpack(coded)
        if self.exact:
            plain: Tensor = taken
            return plain
        numbers, scales = taken.split([self._numbers, 2 * self._scales], 1)
        if self._form == "int8":
            codes_Ld = numbers.contiguous().view(torch.int8)
        else:
            codes_Ld = _unpack(numbers)[:, : self._dim]
        halves = scales.int()
        bits_LG = halves[:, 0::2] | halves[:, 1::2] << 8
        x_LGg = self._by_group(codes_Ld.float()) * _as_float(bits_LG)[..., None]
        x_Ld: Tensor = x_LGg.flatten(1)[:, : self._dim].contiguous()
        return x_Ld

    def _by_group(self, x_Ld: Tensor) -> Tensor:
        """Each token in its groups [L, G, g], zeros behind the last number."""
        filled = F.pad(x_Ld, (0, self._scales * self._group - self._dim))
        grouped: Tensor = filled.unflatten(1, (self._scales, self._group))
        return grouped


def _as_float(bits: Tensor) -> Tensor:
    """bfloat16 by its bits, as float32."""
    return (bits << 16).view(torch.float32)


def _pack(codes_Ld: Tensor) -> Tensor:
    """Two codes of -7..7 in a byte, the first in the lower half."""
    shifted = (F.pad(codes_Ld, (0, codes_Ld.shape[1] % 2)) + 8).view(torch.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def _unpack(packed: Tensor) -> Tensor:
    """The inverse of `_pack`; a filled-up last code stays."""
    halves = torch.stack([packed & 15, packed >> 4], 2).flatten(1)
    return halves.to(torch.int8) - 8
