"""Numbers as bytes: how much is lost, packed codes by hand, nothing of a neighbour's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fellray.platform.codec import GROUP, Codec, Form

LARGEST = {"int8": 127, "int4": 7}
NUMBERS = st.floats(-1e6, 1e6, width=32)


def peaks(x_Ld: np.ndarray, group: int) -> np.ndarray:
    """The largest number of each one's group [L, d]."""
    starts = np.arange(0, x_Ld.shape[1], group)
    found = np.maximum.reduceat(np.abs(x_Ld), starts, axis=1)
    return found.repeat(group, axis=1)[:, : x_Ld.shape[1]]


@pytest.mark.parametrize("form", ["int8", "int4"])
@settings(max_examples=40)
@given(st.data())
def test_round_trip_is_off_by_half_a_scale_at_most(form: Form, data: st.DataObject) -> None:
    dim = data.draw(st.sampled_from([1, 2, 7, 63, 65, 130]))
    x_Ld = data.draw(arrays(np.float32, (3, dim), elements=NUMBERS))
    codec = Codec(form, dim)
    scale_Ld = peaks(x_Ld, dim if form == "int8" else GROUP) / LARGEST[form] * (1 + 2**-7)
    near = codec.decode(codec.encode(torch.from_numpy(x_Ld))).numpy()
    assert (np.abs(near - x_Ld) <= 0.5001 * scale_Ld + 1e-37).all()
    noise = np.random.default_rng(0).integers(0, 2**16, x_Ld.shape, np.uint16)
    noisy = codec.decode(codec.encode(torch.from_numpy(x_Ld), noise)).numpy()
    assert (np.abs(noisy - x_Ld) <= 1.0001 * scale_Ld + 1e-37).all()


def test_packed_codes_by_hand() -> None:
    codec = Codec("int4", 4)
    coded = codec.encode(torch.tensor([[7.0, -7.0, 0.0, 1.0]]))
    # codes + 8: 15 and 1, 8 and 9, the first in the lower half; then 1.0 as bfloat16
    assert coded.tolist() == [[15 | 1 << 4, 8 | 9 << 4, 0x80, 0x3F]]
    assert codec.decode(coded).tolist() == [[7.0, -7.0, 0.0, 1.0]]


@pytest.mark.parametrize(("form", "largest"), LARGEST.items())
def test_whole_codes_come_back_exactly(form: Form, largest: int) -> None:
    whole = torch.arange(-largest, largest + 1).float()
    for scale in (1.0, 0.25, 2.0**-20):
        x = torch.stack([whole, whole.flip(0)]) * scale
        if form == "int4":  # every group has the largest number, so its scale
            assert x.shape[1] <= GROUP
        codec = Codec(form, x.shape[1])
        assert torch.equal(codec.decode(codec.encode(x)), x)
        most = np.full(x.shape, 2**16 - 1, np.uint16)
        assert torch.equal(codec.decode(codec.encode(x, most)), x), "noise moves no whole code"


def test_bytes_of_a_token() -> None:
    assert [Codec(form, 384).width for form in ("float32", "int8", "int4")] == [384, 386, 204]
    assert Codec("int4", 33).width == 17 + 2
    assert Codec("int4", 65).width == 33 + 4


def test_float32_is_what_it_was() -> None:
    x = torch.randn(3, 5)
    codec = Codec("float32", 5)
    assert codec.encode(x).tobytes() == x.numpy().tobytes()
    assert torch.equal(codec.decode(codec.encode(x)), x)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so_and_stays_alone(form: Form, bad: float) -> None:
    x = torch.randn(3, 2 * GROUP)
    codec = Codec(form, x.shape[1])
    clean = codec.decode(codec.encode(x))
    x[1, 5] = bad
    found = codec.decode(codec.encode(x))
    assert found[1, :GROUP].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    if form == "int4":
        assert torch.equal(found[1, GROUP:], clean[1, GROUP:])


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_zeros_and_the_smallest_numbers(form: Form) -> None:
    codec = Codec(form, 4)
    x = torch.tensor([[0.0, 0.0, -0.0, 0.0], [1e-45, 0.0, 0.0, 0.0], [3e38, -3e38, 1.0, 0.0]])
    found = codec.decode(codec.encode(x))
    assert found.isfinite().all()
    assert (found[0] == 0).all()
    assert found[2, 0] == -found[2, 1] > 2.9e38


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_a_tokens_bytes_are_its_own(form: Form) -> None:
    codec, x = Codec(form, 100), torch.randn(9, 100)
    together = codec.encode(x)
    for at in range(9):
        assert codec.encode(x[at : at + 1]).tobytes() == together[at].tobytes()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_noise_is_right_on_average(form: Form) -> None:
    codec = Codec(form, 2)
    x = torch.tensor([[1.0, 0.1]]).repeat(4000, 1)
    noise = np.random.default_rng(1).integers(0, 2**16, x.shape, np.uint16)
    mean = codec.decode(codec.encode(x, noise))[:, 1].mean().item()
    near = codec.decode(codec.encode(x[:1]))[0, 1].item()
    step = 1.0 / LARGEST[form]
    assert abs(mean - 0.1) < 4 * step / 2 / 4000**0.5
    assert abs(near - 0.1) > abs(mean - 0.1)


@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
def test_what_fits(form: Form) -> None:
    codec = Codec(form, 8)
    coded = codec.encode(torch.randn(2, 8))
    assert codec.fits(coded)
    assert not codec.fits(coded[:, 1:])
    assert not codec.fits(coded[0])
    assert not codec.fits(coded.astype(np.float64))
