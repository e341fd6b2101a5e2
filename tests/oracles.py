"""Tiny backbones of every supported kind, and the paper's formulas in plain loops."""

from typing import Dict, Sequence, Tuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import FPN, ResNet, build_backbone
from detectron2.modeling.backbone import resnet
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from detectron2_nats import Architecture, SearchSpace, add_nats_config
from detectron2_nats.method.layers import GroupedDilationConv2d
from detectron2_nats.method.names import searchable, searched_layers

RESNET, FPN_RESNET = "build_resnet_backbone", "build_resnet_fpn_backbone"

# name → (base builder, options, searched stages). Between them: both blocks, stride in the 3×3
# conv and before it, conv groups, base dilation, every neck.
BACKBONES = {
    "R18": (RESNET, ["RESNETS.DEPTH", 18, "RESNETS.OUT_FEATURES", ["res5"]], "res3 res4 res5"),
    "R50": (RESNET, ["RESNETS.OUT_FEATURES", ["res5"]], "res3 res4 res5"),
    "ResNeXt": (
        FPN_RESNET,
        [
            "RESNETS.NUM_GROUPS",
            8,
            "RESNETS.WIDTH_PER_GROUP",
            4,
            "RESNETS.STRIDE_IN_1X1",
            False,
        ],
        "res3 res4 res5",
    ),
    "FPN": (FPN_RESNET, ["RESNETS.NORM", "BN"], "res3 res4 res5"),
    "RetinaNet": (
        "build_retinanet_resnet_fpn_backbone",
        ["RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]],
        "res3 res4 res5",
    ),
    "C4": (RESNET, ["RESNETS.OUT_FEATURES", ["res4"]], "res3 res4"),
    "DC5": (
        RESNET,
        ["RESNETS.OUT_FEATURES", ["res5"], "RESNETS.RES5_DILATION", 2],
        "res3 res4 res5",
    ),
    "Deformable": (
        RESNET,
        [
            "RESNETS.OUT_FEATURES",
            ["res5"],
            "RESNETS.DEFORM_ON_PER_STAGE",
            [False, False, False, True],
        ],
        "res3 res4",
    ),
    "Lazy": (None, None, "res3 res4 res5"),
}
# without Detectron2's compiled ops a deformable conv does not run
RUNNABLE = [name for name in BACKBONES if name != "Deformable"]

# not symmetric in height and width, and more genotypes in res5 than before
GENOTYPES = {
    "res2": [[1, 1], [2, 2]],
    "res3": [[1, 1], [1, 3]],
    "res4": [[1, 1], [1, 3]],
    "res5": [[1, 1], [3, 1], [2, 2]],
}


def tiny_cfg(base: str = RESNET, model_options: Sequence = ()) -> CfgNode:
    """A narrow ResNet-50 on the CPU; `model_options` are keys below MODEL and their values."""
    cfg = get_cfg()
    add_nats_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = base
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 16
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    if "fpn" in base:
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    if "retinanet" in base:
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    options = list(model_options)
    options[::2] = [f"MODEL.{key}" for key in options[::2]]
    cfg.merge_from_list(options)
    return cfg


class StandInDeformConv(nn.Module):
    """What a deformable conv is to us: no nn.Conv2d, with a weight of the same name."""

    def __init__(self, in_channels, out_channels, kernel_size, norm=None, **kwargs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.kernel_size = (kernel_size, kernel_size)
        self.bias = None
        self.norm = norm


def build(cfg: CfgNode) -> nn.Module:
    """The backbone of a config; Detectron2 without compiled ops cannot make deformable ones."""
    try:
        import detectron2._C  # noqa: F401
    except ImportError:
        with mock.patch.object(resnet, "DeformConv", StandInDeformConv):
            return build_backbone(cfg)
    return build_backbone(cfg)


def case_cfg(name: str) -> CfgNode:
    base, options, _ = BACKBONES[name]
    return tiny_cfg(base, options)


def lazy_backbone():
    """An FPN on a two-blocks-per-stage ResNet, as a LazyConfig model."""
    channels = [16, 32, 64, 128, 256]
    stages = [
        L(ResNet.make_stage)(
            block_class=BottleneckBlock,
            num_blocks=2,
            stride_per_block=[1 if i == 0 else 2, 1],
            in_channels=channels[i],
            out_channels=channels[i + 1],
            bottleneck_channels=channels[i + 1] // 2,
            stride_in_1x1=False,
            norm="FrozenBN",
        )
        for i in range(4)
    ]
    return L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=16, norm="FrozenBN"),
            stages=stages,
            out_features=["res2", "res3", "res4", "res5"],
        ),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=16,
    )


def build_plain(name: str, seed: int = 0) -> nn.Module:
    """The plain backbone with random weights and norm statistics, in eval mode."""
    torch.manual_seed(seed)
    lazy = name == "Lazy"
    backbone = instantiate(lazy_backbone()) if lazy else build(case_cfg(name))
    return randomized(backbone).eval()


def randomized(module: nn.Module) -> nn.Module:
    """Give norms statistics that matter (a new one is the identity), small enough for depth."""
    for norm in module.modules():
        if isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d)):
            for tensor, low, high in (
                (norm.weight, 0.2, 0.6),
                (norm.bias, -0.3, 0.3),
                (norm.running_mean, -0.1, 0.1),
                (norm.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high)
    return module


def space_of(name: str, **kwargs) -> SearchSpace:
    stages = BACKBONES[name][2].split()
    kwargs.setdefault("num_groups", 4)
    return SearchSpace([GENOTYPES[s] for s in stages], [f"{s}.*" for s in stages], **kwargs)


def residual_convs(network: nn.Module) -> Dict[str, nn.Conv2d]:
    """Name → each 3×3 conv on the main path of a residual network."""
    return searchable(network, ["res[2-5].*"])


def random_architecture(name: str, backbone: nn.Module, seed: int = 0) -> Architecture:
    """Dilations at random for each of 4 groups of each conv of the case's stages."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer, conv in residual_convs(backbone).items():
        stage = layer.split(".")[0]
        if stage in BACKBONES[name][2].split():
            pairs = GENOTYPES[stage]
            chosen = torch.randint(len(pairs), (4,), generator=generator).tolist()
            layers[layer] = [[conv.out_channels // 4, *pairs[g]] for g in chosen]
    return Architecture(layers)


def has_dilations(conv: nn.Module) -> bool:
    """Whether an architecture was applied to a conv."""
    return isinstance(conv, GroupedDilationConv2d) or hasattr(conv, "plain_dilation")


def make_one_hot(supernet: nn.Module, seed: int = 0) -> Dict[str, torch.Tensor]:
    """Set every α to ±1e4 at random; returns layer name → the vote (N,)."""
    generator = torch.Generator().manual_seed(seed)
    votes = {}
    for name, conv in searched_layers(supernet).items():
        num_groups, num_genotypes = conv.alpha.shape
        votes[name] = torch.randint(num_genotypes, (num_groups,), generator=generator)
        conv.alpha.data.fill_(-1e4)
        conv.alpha.data[torch.arange(num_groups), votes[name]] = 1e4
    return votes


def image(size: int = 64, dtype=torch.float32, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def outputs_and_gradients(
    model: nn.Module, x: torch.Tensor
) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
    """Features, and the gradients of a fixed random projection of them by parameter name."""
    x = x.clone().requires_grad_(True)
    outputs = model(x)
    generator = torch.Generator().manual_seed(11)
    loss = sum(
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)).sum()
        for _, y in sorted(outputs.items())
    )
    wanted = {k: p for k, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, [x, *wanted.values()])
    return outputs, dict(zip(["x", *wanted], gradients))


def assert_identical(actual: Dict[str, torch.Tensor], expected: Dict[str, torch.Tensor]) -> None:
    """Same keys, and bit-identical tensors."""
    assert list(actual) == list(expected)
    for key in expected:
        assert actual[key].dtype == expected[key].dtype and torch.equal(actual[key], expected[key])


# -- the paper's formulas, in plain loops ---------------------------------------------------------


def direct_conv(
    x: torch.Tensor, weight: torch.Tensor, dilation: Tuple[int, int], stride=1, groups: int = 1
) -> torch.Tensor:
    """A 3×3 conv whose padding equals its dilation, as one matrix product per conv group."""
    patches = F.unfold(x, 3, dilation=dilation, padding=dilation, stride=stride)
    outputs = [
        torch.einsum("bkl,ok->bol", columns, rows.flatten(1))
        for columns, rows in zip(patches.chunk(groups, 1), weight.chunk(groups, 0))
    ]
    step = (stride, stride) if isinstance(stride, int) else stride
    height, width = ((size - 1) // s + 1 for size, s in zip(x.shape[-2:], step))
    return torch.cat(outputs, 1).view(len(x), len(weight), height, width)


def direct_mixture(
    x: torch.Tensor,
    replicas: Sequence[torch.Tensor],
    alpha: torch.Tensor,
    genotypes: Sequence[Tuple[int, int]],
    base_dilation: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Section 3.2: y*_i = Σ_g softmax_g(α_i)^g · y^g_i."""
    y = [
        direct_conv(x, w, (base_dilation * d_h, base_dilation * d_w), stride, groups)
        for w, (d_h, d_w) in zip(replicas, genotypes)
    ]
    mixed = []
    for i in range(len(alpha)):
        total = sum(alpha[i, g].exp() for g in range(len(genotypes)))
        rows = slice(i * y[0].shape[1] // len(alpha), (i + 1) * y[0].shape[1] // len(alpha))
        mixed.append(sum(alpha[i, g].exp() / total * y[g][:, rows] for g in range(len(genotypes))))
    return torch.cat(mixed, 1)


def direct_frozen(
    x: torch.Tensor,
    weight: torch.Tensor,
    dilations: Sequence[Tuple[int, int]],
    base_dilation: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> torch.Tensor:
    """Section 3.3: every output channel alone, with its own dilation (one per channel)."""
    per_group, inputs = len(weight) // groups, x.shape[1] // groups
    channels = []
    for o, (d_h, d_w) in enumerate(dilations):
        first = o // per_group * inputs
        channels.append(
            direct_conv(
                x[:, first : first + inputs],
                weight[o : o + 1],
                (base_dilation * d_h, base_dilation * d_w),
                stride,
            )
        )
    return torch.cat(channels, 1)
