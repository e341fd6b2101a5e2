"""The arithmetic of convs with several dilations, as any kind of CPU would do it."""

import pytest
import torch
import torch.nn.functional as F

from detectron2_nats import convolution
from detectron2_nats.convolution import conv2d, dilated_conv2d, weight_gradient

DILATIONS = [(2, 2), (1, 3), (3, 1), (5, 5), (1, 5), (2, 3), (7, 9)]


@pytest.fixture(autouse=True)
def matrix_products(monkeypatch):
    monkeypatch.setattr(convolution, "_MATRIX_PRODUCTS", True)


@pytest.fixture()
def calls(monkeypatch):
    """The dilations for which weight_gradient is called."""
    dilations = []

    def counted(x, gradient, dilation):
        dilations.append(tuple(dilation))
        return weight_gradient(x, gradient, dilation)

    monkeypatch.setattr(convolution, "weight_gradient", counted)
    return dilations


def made(batch=2, height=6, width=9, dtype=torch.float64, groups=1):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, 6, height, width), (4, 6 // groups, 3, 3), (4,)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(True) for s in shapes]


def is_own(y):
    return type(y.grad_fn).__name__ == "_DilatedConv2dBackward"


# -- the gradient by matrix products ------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(6, 9), (1, 1), (11, 3)], ids=str)
@pytest.mark.parametrize("dilation", DILATIONS, ids=str)
def test_gradients_are_autograds(dilation, size, layout, calls):
    """Also where the dilation reaches beyond the image."""
    x, weight, _ = made(3, *size)
    read = x.contiguous(memory_format=layout)
    y = conv2d(read, weight, (1, 1), dilation, 1)
    expected = F.conv2d(read, weight, padding=dilation, dilation=dilation)
    assert is_own(y) and torch.equal(y, expected)
    projection = torch.randn_like(y).contiguous(memory_format=layout)
    found = torch.autograd.grad((y * projection).sum(), [x, weight])
    assert calls == [dilation]
    right = torch.autograd.grad((expected * projection).sum(), [x, weight])
    for a, b in zip(found, right):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


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
    for found in (own, usual(torch.float32)):
        assert (found - exact).abs().max() < 5e-6 * exact.abs().max()


@pytest.mark.parametrize(
    "stride, dilation, groups",
    [((2, 2), (2, 2), 1), ((1, 1), (1, 1), 1), ((1, 1), (3, 1), 2)],
)
def test_the_rest_is_left_to_aten(stride, dilation, groups):
    x, weight, _ = made(groups=groups)
    y = conv2d(x, weight, stride, dilation, groups)
    assert not is_own(y)
    assert torch.equal(y, F.conv2d(x, weight, None, stride, dilation, dilation, groups))


def test_other_processors_and_precisions_are_left_to_aten(monkeypatch, calls):
    x, weight, _ = made(dtype=torch.float32)
    assert not is_own(conv2d(x.bfloat16(), weight.bfloat16(), (1, 1), (2, 2), 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv2d(x, weight, (1, 1), (2, 2), 1)
    assert y.dtype == torch.bfloat16 and not is_own(y)
    y.sum().backward()
    assert not calls and weight.grad.dtype == torch.float32
    monkeypatch.setattr(convolution, "_MATRIX_PRODUCTS", False)
    assert not is_own(conv2d(x, weight, (1, 1), (2, 2), 1))


# -- several dilations --------------------------------------------------------------------

# inputs, channels, dilations, branches: dilation (1, 1) is in two places
RUNS = ([], [1, 1, 2], [[1, 1], [2, 3]], [[0, 2], [1]])
GROUPED_RUNS = ([3, 3], [2, 2], [[1, 1], [2, 3]], [[0], [1]])


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_each_gradient_with_and_without_the_others(groups, stride, wanted, calls):
    """Numerically. The step on α trains no weight, a network's first conv no input."""
    tensors = made(batch=2, height=4, width=5, groups=groups)
    for bit, tensor in enumerate(tensors):
        tensor.requires_grad_(bool(wanted >> bit & 1))
    runs = RUNS if groups == 1 else GROUPED_RUNS
    y = dilated_conv2d(*tensors, stride, *runs)
    assert is_own(y)
    y.sum().backward()
    assert calls == [(2, 3)] * (tensors[1].requires_grad and stride == (1, 1))
    assert torch.autograd.gradcheck(lambda *given: dilated_conv2d(*given, stride, *runs), tensors)


LAYOUTS = {
    "contiguous": lambda gradient: gradient,
    "channels_last": lambda gradient: gradient.contiguous(memory_format=torch.channels_last),
    "expanded": lambda gradient: gradient[:, :, :1, :1].expand_as(gradient),
    "strided": lambda gradient: gradient.repeat(1, 1, 1, 2)[..., ::2],
}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_precisions_that_onednn_computes(groups, dtype, bound, layout, own, monkeypatch):
    """Against autograd of one usual conv per dilation; float64 does not pass through oneDNN."""
    monkeypatch.setattr(convolution, "_MATRIX_PRODUCTS", own)
    tensors = [t.detach().to(dtype).requires_grad_(True) for t in made(2, 13, 17, groups=groups)]
    x, weight, bias = tensors
    runs = RUNS if groups == 1 else GROUPED_RUNS
    y = dilated_conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, (1, 1), *runs)
    _, channels, dilations, branches = runs
    dilation_of = {run: d for d, chosen in zip(dilations, branches) for run in chosen}
    rows = [dilation_of[run] for run, count in enumerate(channels) for _ in range(count)]
    each = [
        F.conv2d(x, weight, bias, padding=d, dilation=d, groups=groups)[:, row : row + 1]
        for row, d in enumerate(rows)
    ]
    expected = torch.cat(each, 1)
    gradient = LAYOUTS[layout](torch.randn_like(expected))
    found = torch.autograd.grad(y, tensors, gradient)
    right = torch.autograd.grad(expected, tensors, gradient)
    for a, b in zip((y, *found), (expected, *right)):
        assert a.dtype == dtype and (a - b).abs().max() <= bound * b.abs().max()


def test_without_gradients_and_under_a_tracer():
    tensors = made()
    with torch.no_grad():
        assert dilated_conv2d(*tensors, (1, 1), *RUNS).grad_fn is None
    traced = torch.jit.trace(lambda *given: dilated_conv2d(*given, (1, 1), *RUNS), tensors)
    assert str(traced.graph).count("aten::_convolution") == 2  # what counts FLOPs looks for them


def test_shapes_on_the_meta_device():
    tensors = [tensor.detach().to("meta").requires_grad_(True) for tensor in made()]
    y = dilated_conv2d(*tensors, (2, 2), *RUNS)
    assert y.shape == (2, 4, 3, 5)
    y.sum().backward()
    assert [tensor.grad.shape for tensor in tensors] == [tensor.shape for tensor in tensors]


def test_second_derivatives_are_refused():
    x, weight, bias = made()
    y = dilated_conv2d(x, weight, bias, (1, 1), *RUNS)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast_casts_the_input_once():
    x, weight, bias = made(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dilated_conv2d(x, weight, bias, (1, 1), *RUNS)
        double = dilated_conv2d(*made(), (1, 1), *RUNS)
    assert y.dtype == torch.bfloat16 and double.dtype == torch.float64
    casts = [node.name() for node, _ in y.grad_fn.next_functions[:3]]
    assert casts == ["ToCopyBackward0"] * 3
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dilated_conv2d(x, weight, bias, (1, 1), *RUNS), y)
    y.float().sum().backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32


def test_compiles():
    tensors = made(dtype=torch.float32)
    compiled = torch.compile(
        lambda *given: dilated_conv2d(*given, (1, 1), *RUNS), backend="aot_eager", fullgraph=True
    )
    y, expected = compiled(*tensors), dilated_conv2d(*tensors, (1, 1), *RUNS)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), tensors),
        torch.autograd.grad(expected.square().sum(), tensors),
    ):
        torch.testing.assert_close(a, b)
