import copy

import pytest
import torch
from oracles import direct_frozen, direct_mixture
from torch import nn

from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2_nats import GroupedDilationConv2d, MixedDilationConv2d, NATSError
from detectron2_nats.method import speed
from detectron2_nats.method.sampling import SampledDilationConv2d

CONVS = [
    dict(),
    dict(stride=2),
    dict(base=2),
    dict(groups=4),
    dict(bias=True),
    dict(groups=4, stride=2, base=2, bias=True),
]
GENOTYPES = ((1, 1), (1, 3), (3, 1), (2, 2))
TIGHT = dict(rtol=1e-12, atol=1e-12)


def plain_conv(stride=1, base=1, groups=1, bias=False, norm=None, activation=None, out=16):
    torch.manual_seed(0)
    conv = Conv2d(
        *(12, out, 3),
        stride=stride,
        padding=base,
        dilation=base,
        groups=groups,
        bias=bias,
        norm=norm,
        activation=activation,
    )
    return conv.double()


def mixed_conv(num_groups=4, genotypes=GENOTYPES, share_weights=False, sample=False, **kwargs):
    """A super-network's conv with random α and replicas that differ."""
    choice = {"genotypes": genotypes, "num_groups": num_groups}
    if sample:
        conv = SampledDilationConv2d(plain_conv(**kwargs), **choice)
    else:
        conv = MixedDilationConv2d(plain_conv(**kwargs), share_weights=share_weights, **choice)
    conv.alpha.data.normal_()
    if conv.replicas is not None:
        conv.replicas.data.normal_(std=0.1)
    return conv


def input_(size=11, batch=2, channels=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, size, size + 2, generator=generator, dtype=torch.float64)


def with_bias(y, conv):
    return y if conv.bias is None else y + conv.bias.view(1, -1, 1, 1)


def options(kwargs):
    return dict(
        base_dilation=kwargs.get("base", 1),
        stride=kwargs.get("stride", 1),
        groups=kwargs.get("groups", 1),
    )


@pytest.fixture(params=["AVX2", "AVX512"])
def processor(request, monkeypatch):
    """Decides the frozen conv's layout, on any machine."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


# -- the mixture ----------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["recomputed", "kept"])
def recomputed(request, monkeypatch):
    """Whether the step on α computes each y^g again in backward, or keeps it."""
    monkeypatch.setattr(speed, "_FEW_CHANNELS", 128 if request.param else 0)
    return request.param


@pytest.mark.parametrize("share_weights", [False, True])
@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("kwargs", CONVS, ids=str)
def test_mixture_is_the_papers(kwargs, num_groups, share_weights, recomputed):
    """Both forms, in value and in the gradient of everything, against autograd of the formula."""
    conv = mixed_conv(num_groups, share_weights=share_weights, **kwargs)
    x = input_().requires_grad_(True)
    replicas = [conv.weight, *(conv.replicas if not share_weights else [conv.weight] * 3)]
    expected = direct_mixture(x, replicas, conv.alpha, GENOTYPES, **options(kwargs))
    expected = with_bias(expected, conv)
    projection = torch.randn_like(expected)
    wanted = {"x": x, **dict(conv.named_parameters())}
    assert set(wanted) - {"bias", "replicas"} == {"x", "weight", "alpha"}
    gradients = torch.autograd.grad((expected * projection).sum(), list(wanted.values()))
    gradients = dict(zip(wanted, gradients))

    for alpha_trains in (True, False):
        conv.alpha.requires_grad_(alpha_trains)
        if not alpha_trains:
            del wanted["alpha"]
        actual = conv(x)
        torch.testing.assert_close(actual, expected, **TIGHT)
        found = torch.autograd.grad((actual * projection).sum(), list(wanted.values()))
        for name, gradient in zip(wanted, found):
            torch.testing.assert_close(gradient, gradients[name], **TIGHT, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(conv(x), expected, **TIGHT)


def drawn_segments(conv):
    """What the next pass in training will draw."""
    with torch.random.fork_rng():
        drawn = torch.multinomial(conv.alpha.softmax(dim=1), 1)[:, 0].tolist()
    return drawn, [(conv.out_channels // conv.num_groups, *conv.genotypes[g]) for g in drawn]


@pytest.mark.parametrize("num_groups", [2, 4])
@pytest.mark.parametrize("kwargs", CONVS, ids=str)
def test_a_sampled_step_trains_the_frozen_network_of_a_draw(kwargs, num_groups):
    norm = dict(norm=nn.BatchNorm2d(16), activation=torch.relu)
    conv = mixed_conv(num_groups, sample=True, **norm, **kwargs)
    conv.alpha.requires_grad_(False)
    assert conv.replicas is None
    seen = set()
    for _ in range(5):
        drawn, segments = drawn_segments(conv)
        seen.add(tuple(drawn))
        frozen = GroupedDilationConv2d(copy.deepcopy(conv), segments)
        y, expected = conv(input_()), frozen(input_())
        assert torch.equal(y, expected)
        conv.zero_grad()
        for module, output in ((conv, y), (frozen, expected)):
            output.square().sum().backward()
        assert torch.equal(conv.weight.grad, frozen.weight.grad)
        assert torch.equal(conv.norm.running_mean, frozen.norm.running_mean)
    assert len(seen) > 1
    conv.eval()
    voted = [(16 // num_groups, *GENOTYPES[g]) for g in conv.alpha.argmax(dim=1).tolist()]
    frozen = GroupedDilationConv2d(copy.deepcopy(conv), voted)
    assert torch.equal(conv(input_()), frozen(input_()))


@pytest.mark.parametrize("num_groups", [2, 4])
@pytest.mark.parametrize("kwargs", CONVS, ids=str)
def test_a_sampled_alpha_step_is_straight_through(kwargs, num_groups, recomputed):
    """The value is the draw's; α's gradient is that of a mixture whose output lies at the draw."""
    conv = mixed_conv(num_groups, sample=True, **kwargs)
    drawn, segments = drawn_segments(conv)
    y = conv(input_())
    frozen = GroupedDilationConv2d(copy.deepcopy(conv), segments)
    torch.testing.assert_close(y, frozen(input_()), **TIGHT)
    y.pow(3).sum().backward()  # a loss whose gradient depends on where the output lies

    towards = 3 * y.detach() ** 2
    outputs = [
        direct_mixture(
            input_(), [conv.weight] * 4, hot.expand(num_groups, 4), GENOTYPES, **options(kwargs)
        )
        for hot in torch.eye(4, dtype=torch.float64).log()
    ]
    gain = torch.stack([(towards * y_g.detach()).sum((0, 2, 3)) for y_g in outputs], dim=1)
    gain = gain.view(num_groups, -1, 4).sum(dim=1)
    shares = conv.alpha.detach().softmax(dim=1)
    expected = shares * (gain - (shares * gain).sum(dim=1, keepdim=True))
    torch.testing.assert_close(conv.alpha.grad, expected, **TIGHT)


def test_draws_follow_softmax():
    conv = mixed_conv(4, sample=True)
    conv.alpha.requires_grad_(False)
    counts = torch.zeros(4, len(GENOTYPES))
    ones = torch.zeros(1, 12, 9, 9, dtype=torch.float64)
    ones[..., 4, 4] = 1  # a dilation's outputs are where it reaches this pixel
    lone = {tuple(d): [(16, *d)] for d in GENOTYPES}
    places = {d: GroupedDilationConv2d(copy.deepcopy(conv), s)(ones) for d, s in lone.items()}
    for _ in range(400):
        y = conv(ones)
        for group in range(4):
            rows = slice(4 * group, 4 * group + 4)
            same = [torch.equal(y[:, rows], places[tuple(d)][:, rows]) for d in GENOTYPES]
            assert sum(same) == 1
            counts[group, same.index(True)] += 1
    shares = conv.alpha.softmax(dim=1)
    # five standard deviations of a binomial
    assert ((counts / 400 - shares).abs() <= 5 * (shares * (1 - shares) / 400).sqrt()).all()


@pytest.mark.parametrize("alpha_trains", [True, False])
def test_one_norm_and_activation_follow_the_mixture(alpha_trains):
    conv = mixed_conv(norm=nn.BatchNorm2d(16), activation=torch.relu)
    conv.alpha.requires_grad_(alpha_trains)
    y = direct_mixture(input_(), [conv.weight, *conv.replicas], conv.alpha, GENOTYPES)
    mean, var = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, correction=0)
    expected = ((y - mean) / (var + conv.norm.eps).sqrt()).clamp(min=0)
    torch.testing.assert_close(conv(input_()), expected, rtol=1e-10, atol=1e-10)
    assert conv.norm.num_batches_tracked == 1


def test_what_is_kept_for_backward(recomputed):
    """The input, views of the weights, small scales. α trained, many channels: each y^g too."""
    conv = mixed_conv()
    x, kept = input_().requires_grad_(True), []

    def keep(tensor):
        known = (x, conv.weight, conv.replicas)
        if not any(tensor.data_ptr() == k.data_ptr() for k in known):
            views = tensor.untyped_storage().data_ptr() == conv.replicas.data_ptr()
            kept.extend([] if views else [tensor.shape])
        return tensor

    for alpha_trains in (False, True):
        kept.clear()
        conv.alpha.requires_grad_(alpha_trains)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = conv(x)
        large = [shape for shape in kept if shape.numel() > conv.alpha.numel() * 4]
        assert large == ([y.shape] * len(GENOTYPES) if alpha_trains and not recomputed else [])


def test_start_of_a_search():
    plain = plain_conv()
    weight = plain.weight
    conv = MixedDilationConv2d(plain, genotypes=GENOTYPES, num_groups=4)
    assert conv.weight is weight
    assert conv.alpha.shape == (4, 4) and not conv.alpha.any()
    assert conv.replicas.shape == (3, *weight.shape)
    assert all(torch.equal(replica, weight) for replica in conv.replicas)
    conv.weight.data.zero_()
    assert conv.replicas.all(), "replicas are copies, not views"


def test_one_genotype_is_the_plain_conv():
    plain = plain_conv()
    conv = MixedDilationConv2d(copy.deepcopy(plain), genotypes=[(1, 1)], num_groups=4)
    assert conv.replicas is None and conv.alpha.shape == (4, 1)
    assert torch.equal(conv(input_()), plain(input_()))


def test_frozen_weights_give_frozen_replicas():
    plain = plain_conv().requires_grad_(False)
    conv = MixedDilationConv2d(plain, genotypes=GENOTYPES, num_groups=2)
    assert [k for k, p in conv.named_parameters() if p.requires_grad] == ["alpha"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_alpha_is_at_least_float32(dtype):
    conv = MixedDilationConv2d(plain_conv().to(dtype), genotypes=GENOTYPES, num_groups=2)
    assert conv.alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert conv(input_().to(dtype)).dtype == dtype


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype, norm, processor, recomputed):
    """The dtype that the plain conv gives; values and gradients near those of float32."""
    kwargs = dict(bias=not norm, norm=FrozenBatchNorm2d(16) if norm else None)
    plain = plain_conv(**kwargs).float()
    mixed = mixed_conv(**kwargs).float()
    frozen = GroupedDilationConv2d(plain_conv(**kwargs).float(), [(8, 1, 1), (8, 3, 1)])
    x = input_().float()
    for conv in (mixed, frozen):
        for alpha_trains in (True, False):
            mixed.alpha.requires_grad_(alpha_trains)
            with torch.autocast("cpu", dtype=dtype):
                expected = plain(x).dtype
                y = conv(x)
            assert expected == dtype and y.dtype == expected
            exact = conv(x)
            assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()
            assert all(g.dtype == torch.float32 for g in gradients(conv, y))


def gradients(conv, y):
    wanted = [p for p in conv.parameters() if p.requires_grad]
    return torch.autograd.grad(y.float().sum(), wanted)


@pytest.mark.parametrize("kwargs", CONVS, ids=str)
def test_empty_batch(kwargs, processor):
    plain, x = plain_conv(**kwargs), input_(batch=0).requires_grad_(True)
    mixed = mixed_conv(**kwargs)
    frozen = GroupedDilationConv2d(plain_conv(**kwargs), [(4, 1, 1), (12, 1, 3)])
    for conv in (mixed, frozen):
        y = conv(x)
        assert y.shape == plain(x).shape and len(y) == 0
        y.sum().backward()
        assert x.grad.shape == x.shape and not conv.weight.grad.any()
    assert mixed.alpha.grad.shape == mixed.alpha.shape


# -- the frozen conv ------------------------------------------------------------------------

RUNS = [(4, 3, 1), (4, 1, 1), (4, 3, 1), (4, 2, 2)]  # a dilation in two places


def test_layout_follows_the_processor(processor):
    conv = GroupedDilationConv2d(plain_conv(), RUNS)
    channels_last = dict(memory_format=torch.channels_last)
    assert conv(input_()).is_contiguous(**channels_last) == (processor == "AVX512")
    with torch.no_grad():
        assert conv(input_()).is_contiguous(**channels_last)


@pytest.mark.parametrize("kwargs", CONVS, ids=str)
def test_frozen_conv_keeps_as_little_as_the_plain_one(kwargs, processor):
    """For backward: as many numbers as its input and its weight have."""
    kept = []
    conv = GroupedDilationConv2d(plain_conv(**kwargs), RUNS)
    x = input_().contiguous(memory_format=torch.channels_last).requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        conv(x)
    sizes = {tensor.data_ptr(): tensor.numel() for tensor in kept}
    assert sum(sizes.values()) <= x.numel() + conv.weight.numel()


def test_no_piece_gets_a_gradient_of_the_whole_tensors_size():
    """Voted order cuts weight and outputs into many: a tenth of a step on a GPU, at one image."""
    conv = GroupedDilationConv2d(plain_conv(groups=4, bias=True), [(4, *g) for g in GENOTYPES])
    waiting, names = [conv(input_().requires_grad_()).grad_fn], set()
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [following for following, _ in node.next_functions if following is not None]
    assert "SplitWithSizesBackward0" in names and "SliceBackward0" not in names


@pytest.mark.parametrize(
    "runs",
    [RUNS, [(16, 1, 1)], [(16, 2, 3)], [(8, 1, 1), (8, 1, 3)], RUNS[::-1]],
    ids=str,
)
@pytest.mark.parametrize("kwargs", CONVS, ids=str)
def test_every_output_channel_has_its_own_dilation(kwargs, runs, processor):
    conv = GroupedDilationConv2d(plain_conv(**kwargs), runs)
    x = input_().requires_grad_(True)
    dilations = [(d_h, d_w) for count, d_h, d_w in runs for _ in range(count)]
    expected = with_bias(direct_frozen(x, conv.weight, dilations, **options(kwargs)), conv)
    actual = conv(x)
    torch.testing.assert_close(actual, expected, **TIGHT)
    projection = torch.randn_like(expected)
    wanted = [x, *conv.parameters()]
    for found, right in zip(
        torch.autograd.grad((actual * projection).sum(), wanted),
        torch.autograd.grad((expected * projection).sum(), wanted),
    ):
        torch.testing.assert_close(found, right, **TIGHT)


def test_single_channels(processor):
    """Per-channel patterns of other methods fit too."""
    runs = [(1, 1 + o % 3, 1 + o // 3 % 4) for o in range(16)]
    conv = GroupedDilationConv2d(plain_conv(), runs)
    expected = direct_frozen(input_(), conv.weight, [run[1:] for run in runs])
    torch.testing.assert_close(conv(input_()), expected, **TIGHT)


@pytest.mark.parametrize("kwargs", CONVS, ids=str)
def test_all_plain_is_bit_identical(kwargs, processor):
    kwargs = dict(kwargs, norm=nn.BatchNorm2d(16), activation=torch.relu)
    plain = plain_conv(**kwargs).float()
    conv = GroupedDilationConv2d(copy.deepcopy(plain), [(4, 1, 1), (12, 1, 1)])
    results = []
    for module in (plain, conv):
        x = input_().float().requires_grad_(True)
        y = module(x)
        (y * y).sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "runs, groups, message",
    [
        ([(8, 1, 1), (4, 3, 3)], 1, "segments of 12 channels do not fit 16 channels"),
        ([(32, 1, 1)], 1, "segments of 32 channels do not fit 16 channels"),
        ([(6, 1, 1), (10, 3, 3)], 4, "segments .* cut conv groups of 4 channels"),
        ([(2, 1, 1), (12, 3, 3), (2, 1, 1)], 4, "segments .* cut conv groups of 4 channels"),
    ],
)
def test_runs_that_do_not_fit(runs, groups, message):
    with pytest.raises(NATSError, match=message):
        GroupedDilationConv2d(plain_conv(groups=groups), runs)


# -- both -----------------------------------------------------------------------------------


# -- state dicts ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_plain_state_dict_fills_the_replicas(dtype):
    plain, conv = plain_conv(bias=True).to(dtype), mixed_conv(bias=True)
    alpha = conv.alpha.detach().clone()
    plain.weight.data.normal_()
    state = plain.state_dict()
    conv.load_state_dict(state)  # strict: nothing may be missing
    assert list(state) == ["weight", "bias"], "the caller's dict is left alone"
    assert torch.equal(conv.weight, plain.weight.double())
    assert torch.equal(conv.bias, plain.bias.double())
    assert all(torch.equal(replica, conv.weight) for replica in conv.replicas)
    assert torch.equal(conv.alpha, alpha)
    conv.weight.data.zero_()
    assert conv.replicas.all() and plain.weight.all(), "copies, not views"


def test_super_network_state_dict_round_trip():
    source, target = mixed_conv(), mixed_conv()
    for parameter in source.parameters():
        parameter.data.normal_()
    target.load_state_dict(source.state_dict())
    for name, parameter in source.named_parameters():
        assert torch.equal(dict(target.named_parameters())[name], parameter), name
    assert source.replicas.unique().numel() > 3 * 16  # they differ, and stay so


def test_shared_weights_state_dict_fills_the_replicas():
    source, target = mixed_conv(share_weights=True), mixed_conv()
    assert set(source.state_dict()) == {"weight", "alpha"}
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.alpha, source.alpha)
    assert all(torch.equal(replica, source.weight) for replica in target.replicas)


def test_state_dict_of_another_shape_or_without_weight_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        mixed_conv().load_state_dict(plain_conv(out=32).state_dict())
    with pytest.raises(RuntimeError, match='Missing key.*"weight", "replicas", "alpha"'):
        mixed_conv().load_state_dict({})
