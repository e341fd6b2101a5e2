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
import itertools
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
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
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from detectron2_nats import (
    Architecture,
    MixedDilationConv2d,
    NATSError,
    alpha_parameters,
    alpha_training,
    fuse_for_inference,
)
from detectron2_nats.config import load_config
from detectron2_nats.show.cost import interleaved_seconds

EPILOG = """
parts (--what):
  inference   backbone and whole detector: plain and frozen, each also after fuse_for_inference;
              the super-network
  train       a training step: plain, frozen, weight step and α step of the super-network
  memory      what these steps keep for backward, without parameters and buffers, and their peak,
              on a CPU with the program and its libraries (Linux only); of two steps the larger
  convs       one 3x3 conv of res3, res4, res5: plain, frozen, the super-network's

examples:
  a small part, minutes:
    $ python tools/benchmark.py --networks R50 --size 256 320 --rounds 3 --what inference convs
  the steps of two networks on a GPU, at the paper's image size:
    $ python tools/benchmark.py --device cuda --dtype float32 bfloat16 --what train memory \\
        --networks R50 R101 --size 800 1216
"""

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
CONFIGS = {
    "R50": "faster_rcnn_R_50_FPN",
    "R101": "faster_rcnn_R_101_FPN",
    "X101": "faster_rcnn_X_101_32x4d_FPN",
}
STRIDES = {"res3": 8, "res4": 16, "res5": 32}
SEARCH_PLAIN = "plain, search config"  # with frozen batch norms, unlike in retraining
SEARCH_STEPS = {"weight step": ["weight"], "α step": ["alpha"], "both": ["weight", "alpha"]}
BOXES_PER_IMAGE = 10
SEED = 7

Values = Dict[str, List[float]]
"""Row of a table → the values measured in each round."""


def load(args: argparse.Namespace, kind: str, name: str) -> CfgNode:
    """The config of a network, `kind` "retrain" or "search"."""
    path = os.path.join(ROOT, "configs", kind, f"{CONFIGS[name]}.yaml")
    return load_config(path, ["MODEL.DEVICE", args.device, "MODEL.ROI_HEADS.NUM_CLASSES", 5])


def configs(args: argparse.Namespace, name: str) -> Dict[str, CfgNode]:
    """Variant → config: of the retrained networks, the first plain; of the search, the last two."""
    plain, search = load(args, "retrain", name), load(args, "search", name)
    search_plain = search.clone()
    search_plain.MODEL.BACKBONE.NAME = search.MODEL.NATS.BASE_BACKBONE
    variants = {"plain": plain}
    for variant, architecture in architectures(search).items():
        variants[variant] = cfg = plain.clone()
        cfg.MODEL.BACKBONE.NAME = "build_nats_backbone"
        cfg.MODEL.NATS.BASE_BACKBONE = plain.MODEL.BACKBONE.NAME
        cfg.MODEL.NATS.ARCHITECTURE = architecture.to_config()
    return {**variants, SEARCH_PLAIN: search_plain, "super-network": search}


def architectures(search: CfgNode) -> Dict[str, Architecture]:
    """Variant → architecture: the same random votes of a search, decoded in both orders."""
    with torch.device("meta"):
        supernet = build_backbone(search)
    generator = np.random.default_rng(SEED)
    for conv in supernet.modules():
        if isinstance(conv, MixedDilationConv2d):
            num_genotypes = len(conv.genotypes)
            votes = np.eye(num_genotypes)[generator.integers(num_genotypes, size=conv.num_groups)]
            conv.alpha = nn.Parameter(torch.from_numpy(votes))
    orders = ("paper", "voted")
    return {f"frozen, {order} order": Architecture.decode(supernet, order) for order in orders}


def prepared(args: argparse.Namespace, module: nn.Module) -> nn.Module:
    """Prepare a detector or conv with random weights for measuring, in place."""
    for block in module.modules():
        # If random branches were as strong as their shortcuts, 33 blocks would overflow.
        if hasattr(block, "conv3"):
            block.conv3.norm.weight.data.fill_(0.2)
    return module.to(args.device)


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


def measure(
    args: argparse.Namespace, function: Callable[[Any], object], subjects: Mapping[str, Any]
) -> Values:
    """Milliseconds of ``function(subject)`` for each subject in each round."""
    warm_up = 3 if args.device == "cuda" else 1  # cuDNN chooses its kernels in the first calls
    calls = [functools.partial(function, subject) for subject in subjects.values()]
    seconds = interleaved_seconds(calls, args.rounds, warm_up, args.device)
    return {name: [1e3 * value for value in values] for name, values in zip(subjects, seconds)}


def autocast(args: argparse.Namespace, dtype: str) -> torch.autocast:
    return torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bfloat16")


def saved_bytes(function: Callable[[], object], module: nn.Module) -> int:
    """Bytes that autograd keeps for backward while `function` is called.

    Each storage counts once. The module's own parameters and buffers do not count.
    """
    tensors = (*module.parameters(), *module.buffers())
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
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


def run_inference(args: argparse.Namespace, name: str, dtype: str) -> str:
    """Backbone and detector, in eval mode and without gradients."""
    models = {}
    for variant, cfg in configs(args, name).items():
        torch.manual_seed(SEED)
        models[variant] = prepared(args, build_model(cfg).eval())
    del models[SEARCH_PLAIN]
    for variant in [*models][:-1]:
        models[f"{variant}, fused"] = fuse_for_inference(copy.deepcopy(models[variant]))
    batch = random_batch(args)
    pixels = torch.stack([record["image"] for record in batch])
    images = pixels.sub(127).div(58)

    def backbone(model):
        with torch.no_grad(), autocast(args, dtype):
            model.backbone(images)

    def detector(model):
        with torch.no_grad(), autocast(args, dtype):
            model(batch)

    columns = {f"{part.__name__}, ms": measure(args, part, models) for part in (backbone, detector)}
    return table(columns, dict.fromkeys(models, "plain"))


class Training:
    """A detector, and the steps that train it on one random batch; they change no weight."""

    def __init__(self, args: argparse.Namespace, name: str, dtype: str, variant: str):
        is_search = variant in SEARCH_STEPS
        cfg = configs(args, name)["super-network" if is_search else variant]
        cfg.SOLVER.BASE_LR = 0.0  # all the work is done, and all rounds see the same network
        torch.manual_seed(SEED)
        self.model = prepared(args, build_model(cfg).train())
        alphas = alpha_parameters(self.model) if is_search else []
        for alpha in alphas:
            alpha.requires_grad_(False)
        self._sgd = build_optimizer(cfg, self.model)
        self._adam = torch.optim.Adam(alphas, lr=0.0) if alphas else None
        self._batch, self._storage = random_batch(args), EventStorage()
        self._autocast = functools.partial(autocast, args, dtype)
        self.steps = [getattr(self, step) for step in SEARCH_STEPS.get(variant, ["weight"])]

    def weight(self) -> None:
        """One step of the weights: forward, backward, optimizer."""
        self._step(self._sgd)

    def alpha(self) -> None:
        """One step of α."""
        with alpha_training(self.model):
            self._step(self._adam)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        with self._storage, self._autocast():
            loss = sum(self.model(self._batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def training_variants(args: argparse.Namespace, name: str) -> Dict[str, str]:
    """Variant → the variant that it is compared with."""
    *retrained, search_plain, _ = configs(args, name)
    reference = dict.fromkeys(retrained, "plain")
    return {**reference, **dict.fromkeys([search_plain, *SEARCH_STEPS], search_plain)}


def run_train(args: argparse.Namespace, name: str, dtype: str) -> str:
    """One training step of each variant."""
    reference = training_variants(args, name)
    *alone, weight, alpha, both = reference
    steps = {variant: Training(args, name, dtype, variant).steps[0] for variant in alone}
    steps[weight], steps[alpha] = Training(args, name, dtype, both).steps
    ms = measure(args, lambda step: step(), steps)
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
            numbers = pool.submit(memory_of, args, name, dtype, variant).result()
        kept[variant], peak[variant] = ([number / 2**20] for number in numbers)
    return table({"kept for backward, MiB": kept, "peak, MiB": peak}, reference)


def memory_of(args: argparse.Namespace, name: str, dtype: str, variant: str) -> Tuple[int, int]:
    """Bytes that a variant's steps keep for backward, and the largest number in use at once."""
    training = Training(args, name, dtype, variant)
    for step in training.steps * 2:  # the first pass makes the momentum buffers
        step()
    if args.device == "cuda":  # before counting, which needs more memory
        peak = torch.cuda.max_memory_allocated()
    else:
        with open("/proc/self/status") as status:  # ru_maxrss would include the parent's peak
            peak = next(int(s.split()[1]) * 1024 for s in status if s.startswith("VmHWM"))
    return max(saved_bytes(step, training.model) for step in training.steps), peak


def run_convs(args: argparse.Namespace, name: str, dtype: str) -> str:
    """One conv of each stage, without its norm: that of the second block, whose stride is 1."""
    # a single call is too short to be timed
    columns: Dict[str, Values] = {"10 forward, ms": {}, "10 forward + backward, ms": {}}
    reference = {}
    for stage, stride in STRIDES.items():
        convs = convs_of(args, name, stage)
        channels = convs[f"{stage} plain"].in_channels
        x = torch.randn(args.batch, channels, *(side // stride for side in args.size))
        x = x.to(args.device).requires_grad_(True)
        gradient = torch.randn_like(x)

        def forward(conv):
            for _ in range(10):
                with torch.no_grad(), autocast(args, dtype):
                    conv(x)

        def forward_backward(conv):
            for _ in range(10):
                with autocast(args, dtype):
                    y = conv(x)
                y.backward(gradient.to(y.dtype))
                x.grad = None
                conv.zero_grad()

        for values, function in zip(columns.values(), (forward, forward_backward)):
            values.update(measure(args, function, convs))
        reference.update(dict.fromkeys(convs, f"{stage} plain"))
    return table(columns, reference)


def convs_of(args: argparse.Namespace, name: str, stage: str) -> Dict[str, nn.Conv2d]:
    """Row → the conv of a stage's second block, without its norm."""
    convs = {}
    for variant, cfg in configs(args, name).items():
        torch.manual_seed(SEED)
        conv = build_backbone(cfg).get_submodule(f"bottom_up.{stage}.1.conv2")
        conv.norm = None
        convs[f"{stage} {variant}"] = prepared(args, conv).requires_grad_(True)
    del convs[f"{stage} {SEARCH_PLAIN}"]
    mixed = convs.pop(f"{stage} super-network")
    mixed.alpha.requires_grad_(False)
    convs[f"{stage} weight step"] = mixed
    convs[f"{stage} α step"] = alone = copy.deepcopy(mixed).requires_grad_(False)
    alone.alpha.requires_grad_(True)
    return convs


RUNS = {"inference": run_inference, "train": run_train, "memory": run_memory, "convs": run_convs}


def head_line(args: argparse.Namespace) -> str:
    machine = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        tf32 = ", TF32 in float32 convs" if torch.backends.cudnn.allow_tf32 else ""
        machine = torch.cuda.get_device_name() + tf32
    return (
        f"{machine}; Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Detectron2 {detectron2.__version__}; rounds: {args.rounds}, median (min..max); "
        f"`python tools/benchmark.py {shlex.join(sys.argv[1:])}`"
    )


def main(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise NATSError("--device cuda: PyTorch finds no CUDA device here")
    print(head_line(args), flush=True)
    height, width = args.size
    for part, dtype, name in itertools.product(args.what, args.dtype, args.networks):
        try:
            text = RUNS[part](args, name, dtype)
        except (torch.OutOfMemoryError, BrokenProcessPool) as error:
            raise NATSError(f"{part}: {error}: lower --size or --batch") from None
        head = f"## {part}: {name}, {dtype}, {args.batch} x {height} x {width}"
        print(f"\n{head}\n\n{text}", flush=True)
        torch.cuda.empty_cache()


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    several = {"nargs": "+", "help": "(%(default)s)"}
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    parser.add_argument("--networks", choices=list(CONFIGS), default=list(CONFIGS), **several)
    parser.add_argument("--what", choices=list(RUNS), default=list(RUNS), **several)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=["float32"], **several)
    parser.add_argument("--size", nargs=2, type=int, default=[480, 640], help="of images, H W")
    parser.add_argument("--batch", type=int, default=1, help="images (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="after a warm-up (%(default)s)")
    args = parser.parse_args(arguments)
    args.size = [-(-side // 32) * 32 for side in args.size]  # Detectron2 pads to whole strides
    return args


if __name__ == "__main__":
    try:
        main(parse())
    except NATSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
