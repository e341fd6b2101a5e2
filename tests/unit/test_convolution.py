"""conv2d's own gradient of the weights, on whatever kind of CPU the tests run."""

import pytest
import torch
import torch.nn.functional as F

from detectron2_nats import convolution
from detectron2_nats.convolution import conv2d, weight_gradient

DILATIONS = [(2, 2), (1, 3), (3, 1), (5, 5), (1, 5), (2, 3), (7, 9)]


@pytest.fixture(autouse=True)
def matrix_products(monkeypatch):
    monkeypatch.setattr(convolution, "_MATRIX_PRODUCTS", True)


def made(batch=2, height=6, width=9, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 5, height, width), (4, 5, 3, 3), (4,)]
    x, weight, shift = (
        torch.randn(s, generator=generator, dtype=dtype).requires_grad_(True) for s in shapes
    )
    return x, weight, shift if bias else None


def is_own(y):
    return type(y.grad_fn).__name__ == "_Conv2dBackward"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(6, 9), (1, 1), (11, 3)], ids=str)
@pytest.mark.parametrize("dilation", DILATIONS, ids=str)
def test_gradients_are_autograds(dilation, size, bias, layout):
    """Also where the dilation reaches beyond the image."""
    x, weight, shift = made(3, *size, bias)
    wanted = [x, weight] + [shift] * bias
    read = x.contiguous(memory_format=layout)
    y = conv2d(read, weight, shift, (1, 1), dilation, 1)
    expected = F.conv2d(read, weight, shift, padding=dilation, dilation=dilation)
    assert is_own(y) and torch.equal(y, expected)
    projection = torch.randn_like(y).contiguous(memory_format=layout)
    found = torch.autograd.grad((y * projection).sum(), wanted)
    right = torch.autograd.grad((expected * projection).sum(), wanted)
    for a, b in zip(found, right):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x, weight, shift = made(batch=2, height=4, width=5)
    assert torch.autograd.gradcheck(lambda *a: conv2d(*a, (1, 1), (2, 3), 1), (x, weight, shift))


def test_float32_is_as_exact_as_usual():
    """Errors against float64, relative to the largest element; aten's is about 1e-6."""
    x, weight, _ = made(2, 40, 60, dtype=torch.float32)
    gradient = torch.randn(2, 4, 40, 60, generator=torch.Generator().manual_seed(1))

    def usual(dtype):
        y = F.conv2d(x.to(dtype), weight.to(dtype), padding=3, dilation=3)
        return torch.autograd.grad(y, weight, gradient.to(dtype), retain_graph=True)[0]

    exact = weight_gradient(x.detach().double(), gradient.double(), (3, 3))
    own = weight_gradient(x.detach(), gradient, (3, 3))
    torch.testing.assert_close(exact.float(), usual(torch.float64))
    for gradient in (own, usual(torch.float32)):
        assert (gradient - exact).abs().max() < 5e-6 * exact.abs().max()


def test_only_what_is_wanted_is_computed(monkeypatch):
    """The step on α trains no weight, and the first conv of a network has no input to train."""
    x, weight, shift = made()
    with monkeypatch.context() as patch:
        patch.setattr(convolution, "weight_gradient", None)  # would be called
        y = conv2d(x, weight.detach(), shift, (1, 1), (2, 2), 1)
        assert not is_own(y)
        y.sum().backward()
    y = conv2d(x.detach(), weight, None, (1, 1), (2, 2), 1)
    assert is_own(y)
    y.sum().backward()
    expected = F.conv2d(x.detach(), weight, padding=2, dilation=2).sum()
    torch.testing.assert_close(weight.grad, torch.autograd.grad(expected, weight)[0])


@pytest.mark.parametrize(
    "stride, dilation, groups",
    [((2, 2), (2, 2), 1), ((1, 1), (1, 1), 1), ((1, 1), (3, 1), 2)],
)
def test_the_rest_is_left_to_aten(stride, dilation, groups):
    x = torch.randn(1, 4, 9, 9)
    weight = torch.randn(4, 4 // groups, 3, 3, requires_grad=True)
    y = conv2d(x, weight, None, stride, dilation, groups)
    assert not is_own(y)
    assert torch.equal(y, F.conv2d(x, weight, None, stride, dilation, dilation, groups))


def test_neither_without_gradients_nor_in_other_precisions(monkeypatch):
    x, weight, _ = made(dtype=torch.float32)
    with torch.no_grad():
        assert conv2d(x, weight, None, (1, 1), (2, 2), 1).grad_fn is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv2d(x, weight, None, (1, 1), (2, 2), 1)
    assert not is_own(y) and y.dtype == torch.bfloat16
    half = conv2d(x.bfloat16(), weight.bfloat16(), None, (1, 1), (2, 2), 1)
    assert not is_own(half)
    monkeypatch.setattr(convolution, "_MATRIX_PRODUCTS", False)
    assert not is_own(conv2d(x, weight, None, (1, 1), (2, 2), 1))
