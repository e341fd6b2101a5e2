#!/usr/bin/env python
"""Time plain, frozen and super-networks side by side; print Markdown tables.

All variants of a comparison are measured in turn within each round. Ratios are taken per round. A
cell gives their median and, in brackets, the smallest and the largest. Nothing is downloaded:
weights, images and boxes are random with a fixed seed. So are the architectures: each channel group
has a dilation drawn uniformly from the paper's set C.
"""

import argparse
import copy
import functools
import gc
import itertools
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

import detectron2
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2_nats.bench.importers import from_ic_conv, read_json
from detectron2_nats.commands.cli import run_tool, tool_parser, whole_number
from detectron2_nats.config import load_config
from detectron2_nats.engine.determinism import computed_by
from detectron2_nats.engine.resumable import ResumableTrainer
from detectron2_nats.errors import NATSError, one_line
from detectron2_nats.files import write_atomically
from detectron2_nats.method.architecture import Architecture
from detectron2_nats.method.fuse import fuse_for_inference
from detectron2_nats.method.layers import GroupedDilationConv2d, MixedDilationConv2d
from detectron2_nats.method.names import searched_layers
from detectron2_nats.method.search_space import PAPER_SETS, SearchSpace
from detectron2_nats.method.transform import apply_architecture
from detectron2_nats.search.export import export_config
from detectron2_nats.search.trainer import SearchTrainer
from detectron2_nats.show.cost import interleaved_seconds

EPILOG = """
parts (--what):
  inference   backbone and whole detector: plain and frozen, each also after fuse_for_inference;
              the super-network
  train       a training step: plain, frozen, weight step and α step of the super-network
  memory      what these steps keep for backward, and their peak (on a CPU: Linux only)
  convs       one 3x3 conv of res3, res4, res5: plain, frozen, the super-network's
  timm        networks of timm, needs timm

examples:
  a small part, two minutes:
    $ python tools/benchmark.py --smoke
  the steps of two networks on a GPU, at the paper's image size:
    $ python tools/benchmark.py --device cuda --dtype float32 bfloat16 --what train memory \\
        --networks R50 R101 --size 800 1216
  networks of timm: plain, and frozen with 7, 2 and 1 dilations in each conv:
    $ python tools/benchmark.py --what timm --size 320 320
  also the pattern that IC-Conv published:
    $ python tools/benchmark.py --what inference convs --networks R50 --ic-conv ic_resnet50_k9.json
"""

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
CONFIGS = {
    "R50": "faster_rcnn_R_50_FPN",
    "R101": "faster_rcnn_R_101_FPN",
    "X101": "faster_rcnn_X_101_32x4d_FPN",
}
TIMM = {  # name → its convs that are searched
    "convnext_atto": "stages.*",
    "hgnetv2_b0": "stages.*",
    "mobilenetv3_large_100": "blocks.*",
    "regnetx_004": "s?.*",
}
STRIDES = {"res3": 8, "res4": 16, "res5": 32}
IC_CONV = "frozen, IC-Conv"
SEARCH_PLAIN = "plain, search config"  # with frozen batch norms, unlike in retraining
SEARCH_STEPS = {  # variant → methods of the trainer
    SEARCH_PLAIN: ["weight_step"],
    "weight step": ["weight_step"],
    "α step": ["alpha_step"],
    "weight + α step": ["weight_step", "alpha_step"],
}
BOXES_PER_IMAGE = 10
SEED = 7

Values = Dict[str, List[float]]
"""Row of a table → the values measured in each round."""


# -- what is measured: networks, architectures, data ----------------------------------------------


def load(args: argparse.Namespace, kind: str, name: str, dtype: str = "float32") -> CfgNode:
    """The config of a network, `kind` "retrain" or "search"."""
    return load_config(
        os.path.join(ROOT, "configs", kind, f"{CONFIGS[name]}.yaml"),
        [
            *("MODEL.DEVICE", args.device, "SEED", SEED),
            *("SOLVER.AMP.ENABLED", dtype != "float32", "SOLVER.AMP.PRECISION", "bfloat16"),
            # Only the trainers' constructors need data sets: the steps get a random batch
            *("DATASETS.TRAIN", ("nats_embedded_train",), "DATASETS.TEST", ()),
            *("DATASETS.CALIBRATION", ("nats_embedded_calibration",), "SEARCH.RETRAIN_CONFIG", ""),
            *("MODEL.ROI_HEADS.NUM_CLASSES", 5),
        ],
    )


def searched_network(args: argparse.Namespace, name: str) -> nn.Module:
    """The super-network's backbone, with a random vote of each group.

    Only α has memory; all else is on the meta device.
    """
    with torch.device("meta"):
        backbone = build_backbone(load(args, "search", name))
    generator = np.random.default_rng(SEED)
    for conv in searched_layers(backbone).values():
        num_genotypes = len(conv.genotypes)
        alpha = np.eye(num_genotypes)[generator.integers(num_genotypes, size=conv.num_groups)]
        conv.alpha = nn.Parameter(torch.from_numpy(alpha))
    return backbone


def architectures(args: argparse.Namespace, name: str) -> Dict[str, Architecture]:
    """Variant → architecture: the same random votes in both orders, and IC-Conv's pattern."""
    supernet = searched_network(args, name)
    found = {f"frozen, {o} order": Architecture.decode(supernet, o) for o in ("paper", "voted")}
    if args.ic_conv:
        found[IC_CONV] = from_ic_conv(read_json(args.ic_conv))
    return found


def prepared(args: argparse.Namespace, module: nn.Module) -> nn.Module:
    """Prepare a detector or conv with random weights for measuring, in place."""
    for block in module.modules():
        # If random branches were as strong as their shortcuts, 33 blocks would overflow.
        if hasattr(block, "conv3"):
            block.conv3.norm.weight.data.fill_(0.2)
    for parameter in module.parameters():
        if parameter.dim() > 3:
            parameter.data = in_layout(args, parameter.data)
    return module.to(args.device)


def in_layout(args: argparse.Namespace, tensor: torch.Tensor) -> torch.Tensor:
    """(…, C, H, W) in the layout asked for. ``Module.to()`` refuses replicas, which have 5 axes."""
    return tensor.movedim(-3, -1).contiguous().movedim(-1, -3) if args.channels_last else tensor


def random_batch(args: argparse.Namespace) -> List[dict]:
    """Images and ground-truth boxes, as Detectron2's mapper returns them."""
    generator, (height, width) = torch.Generator().manual_seed(SEED), args.size
    batch = []
    for _ in range(args.batch):
        corners = torch.rand(BOXES_PER_IMAGE, 2, 2, generator=generator).sort(dim=1).values
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(corners.flatten(1) * torch.tensor([width, height] * 2))
        instances.gt_classes = torch.randint(5, (BOXES_PER_IMAGE,), generator=generator)
        image = (torch.rand(3, height, width, generator=generator) * 255).to(args.device)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


# -- how it is measured ----------------------------------------------------------------------------


def measure(
    args: argparse.Namespace,
    function: Callable[[Any], object],
    subjects: Mapping[str, Any],
    repeats: int = 1,
) -> Values:
    """Milliseconds of ``function(subject)`` for each subject in each round.

    Args:
        repeats: calls per value, if a single call is too short to be timed.
    """

    def repeated(subject: Any) -> None:
        for _ in range(repeats):
            function(subject)

    warm_up = 3 if args.device == "cuda" else 1  # cuDNN chooses its kernels in the first calls
    calls = [functools.partial(repeated, subject) for subject in subjects.values()]
    seconds = interleaved_seconds(calls, args.rounds, warm_up, args.device)
    return {k: [value / repeats * 1e3 for value in values] for k, values in zip(subjects, seconds)}


def autocast(args: argparse.Namespace, dtype: str) -> torch.autocast:
    return torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bfloat16")


def saved_bytes(function: Callable[[], object], module: nn.Module) -> int:
    """Bytes that autograd keeps for backward while `function` is called.

    Each storage counts once. The module's own parameters and buffers do not count.
    """
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(module.parameters(), module.buffers())
    }
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # kept alive, so that its address stays unique
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in saved.values())


def table(columns: Mapping[str, Values], reference: Mapping[str, str]) -> str:
    """A Markdown table: a row per variant; per column the median, and the ratio to the reference.

    Args:
        columns: title → variant → value of each round.
        reference: variant → the variant that it is divided by; gives the rows and their order.
    """
    headers, rows = [""], [[variant] for variant in reference]
    for title, values in columns.items():
        headers += [title, "ratio"]
        for row, (variant, base) in zip(rows, reference.items()):
            median = statistics.median(values[variant])
            row.append(f"{median:,.0f}" if median >= 100 else f"{median:.3g}")
            row.append(_ratio(values[variant], values[base]) if variant != base else "")
    alignment = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=alignment)


def _ratio(values: Sequence[float], reference: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(values, reference)]
    spread = f" ({min(ratios):.2f}..{max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{spread}"


# -- the parts -------------------------------------------------------------------------------------


def run_inference(args: argparse.Namespace, name: str, dtype: str) -> str:
    """Backbone and detector, in eval mode and without gradients."""
    plain, batch = load(args, "retrain", name), random_batch(args)
    configs = {"plain": plain}
    for variant, architecture in architectures(args, name).items():
        configs[variant] = export_config(plain, architecture)
    models = {}
    for variant, cfg in {**configs, "super-network": load(args, "search", name)}.items():
        torch.manual_seed(SEED)
        models[variant] = prepared(args, build_model(cfg).eval())
    for variant in configs:
        models[f"{variant}, fused"] = fuse_for_inference(copy.deepcopy(models[variant]))
    pixels = torch.stack([record["image"] for record in batch])
    images = in_layout(args, pixels.sub(127).div(58))

    def backbone(model):
        with torch.no_grad(), autocast(args, dtype):
            model.backbone(images)

    def detector(model):
        with torch.no_grad(), autocast(args, dtype):
            model(batch)

    # the time of the detector's heads is the same in all variants and would hide the differences
    wholes = [backbone] if args.smoke else [backbone, detector]
    columns = {f"{whole.__name__}, ms": measure(args, whole, models) for whole in wholes}
    return table(columns, dict.fromkeys(models, "plain"))


def training_steps(
    args: argparse.Namespace, name: str, dtype: str, variant: str
) -> List[Callable[[], None]]:
    """The steps of a variant: a trainer's methods on one random batch. They change no weight."""
    trainer_class = ResumableTrainer
    if variant in SEARCH_STEPS:
        cfg = load(args, "search", name, dtype)
        if variant == SEARCH_PLAIN:
            cfg.MODEL.BACKBONE.NAME = cfg.MODEL.NATS.BASE_BACKBONE
        else:
            trainer_class = SearchTrainer
    else:
        cfg = load(args, "retrain", name, dtype)
        if variant != "plain":
            cfg = export_config(cfg, architectures(args, name)[variant])
    with tempfile.TemporaryDirectory() as cfg.OUTPUT_DIR:  # a log is opened, but nothing written
        trainer = trainer_class(cfg)
    prepared(args, trainer.model)
    trainer.storage = EventStorage()
    for objective in trainer.objectives().values():
        objective.loader = itertools.repeat(random_batch(args))
        for group in objective.optimizer.param_groups:
            group["lr"] = 0.0  # the step does all its work, and all rounds see the same network
    return [getattr(trainer, step) for step in SEARCH_STEPS.get(variant, ["weight_step"])]


def take(step: Callable[[], None]) -> None:
    """Take a step of :func:`training_steps`."""
    trainer = step.__self__
    with trainer.storage:
        step()
    if any(objective.bad_total for objective in trainer.objectives().values()):
        raise NATSError("a training step gave numbers that are not finite: nothing can be measured")


def training_variants(args: argparse.Namespace, name: str) -> Dict[str, str]:
    """Variant → the variant that it is compared with."""
    retrained = [] if args.smoke else ["plain", *architectures(args, name)]
    return {**dict.fromkeys(retrained, "plain"), **dict.fromkeys(SEARCH_STEPS, SEARCH_PLAIN)}


def run_train(args: argparse.Namespace, name: str, dtype: str) -> str:
    """One step of each variant, as the trainers take it: forward, backward, checks, optimizer."""
    reference = training_variants(args, name)
    *alone, weight, alpha, both = reference
    steps = {variant: training_steps(args, name, dtype, variant)[0] for variant in alone}
    steps[weight], steps[alpha] = training_steps(args, name, dtype, both)
    ms = measure(args, take, steps)
    ms[both] = [sum(pair) for pair in zip(ms[weight], ms[alpha])]
    return table({"step, ms": ms}, reference)


def run_memory(args: argparse.Namespace, name: str, dtype: str) -> str:
    """The memory of the same steps, each variant in a process of its own."""
    # glibc then returns larger blocks to the system when they are freed. Else gaps add to the peak.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
    kept: Values = {}
    peak: Values = {}
    reference = training_variants(args, name)
    for variant in reference:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(memory_of, args, name, dtype, variant).result()
        kept[variant], peak[variant] = ([number / 2**20] for number in found)
    note = (
        "Kept for backward: without parameters and buffers; for two steps, the larger. Peak: with "
        "weights, gradients and momentum, on a CPU also with the program and its libraries. "
        "MALLOC_MMAP_THRESHOLD_ is 1 MiB unless set: freed blocks are returned to the system."
    )
    columns = {"kept for backward, MiB": kept, "peak, MiB": peak}
    return f"{table(columns, reference)}\n\n{note}"


def memory_of(args: argparse.Namespace, name: str, dtype: str, variant: str) -> Tuple[int, int]:
    """Bytes that a variant's steps keep for backward, and the largest number in use at once."""
    steps = training_steps(args, name, dtype, variant)
    for step in steps * 2:  # the first pass makes the momentum buffers
        take(step)
    if args.device == "cuda":  # before counting, which needs more memory
        peak = torch.cuda.max_memory_allocated()
    else:
        with open("/proc/self/status") as status:  # ru_maxrss would include the parent's peak
            peak = next(int(s.split()[1]) * 1024 for s in status if s.startswith("VmHWM"))
    model = steps[0].__self__.model
    return max(saved_bytes(functools.partial(take, step), model) for step in steps), peak


def run_convs(args: argparse.Namespace, name: str, dtype: str) -> str:
    """One conv of each stage, without its norm: that of the second block, whose stride is 1."""
    columns: Dict[str, Values] = {"forward, ms": {}, "forward + backward, ms": {}}
    reference = {}
    for stage, stride in STRIDES.items():
        convs = convs_of(args, name, stage)
        height, width = (side // stride for side in args.size)
        x = torch.randn(args.batch, convs["plain"].in_channels, height, width, device=args.device)
        x = in_layout(args, x).requires_grad_(True)
        gradient = torch.randn_like(x)

        def forward(conv):
            with torch.no_grad(), autocast(args, dtype):
                conv(x)

        def forward_backward(conv):
            with autocast(args, dtype):
                y = conv(x)
            y.backward(gradient.to(y.dtype))
            x.grad = None
            conv.zero_grad()

        convs = {f"{stage} {variant}": conv for variant, conv in convs.items()}
        for values, function in zip(columns.values(), (forward, forward_backward)):
            values.update(measure(args, function, convs, repeats=10))
        reference.update(dict.fromkeys(convs, f"{stage} plain"))
    return table(columns, reference)


def convs_of(args: argparse.Namespace, name: str, stage: str) -> Dict[str, nn.Conv2d]:
    """Variant → the conv of a stage's second block, without its norm."""
    layer = f"{stage}.1.conv2"
    like = searched_layers(searched_network(args, name))[layer]
    torch.manual_seed(SEED)
    shape = (like.in_channels, like.out_channels, 3)
    plain = nn.Conv2d(*shape, padding=1, groups=like.groups, bias=False)
    convs = {"plain": plain}
    for variant, architecture in architectures(args, name).items():
        convs[variant] = GroupedDilationConv2d(copy.deepcopy(plain), architecture.layers[layer])
    for step in ("weight step", "α step"):
        mixed = MixedDilationConv2d(
            copy.deepcopy(plain), genotypes=like.genotypes, num_groups=like.num_groups
        )
        for parameter in mixed.parameters():
            parameter.requires_grad_((parameter is mixed.alpha) == (step == "α step"))
        convs[step] = mixed
    return {variant: prepared(args, conv) for variant, conv in convs.items()}


def run_timm(args: argparse.Namespace, name: str, dtype: str) -> str:
    """A network of timm: in eval mode without gradients, and forward and backward in training."""
    import timm

    squares = [(1, 1), (2, 2)]
    spaces = {"frozen, 7 dilations": PAPER_SETS["C"]["res4"], "frozen, 2 dilations": squares}
    models = {"plain": timm.create_model(name)}
    for variant, genotypes in spaces.items():
        space = SearchSpace([genotypes], convs=[TIMM[name]])
        drawn = Architecture.random(models["plain"], space, SEED)
        models[variant] = apply_architecture(timm.create_model(name), drawn)
    for dilation in ((2, 2), (3, 3)):
        uniform = Architecture.uniform(models["plain"], dilation, convs=[TIMM[name]])
        model = apply_architecture(timm.create_model(name), uniform)
        models[f"frozen, {dilation} everywhere"] = model
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(args.batch, 3, *args.size, generator=generator).to(args.device)
    for model in models.values():
        model.to(args.device)

    def inference(model):
        with torch.no_grad(), autocast(args, dtype):
            model.eval()(images)

    def training(model):
        with autocast(args, dtype):
            loss = model.train()(images).square().mean()
        loss.backward()
        model.zero_grad()

    columns = {f"{f.__name__}, ms": measure(args, f, models) for f in (inference, training)}
    return table(columns, dict.fromkeys(models, "plain"))


RUNS = {
    "inference": run_inference,
    "train": run_train,
    "memory": run_memory,
    "convs": run_convs,
    "timm": run_timm,
}


# -- the command -----------------------------------------------------------------------------------


def head_line(args: argparse.Namespace) -> str:
    machine, threads = computed_by(args.device)
    if threads:
        machine += f", {threads} threads"
    elif torch.backends.cudnn.allow_tf32:
        machine += ", TF32 in float32 convs"
    return (
        f"{machine}; Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Detectron2 {detectron2.__version__}; rounds: {args.rounds}, median (min..max); "
        f"`python tools/benchmark.py {shlex.join(sys.argv[1:])}`"
    )


def main(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise NATSError("--device cuda: PyTorch finds no CUDA device here")
    if args.ic_conv:  # fail now, not hours later, if it does not fit
        for name in args.networks:
            export_config(load(args, "retrain", name), architectures(args, name)[IC_CONV])
    height, width = args.size
    report = head_line(args)
    print(report, flush=True)
    parts = itertools.product(args.what, args.dtype, [*args.networks, *TIMM])
    for part, dtype, name in parts:
        if (part == "timm") != (name in TIMM):
            continue
        try:
            found = RUNS[part](args, name, dtype)
        except (torch.OutOfMemoryError, BrokenProcessPool) as error:
            raise NATSError(f"{one_line(error)}: lower --size or --batch") from None
        text = f"\n## {part}: {name}, {dtype}, {args.batch} x {height} x {width}\n\n{found}"
        print(text, flush=True)
        report += f"\n{text}"
        if args.output:  # after each part: a late failure must not lose hours of work
            try:
                write_atomically(args.output, f"{report}\n")
            except OSError as error:
                raise NATSError(f"{args.output}: cannot be written: {error.strerror}") from None
        gc.collect()  # frees the trainers, which are in reference cycles, before the next part
        torch.cuda.empty_cache()
    if args.output:
        print(f"wrote {args.output}")


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser, number = tool_parser(__doc__, EPILOG), whole_number(16384)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    parser.add_argument("--networks", nargs="+", choices=list(CONFIGS), help="(all)")
    parser.add_argument(
        "--what", nargs="+", choices=list(RUNS), help="parts, see below (all but timm)"
    )
    parser.add_argument(
        "--size", nargs=2, type=number, metavar=("HEIGHT", "WIDTH"), help="of images (480 640)"
    )
    parser.add_argument("--batch", type=number, default=1, help="images (%(default)s)")
    parser.add_argument("--rounds", type=number, help="after a warm-up (5)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32"],
        help="bfloat16: by autocast (float32)",
    )
    parser.add_argument("--channels-last", action="store_true", help="weights and images as NHWC")
    parser.add_argument("--ic-conv", metavar="FILE", help="IC-Conv's pattern for the network, JSON")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="smaller defaults: R50 at 256 320, 3 rounds, all parts except memory, fewer variants",
    )
    parser.add_argument("--output", metavar="FILE.md", help="also write the tables to this file")
    args = parser.parse_args(arguments)
    # what is given goes before the defaults of --smoke
    args.networks = args.networks or (["R50"] if args.smoke else list(CONFIGS))
    usual = [part for part in RUNS if part != "timm" and not (args.smoke and part == "memory")]
    args.what = args.what or usual
    args.size = args.size or ([256, 320] if args.smoke else [480, 640])
    args.size = [-(-side // 32) * 32 for side in args.size]  # Detectron2 pads to whole strides
    args.rounds = args.rounds or (3 if args.smoke else 5)
    return args


if __name__ == "__main__":
    run_tool(main, parse())
