#!/usr/bin/env python
"""Time plain, frozen and super-networks side by side; print Markdown tables.

All variants of a comparison run in turn within each round. Ratios are taken per round; a cell gives
their median and, in brackets, the least and the largest. Nothing is downloaded: weights, images
and boxes are random, of a fixed seed. So are the architectures: 16 groups per conv, each with a
dilation drawn uniformly from the paper's set C.
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import platform
import resource
import shlex
import socket
import statistics
import subprocess
import sys
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import detectron2
from detectron2.config import CfgNode
from detectron2.engine.train_loop import TrainerBase
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from detectron2_nats.architecture import Architecture, decode_alpha
from detectron2_nats.backbone import search_space_from_config
from detectron2_nats.command import run_tool, tool_parser
from detectron2_nats.config import load_config
from detectron2_nats.engine.launch import exit_from_group
from detectron2_nats.engine.resumable import (
    ResumableTrainer,
    _distributed,
    _ForwardState,
    _LossModule,
)
from detectron2_nats.errors import NATSError, one_line
from detectron2_nats.files import write_atomically
from detectron2_nats.fuse import fuse_for_inference
from detectron2_nats.importers import from_ic_conv, read_json
from detectron2_nats.layers import GroupedDilationConv2d, MixedDilationConv2d
from detectron2_nats.results.cost import interleaved_seconds
from detectron2_nats.search_space import PAPER_SETS
from detectron2_nats.trainer import SearchTrainer
from detectron2_nats.transform import apply_architecture, conv3x3_layers, to_supernet

EPILOG = """
parts (--what):
  inference   backbone and whole detector: plain, frozen in both orders, IC-Conv's pattern; each
              also after fuse_for_inference
  train       a training step of those; weight step and alpha step of the super-network; what
              the paper's whole search would take
  memory      what these keep for backward, and their peak, each in a fresh process
  convs       one 3x3 conv of res3, res4, res5: plain and frozen; IC-Conv's pattern also as its own
              code computes it
  rivals      the super-network's conv against other ways to write it
  ranks       the search's steps by one process and by two, each on half the cores (or a GPU each),
              and the bytes that each hands to all-reduces

examples:
  ratios only, two minutes:
    $ python tools/benchmark.py --smoke
  everything on the CPU, into a file as well:
    $ python tools/benchmark.py --output output/benchmark.md
  the steps of two networks on a GPU, at the paper's image size:
    $ python tools/benchmark.py --device cuda --dtype float32 bfloat16 --what train memory \\
        --networks R50 R101 --size 800 1216
  also the pattern that IC-Conv published:
    $ python tools/benchmark.py --what inference convs --ic-conv ic_resnet50_k9.json
"""

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir)
CONFIGS = {
    "R50": "faster_rcnn_R_50_FPN",
    "R101": "faster_rcnn_R_101_FPN",
    "X101": "faster_rcnn_X_101_32x4d_FPN",
}
PARTS = ("inference", "train", "memory", "convs", "rivals", "ranks")
STRIDES = {"res3": 8, "res4": 16, "res5": 32}
SEARCH_PLAIN = "plain, search config"  # its batch norms are frozen, those of retraining are not
SEARCH_VARIANTS = (SEARCH_PLAIN, "weight step", "α step", "weight + α step")
_IC_CONV = "frozen, IC-Conv"
NUM_GROUPS = 16
TRAIN_IMAGES, WEIGHT_EPOCHS, ALPHA_EPOCHS = 82_783, 25, 15  # the paper's search: COCO train2014
BOXES_PER_IMAGE = 10
SEED = 7

Seconds = Dict[str, List[float]]
"""Row of a table → seconds in each round."""


# -- what is measured: networks, architectures, data ----------------------------------------------


def load(args: argparse.Namespace, kind: str, name: str, dtype: str = "float32") -> CfgNode:
    """The config of a network, `kind` "retrain" or "search"."""
    return load_config(
        os.path.join(ROOT, "configs", kind, f"{CONFIGS[name]}.yaml"),
        [
            *("MODEL.DEVICE", args.device),
            *("SOLVER.AMP.ENABLED", dtype != "float32", "SOLVER.AMP.PRECISION", "bfloat16"),
            # all of the optimizers' work is done, and every round sees the same network
            *("SOLVER.BASE_LR", 0.0, "SEARCH.ALPHA_LR", 0.0),
        ],
    )


def build_plain(args: argparse.Namespace, cfg: CfgNode) -> nn.Module:
    """The plain detector of either kind of config; the same weights at every call."""
    cfg = cfg.clone()
    if cfg.MODEL.BACKBONE.NAME == "build_nats_backbone":
        cfg.MODEL.BACKBONE.NAME = cfg.MODEL.NATS.BASE_BACKBONE
    torch.manual_seed(SEED)
    model = build_model(cfg)
    for block in model.backbone.modules():
        # With a random branch as strong as its shortcut, 33 blocks would end in infinities.
        if hasattr(block, "conv3"):
            block.conv3.norm.weight.data.fill_(0.2)
    if args.channels_last:  # before replicas exist: they have five dimensions, which it refuses
        model.to(memory_format=torch.channels_last)
    return model


def plain_convs(args: argparse.Namespace, name: str) -> Dict[str, nn.Module]:
    """Layer name → 3×3 conv, without memory for their weights."""
    with torch.device("meta"):
        return conv3x3_layers(build_backbone(load(args, "retrain", name)))


def architectures(args: argparse.Namespace, name: str) -> Dict[str, Architecture]:
    """Variant → architecture: random votes in each order, IC-Conv's pattern where it fits."""
    convs, generator = plain_convs(args, name), np.random.default_rng(SEED)
    layers: Dict[str, dict] = {order: {} for order in args.order}
    for layer, conv in convs.items():
        stage = layer.split(".")[0]
        if stage not in STRIDES:
            continue
        genotypes = PAPER_SETS["C"][stage]
        alpha = np.eye(len(genotypes))[generator.integers(len(genotypes), size=NUM_GROUPS)]
        for order in args.order:
            layers[order][layer] = decode_alpha(alpha, genotypes, conv.out_channels, order)
    found = {f"frozen, {order} order": Architecture(layers[order]) for order in args.order}
    if args.ic_conv:
        pattern = from_ic_conv(read_json(args.ic_conv))
        if list(pattern.layers) == list(convs) and name != "X101":  # it cuts conv groups
            found[_IC_CONV] = pattern
    return found


def random_batch(args: argparse.Namespace) -> List[dict]:
    """Images and ground-truth boxes as Detectron2's mapper gives them."""
    generator, (height, width) = torch.Generator().manual_seed(SEED), args.size
    batch = []
    for _ in range(args.batch):
        corners = torch.rand(BOXES_PER_IMAGE, 2, 2, generator=generator).sort(dim=1).values
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(corners.flatten(1) * torch.tensor([width, height] * 2))
        instances.gt_classes = torch.randint(80, (BOXES_PER_IMAGE,), generator=generator)
        image = (torch.rand(3, height, width, generator=generator) * 255).to(args.device)
        batch.append({"image": image, "instances": instances, "height": height, "width": width})
    return batch


# -- how it is measured ----------------------------------------------------------------------------


def measure(
    args: argparse.Namespace,
    functions: Mapping[str, Callable[[], object]],
    least: float = 0.0,
) -> Seconds:
    """Seconds of one call of each function in each round.

    Args:
        least: seconds that the first function's sample must last; all are repeated as often.
    """
    warm_up = 3 if args.device == "cuda" else 1  # cuDNN chooses its kernels at the first calls
    calls, repeats = list(functions.values()), 1
    if least:
        ((once,),) = interleaved_seconds(calls[:1], 1, warm_up, args.device)
        repeats = max(1, math.ceil(least / once))

    def repeated(call: Callable[[], object]) -> None:
        for _ in range(repeats):
            call()

    calls = [functools.partial(repeated, call) for call in calls]
    seconds = interleaved_seconds(calls, args.rounds, warm_up, args.device)
    return {k: [value / repeats for value in values] for k, values in zip(functions, seconds)}


def autocast(args: argparse.Namespace, dtype: str) -> torch.autocast:
    return torch.autocast(args.device, torch.bfloat16, enabled=dtype == "bfloat16")


def saved_bytes(function: Callable[[], object], module: nn.Module) -> int:
    """Bytes that autograd keeps for backward while `function` runs.

    Each storage counts once; the module's own parameters and buffers, there anyway, do not.
    """
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in itertools.chain(module.parameters(), module.buffers())
    }
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # held, or another could get its address
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storage.nbytes() for storage in saved.values())


def peak_bytes(args: argparse.Namespace) -> int:
    """The most memory that was in use at once: on the GPU, or by this process."""
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        # Not ru_maxrss where this exists: a child's begins with its parent's.
        with open("/proc/self/status") as status:
            return next(int(s.split()[1]) * 1024 for s in status if s.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# -- tables ----------------------------------------------------------------------------------------


class Report:
    """Prints, and writes the file anew after each part: hours of work must not hang on the last."""

    def __init__(self, path: str):
        self.path, self.text = path, ""

    def add(self, *paragraphs: str) -> None:
        text = "\n\n".join(paragraphs) + "\n"
        print(text, flush=True)
        self.text += text + "\n"
        if self.path:
            try:
                write_atomically(self.path, self.text)
            except OSError as error:
                raise NATSError(
                    f"{self.path}: cannot be written: {error.strerror or error}"
                ) from None


def timing_table(
    args: argparse.Namespace,
    columns: Mapping[str, Seconds],
    reference: Mapping[str, str],
    extra: Optional[Mapping[str, Mapping[str, str]]] = None,
    images: bool = False,
) -> str:
    """A row for each variant; for each column milliseconds, images per second, ratio.

    Args:
        columns: what was done → variant → seconds of each round.
        reference: variant → the variant that its ratio is taken to; sets the rows and their order.
        extra: further columns, ready to print.
        images: also print images per second.
    """
    headers, rows = [""], [[variant] for variant in reference]
    for title, seconds in columns.items():
        if not args.smoke:
            headers += [f"{title}, ms"] + ["images/s"] * images
        headers.append(f"{title}, ratio")
        for row, (variant, base) in zip(rows, reference.items()):
            values = seconds.get(variant)
            if not args.smoke:
                median = statistics.median(values) if values else None
                row.append(_number(median * 1e3) if values else "")
                if images:
                    row.append(_number(args.batch / median) if values else "")
            row.append(_ratio(values, seconds[base]) if values and variant != base else "")
    for title, cells in (extra or {}).items():
        headers.append(title)
        for row in rows:
            row.append(cells.get(row[0], ""))
    return _markdown(rows, headers)


def _ratio(values: Sequence[float], reference: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(values, reference)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}..{max(ratios):.2f})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    alignment = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=alignment)


def _title(args: argparse.Namespace, part: str, name: str, dtype: str) -> str:
    height, width = args.size
    return f"## {part}: {name}, {dtype}, {args.batch} x {height} x {width}"


# -- the parts -------------------------------------------------------------------------------------


def run_inference(args: argparse.Namespace, report: Report, name: str, dtype: str) -> None:
    """Backbone and detector, in eval mode and without gradients."""
    cfg, batch = load(args, "retrain", name), random_batch(args)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    images = torch.stack([record["image"] for record in batch]).sub(127).div(58)
    images = images.contiguous(memory_format=layout)
    models = {"plain": build_plain(args, cfg)}
    for variant, architecture in architectures(args, name).items():
        models[variant] = apply_architecture(build_plain(args, cfg), architecture)
    for variant, model in list(models.items()):
        models[f"{variant}, fused"] = fuse_for_inference(copy.deepcopy(model.eval()))

    def backbone(model):
        with torch.no_grad(), autocast(args, dtype):
            model.backbone(images)

    def detector(model):
        with torch.no_grad(), autocast(args, dtype):
            model(batch)

    # the detector's own time is the same in all variants and would only hide the differences
    wholes = [backbone] if args.smoke else [backbone, detector]
    columns = {}
    for function in wholes:
        functions = {k: (lambda m=m, f=function: f(m)) for k, m in models.items()}
        columns[function.__name__] = measure(args, functions)
    table = timing_table(args, columns, dict.fromkeys(models, "plain"))
    report.add(_title(args, "inference", name, dtype), table)


def prepared(trainer_class: type, cfg: CfgNode, model: nn.Module, batch: List[dict]):
    """A trainer that can take its steps, all on one batch: no data sets, hooks or files."""
    trainer = trainer_class.__new__(trainer_class)
    TrainerBase.__init__(trainer)
    trainer.cfg, trainer.storage = cfg, EventStorage()
    trainer.prepare_model(model.train())
    optimizer = trainer.build_optimizer(cfg, model)
    trainer._forward_state, trainer._loss_module = _ForwardState(model), _LossModule(model)
    loader = itertools.repeat(batch)
    losses = _distributed(trainer._loss_module)
    if isinstance(losses, DistributedDataParallel):
        # The same messages, where they can be counted; dividing by the ranks is a pass of its own
        losses.register_comm_hook(None, allreduce_hook)
    trainer.weights = trainer.new_phase("", losses, loader, optimizer)
    if trainer_class is SearchTrainer:
        optimizer = torch.optim.Adam(
            [conv.alpha for conv in trainer.searched.values()],
            lr=cfg.SEARCH.ALPHA_LR,
            weight_decay=cfg.SEARCH.ALPHA_WEIGHT_DECAY,
        )
        trainer.alpha = trainer.new_phase("alpha", trainer._alpha_losses, loader, optimizer)
    return trainer


def take(trainer: ResumableTrainer, step: str) -> None:
    """Take the trainer's "weight_step" or "alpha_step"."""
    with trainer.storage:
        getattr(trainer, step)()
    if any(phase.bad_total for phase in trainer.phases()):
        raise NATSError("a training step gave numbers that are not finite: nothing can be measured")


def training_steps(
    args: argparse.Namespace, name: str, dtype: str, wanted: Sequence[str]
) -> Dict[str, Tuple[List[Callable[[], None]], nn.Module]]:
    """Variant → its steps and its network, for those that are `wanted`."""
    batch, found = random_batch(args), {}
    cfg = load(args, "retrain", name, dtype)
    for variant, architecture in {"plain": None, **architectures(args, name)}.items():
        if variant in wanted:
            model = build_plain(args, cfg)
            if architecture is not None:
                apply_architecture(model, architecture)
            trainer = prepared(ResumableTrainer, cfg, model, batch)
            found[variant] = [lambda t=trainer: take(t, "weight_step")], model
    cfg = load(args, "search", name, dtype)
    if SEARCH_PLAIN in wanted:
        model = build_plain(args, cfg)
        trainer = prepared(ResumableTrainer, cfg, model, batch)
        found[SEARCH_PLAIN] = [lambda t=trainer: take(t, "weight_step")], model
    if set(SEARCH_VARIANTS[1:]) & set(wanted):
        model = to_supernet(build_plain(args, cfg), search_space_from_config(cfg))
        search = prepared(SearchTrainer, cfg, model, batch)
        steps = [lambda s=step: take(search, s) for step in ("weight_step", "alpha_step")]
        for variant, part in zip(SEARCH_VARIANTS[1:], (steps[:1], steps[1:], steps)):
            found[variant] = part, model
    return {variant: found[variant] for variant in wanted}


def training_variants(args: argparse.Namespace, name: str) -> Dict[str, str]:
    """Variant → the variant that it is compared with."""
    retrained = [] if args.smoke else ["plain", *architectures(args, name)]
    return {**dict.fromkeys(retrained, "plain"), **dict.fromkeys(SEARCH_VARIANTS, SEARCH_PLAIN)}


def run_train(args: argparse.Namespace, report: Report, name: str, dtype: str) -> None:
    """One step each, as the trainers take it: forward, backward, checks, optimizer."""
    reference = training_variants(args, name)
    *single, both = reference
    steps = training_steps(args, name, dtype, single)
    seconds = measure(args, {variant: parts[0] for variant, (parts, _) in steps.items()})
    seconds[both] = [sum(pair) for pair in zip(seconds["weight step"], seconds["α step"])]
    table = timing_table(args, {"step": seconds}, reference, images=True)
    weight, alpha = (statistics.median(seconds[step]) / args.batch for step in SEARCH_VARIANTS[1:3])
    note = (
        f"The paper's whole search, {WEIGHT_EPOCHS} epochs of weight steps and {ALPHA_EPOCHS} of α "
        f"steps over {TRAIN_IMAGES:,} images, would be {_number(search_days(weight, alpha))} days "
        "of this machine with images of this size, without reading and exchanging anything. The "
        "paper's own took 20 days of a GTX 1080 Ti."
    )
    report.add(_title(args, "train", name, dtype), table, *[] if args.smoke else [note])


def search_days(weight: float, alpha: float) -> float:
    """Days of the paper's search (section 4.2), one after the other on one device.

    Args:
        weight: seconds per image of the weight step.
        alpha: of the α step.
    """
    return TRAIN_IMAGES * (WEIGHT_EPOCHS * weight + ALPHA_EPOCHS * alpha) / 86400


def run_memory(args: argparse.Namespace, report: Report, name: str, dtype: str) -> None:
    """Of the same steps, each variant in a process of its own."""
    reference = training_variants(args, name)
    found = {variant: _memory_of(name, dtype, variant) for variant in reference}
    rows = []
    for variant, base in reference.items():
        row = [variant]
        for key in ("saved", "peak"):
            value = found[variant][key]
            row.append(_number(value / 2**20))
            row.append(f"{value / found[base][key]:.2f}" if variant != base else "")
        rows.append(row)
    headers = ("", "kept for backward, MiB", "ratio", "peak, MiB", "ratio")
    note = (
        "Kept for backward: without parameters and buffers; of two steps, the larger. Peak: with "
        "weights, gradients and momentum."
    )
    if args.device == "cpu":
        bare = min(values["bare"] for values in found.values())
        note += (
            f" The program with its libraries alone takes {_number(bare / 2**20)} MiB of it. "
            "MALLOC_MMAP_THRESHOLD_ is 1 MiB unless set: freed blocks are given back."
        )
    report.add(_title(args, "memory", name, dtype), _markdown(rows, headers), note)


def _memory_of(name: str, dtype: str, variant: str) -> Dict[str, int]:
    command = [sys.executable, *("-W", "ignore"), __file__, *sys.argv[1:]]
    command += ["--measure-memory", name, dtype, variant]
    # glibc then gives larger blocks back when they are freed. Else its gaps are part of a peak.
    environment = {"MALLOC_MMAP_THRESHOLD_": str(2**20), **os.environ}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise NATSError(f"memory of {name}, {variant}: status {done.returncode}: {last[:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(args: argparse.Namespace, name: str, dtype: str, variant: str) -> str:
    """What `_memory_of` starts."""
    bare = peak_bytes(args)
    steps, model = training_steps(args, name, dtype, [variant])[variant]
    for _ in range(2):  # the first makes the momentum buffers
        for step in steps:
            step()
    peak = peak_bytes(args)  # before counting, which holds more
    saved = max(saved_bytes(step, model) for step in steps)
    return json.dumps({"bare": bare, "peak": peak, "saved": saved})


def run_ranks(args: argparse.Namespace, report: Report, name: str, dtype: str) -> None:
    """Data parallelism: images per second of one and of two processes, bytes of each step."""
    if args.device == "cuda" and torch.cuda.device_count() < 2:
        report.add(_title(args, "ranks", name, dtype), "Needs two GPUs.")
        return
    alone, pair = (_on_ranks(args, name, dtype, world) for world in (1, 2))
    rows = []
    for variant in SEARCH_VARIANTS[:3]:
        one = statistics.median(alone["seconds"][variant])
        two = statistics.median(pair["seconds"][variant])
        speeds = (args.batch / one, 2 * args.batch / two)
        sent = _number(pair["bytes"][variant] / 2**20)
        rows.append([variant, *map(_number, speeds), f"{one / two:.0%}", sent])
    headers = ("", "1 process, images/s", "2 processes, images/s", "of twice", "all-reduced, MiB")
    report.add(_title(args, "ranks", name, dtype), _markdown(rows, headers))


def _on_ranks(args: argparse.Namespace, name: str, dtype: str, world: int) -> dict:
    """Rank 0's {"seconds": variant → of each round, "bytes": variant → of one step}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    try:
        mp.spawn(_rank, (world, port, args, name, dtype, queue), nprocs=world)
    except mp.ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        raise NATSError(f"{world} processes of {name}: {last[:300]}") from None
    return queue.get()


def _rank(rank: int, world: int, port: int, args, name: str, dtype: str, queue) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, world_size=world, rank=rank)
    comm.create_local_process_group(world)
    steps = training_steps(args, name, dtype, SEARCH_VARIANTS[:3])
    calls = {variant: parts[0] for variant, (parts, _) in steps.items()}
    seconds = measure(args, calls)
    sent = {variant: all_reduced_bytes(call) for variant, call in calls.items()}
    if rank == 0:
        queue.put({"seconds": seconds, "bytes": sent})
    exit_from_group()


def all_reduced_bytes(step: Callable[[], None]) -> int:
    """Bytes that this process gives to all-reduces while `step` runs."""
    counted, plain = 0, dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        nonlocal counted
        counted += tensor.nbytes
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    try:
        step()
    finally:
        dist.all_reduce = plain
    return counted


def run_convs(args: argparse.Namespace, report: Report, name: str, dtype: str) -> None:
    """One conv of each stage, without its norm: the second block's, whose stride is 1."""
    found = architectures(args, name)
    inference, training, reference = {}, {}, {}
    for stage, conv, x in stage_convs(args, name):
        variants = {"plain": conv}
        for variant, architecture in found.items():
            runs = architecture.layers[f"{stage}.1.conv2"]
            variants[variant] = GroupedDilationConv2d(copy.deepcopy(conv), runs)
            if variant == _IC_CONV:
                variants[f"{variant}, a conv each"] = ConvEach(variants[variant])
        variants = {f"{stage} {variant}": conv for variant, conv in variants.items()}

        def forward(conv):
            with torch.no_grad(), autocast(args, dtype):
                conv(x)

        gradient = torch.randn_like(x)
        functions = {k: (lambda c=c: forward(c)) for k, c in variants.items()}
        inference.update(measure(args, functions, least=0.05))
        functions = {k: step_of(args, dtype, c, x, gradient) for k, c in variants.items()}
        training.update(measure(args, functions, least=0.05))
        reference.update(dict.fromkeys(variants, f"{stage} plain"))
    columns = {"forward": inference, "forward + backward": training}
    report.add(_title(args, "convs", name, dtype), timing_table(args, columns, reference))


def stage_convs(
    args: argparse.Namespace, name: str
) -> Iterator[Tuple[str, nn.Conv2d, torch.Tensor]]:
    """(stage, a bare 3×3 conv of it, an input of the size that it has there)."""
    torch.manual_seed(SEED)
    convs = plain_convs(args, name)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    for stage, stride in STRIDES.items():
        conv = _bare(convs[f"{stage}.1.conv2"]).to(args.device, memory_format=layout)
        height, width = (side // stride for side in args.size)
        x = torch.randn(args.batch, conv.in_channels, height, width, device=args.device)
        yield stage, conv, x.contiguous(memory_format=layout).requires_grad_(True)


def _bare(conv: nn.Conv2d) -> nn.Conv2d:
    """A conv of the same shape with weights, without norm and activation."""
    return nn.Conv2d(
        *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride),
        *(conv.padding, conv.dilation, conv.groups, conv.bias is not None),
    )


def step_of(
    args: argparse.Namespace,
    dtype: str,
    conv: nn.Module,
    x: torch.Tensor,
    gradient: torch.Tensor,
    trained: Optional[Sequence[nn.Parameter]] = None,
) -> Callable[[], None]:
    """Forward and backward of one conv, its input's gradient included.

    Args:
        trained: the parameters that take a gradient (default: all).
    """
    parameters = list(conv.parameters())
    trained = {id(p) for p in (parameters if trained is None else trained)}

    def step() -> None:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in trained)
        with autocast(args, dtype):
            y = conv(x)
        y.backward(gradient.to(y.dtype))
        for tensor in (x, *parameters):
            tensor.grad = None

    return step


# -- other forms of the frozen conv and of the super-network's ------------------------------------


class ConvEach(nn.Module):
    """The frozen conv as a module for each run, as IC-Conv's own code has it."""

    def __init__(self, ours: GroupedDilationConv2d):
        super().__init__()
        self.convs = nn.ModuleList()
        sizes = [channels for channels, _, _ in ours.runs]
        for (channels, *dilation), rows in zip(ours.runs, ours.weight.detach().split(sizes)):
            conv = nn.Conv2d(
                *(ours.in_channels, channels, 3, ours.stride, dilation, dilation),
                bias=False,
                device="meta",
            )
            conv.weight = nn.Parameter(rows.clone())
            self.convs.append(conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([conv(x) for conv in self.convs], 1)


class TextbookMixture(nn.Module):
    """The formula as it stands: every genotype's output scaled, then summed."""

    def __init__(self, ours: MixedDilationConv2d):
        super().__init__()
        self.genotypes, self.num_groups = ours.genotypes, ours.num_groups
        self.stride, self.groups = ours.stride, ours.groups
        self.weights = nn.ParameterList(
            weight.detach().clone() for weight in ours.genotype_weights()
        )
        self.alpha = nn.Parameter(ours.alpha.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        repeats = len(self.weights[0]) // self.num_groups
        mixture = self.alpha.softmax(dim=1).repeat_interleave(repeats, dim=0)
        outputs = []
        for g, (weight, dilation) in enumerate(zip(self.weights, self.genotypes)):
            y = F.conv2d(x, weight, None, self.stride, dilation, dilation, self.groups)
            outputs.append(y * mixture[:, g].to(y.dtype).view(1, -1, 1, 1))
        return sum(outputs)


class MergedKernel(nn.Module):
    """The same as one conv: all genotypes' taps, scaled, put into one large dense kernel.

    IC-Conv's super-network is of this form. 7×7 for dilations up to 3, 11×11 up to 5.
    """

    def __init__(self, ours: MixedDilationConv2d):
        super().__init__()
        self.num_groups, self.stride, self.groups = ours.num_groups, ours.stride, ours.groups
        replicas = [weight.detach() for weight in ours.genotype_weights()]
        self.weights = nn.Parameter(torch.stack(replicas))
        self.alpha = nn.Parameter(ours.alpha.detach().clone())
        self.padding = tuple(max(side) for side in zip(*ours.genotypes))
        (center_h, center_w), width = self.padding, 2 * self.padding[1] + 1
        taps = [
            (center_h + i * d_h) * width + center_w + j * d_w
            for d_h, d_w in ours.genotypes
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
        ]
        self.register_buffer("taps", torch.tensor(taps, device=ours.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, rows, columns, _, _ = self.weights.shape
        mixture = self.alpha.softmax(dim=1).repeat_interleave(rows // self.num_groups, dim=0)
        scaled = mixture.t().to(self.weights.dtype).view(-1, rows, 1, 1, 1) * self.weights
        # taps first, so that whole rows are added: (G·9, C_out·C_in) → (sides, C_out·C_in)
        scaled = scaled.permute(0, 3, 4, 1, 2).reshape(len(self.taps), -1)
        height, width = (2 * side + 1 for side in self.padding)
        kernel = scaled.new_zeros(height * width, scaled.shape[1])
        kernel = kernel.index_add(0, self.taps, scaled)
        kernel = kernel.view(height, width, rows, columns).permute(2, 3, 0, 1).contiguous()
        return F.conv2d(x, kernel, None, self.stride, self.padding, 1, self.groups)


def rf_next_conv(conv: nn.Conv2d) -> nn.Module:
    """RF-Next's search conv by mmcv: dilations 1, 2, 3 of one shared weight, mixed per layer."""
    from mmcv.cnn.rfsearch.operator import Conv2dRFSearchOp

    dilated = copy.deepcopy(conv)
    dilated.dilation = dilated.padding = (2, 2)  # it searches around the dilation that it finds
    config = {"num_branches": 3, "exp_rate": 0.5, "mmin": 1, "mmax": 24, "init_alphas": 0.01}
    return Conv2dRFSearchOp(dilated, config, verbose=False).to(conv.weight.device)


def run_rivals(args: argparse.Namespace, report: Report, dtype: str) -> None:
    """One super-network conv of R50's res3, res4, res5: forward and backward of each step."""
    columns: Dict[str, Seconds] = {"weight step": {}, "α step": {}, "both": {}}
    saved: Dict[str, Dict[str, str]] = {"weight step keeps, MiB": {}, "α step keeps, MiB": {}}
    reference = {}
    for stage, conv, x in stage_convs(args, "R50"):
        ours = MixedDilationConv2d(
            conv, genotypes=PAPER_SETS["C"][stage], num_groups=NUM_GROUPS
        ).train()
        nn.init.normal_(ours.alpha)
        names = [
            f"{stage} {form}"
            for form in ("ours", "textbook", "merged kernel", "RF-Next, 3 dilations")
        ]
        forms = dict(zip(names, (ours, TextbookMixture(ours), MergedKernel(ours))))
        try:
            forms[names[3]] = rf_next_conv(conv)
        except ImportError:
            names[3] = f"{stage} RF-Next: not installed: pip install -r requirements-optional.txt"
        reference.update(dict.fromkeys(names, names[0]))

        gradient, steps = torch.randn_like(x), {}
        for name, form in forms.items():
            if name in (names[0], names[2]):
                weights = [p for p in form.parameters() if p is not form.alpha]
                steps[name, 0] = step_of(args, dtype, form, x, gradient, weights)
                steps[name, 1] = step_of(args, dtype, form, x, gradient, [form.alpha])
            else:  # one step trains all
                steps[name, 0] = step_of(args, dtype, form, x, gradient)
        seconds = measure(args, steps, least=0.05)
        for name, form in forms.items():
            first, last = (name, 0), (name, 1) if (name, 1) in steps else (name, 0)
            pairs = list(zip(seconds[first], seconds[last]))
            # RF-Next takes no second step: weights and mixture learn from the same images
            sums = [pair[0] if name == names[3] else sum(pair) for pair in pairs]
            columns["weight step"][name], columns["α step"][name] = seconds[first], seconds[last]
            columns["both"][name] = sums
            for cells, key in zip(saved.values(), (first, last)):
                cells[name] = _number(saved_bytes(steps[key], form) / 2**20)
    note = (
        "Ours and the merged kernel train either the weights or α, the textbook's form and RF-Next "
        "both at once. RF-Next mixes 3 dilations per layer; the others 5 (res3, res4) or 9 (res5) "
        "per channel group."
    )
    table = timing_table(args, columns, reference, saved)
    report.add(_title(args, "rivals", "R50", dtype), table, note)


# -- the command -----------------------------------------------------------------------------------


def head_line(args: argparse.Namespace) -> str:
    if args.device == "cuda":
        tf32 = "on" if torch.backends.cudnn.allow_tf32 else "off"
        machine = f"{torch.cuda.get_device_name()}, TF32 in float32 convs {tf32}"
    else:
        machine = f"{_cpu_name()}, threads: {torch.get_num_threads()}"
    layout = "channels last, " if args.channels_last else ""
    return (
        f"{machine}; Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Detectron2 {detectron2.__version__}; {layout}rounds: {args.rounds}, median (min..max); "
        f"`python tools/benchmark.py {shlex.join(sys.argv[1:])}`"
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise NATSError("--device cuda: PyTorch finds no CUDA device here")
    if args.measure_memory:
        print(measure_memory(args, *args.measure_memory))
        return
    if args.ic_conv and not any(_IC_CONV in architectures(args, name) for name in args.networks):
        raise NATSError(f"{args.ic_conv}: this pattern fits none of {', '.join(args.networks)}")
    report = Report(args.output)
    report.add(head_line(args))
    runs = {
        "inference": run_inference,
        "train": run_train,
        "memory": run_memory,
        "convs": run_convs,
        "ranks": run_ranks,
    }
    for part, dtype in itertools.product(args.what, args.dtype):
        if part == "rivals":
            run_rivals(args, report, dtype)
            continue
        for name in args.networks:
            try:
                runs[part](args, report, name, dtype)
            except torch.OutOfMemoryError as error:
                raise NATSError(f"{one_line(error)}: lower --size or --batch") from None
    if args.output:
        print(f"wrote {args.output}")


def _pixels(text: str) -> int:
    if not text.isdecimal() or not 64 <= int(text) <= 16384:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 64 to 16384 pixels")
    return -(-int(text) // 32) * 32  # Detectron2 pads images to whole strides


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 1000")
    return int(text)


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = tool_parser(__doc__, EPILOG)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(%(default)s)")
    parser.add_argument("--networks", nargs="+", choices=list(CONFIGS), help="(all)")
    parser.add_argument("--what", nargs="+", choices=PARTS, help="parts, see below (all)")
    parser.add_argument(
        "--size",
        nargs=2,
        type=_pixels,
        metavar=("HEIGHT", "WIDTH"),
        help="of the images, rounded up to multiples of 32 (480 640)",
    )
    parser.add_argument("--batch", type=_count, default=1, help="images (%(default)s)")
    parser.add_argument("--rounds", type=_count, help="after a warm-up (5)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16"],
        default=["float32"],
        help="bfloat16: by autocast (float32)",
    )
    parser.add_argument("--channels-last", action="store_true", help="weights and images as NHWC")
    parser.add_argument(
        "--order",
        nargs="+",
        choices=["paper", "voted"],
        default=["paper", "voted"],
        help="of the frozen networks' channels (both)",
    )
    parser.add_argument("--ic-conv", default="", metavar="FILE", help="IC-Conv's pattern, JSON")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="ratios only, and smaller defaults: R50 at 256 320, 3 rounds, three parts",
    )
    parser.add_argument(
        "--output", default="", metavar="FILE.md", help="write the tables there too"
    )
    parser.add_argument("--measure-memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    # whatever is given rules
    args.networks = args.networks or (["R50"] if args.smoke else list(CONFIGS))
    args.what = args.what or (["inference", "train", "convs"] if args.smoke else list(PARTS))
    args.size = args.size or ([256, 320] if args.smoke else [480, 640])
    args.rounds = args.rounds or (3 if args.smoke else 5)
    return args


if __name__ == "__main__":
    run_tool(main, parse())
