#!/usr/bin/env python
"""A search of one of Detectron2's LazyConfig models, in Detectron2's own training loop.

α is trained by a hook, `AlphaSteps`, which any Detectron2 trainer takes. The result is an
architecture file and a LazyConfig of the searched detector. search_net.py does more (exact resume,
several GPUs, the verdict), but reads yacs configs only: its checks and its scaling are made of
their keys.
"""

import argparse
import os

import torch

import detectron2_nats as nats
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.utils.events import CommonMetricPrinter

EPILOG = """
example:
  $ python examples/lazyconfig_search.py --output output/lazy_search \\
      --config COCO-Detection/retinanet_R_50_FPN_1x.py --calibration nats_embedded_calibration \\
      dataloader.train.dataset.names=nats_embedded_train dataloader.train.total_batch_size=2 \\
      model.num_classes=5 train.max_iter=200
Writes architecture.yaml and searched.yaml, a LazyConfig to train with lazyconfig_train_net.py.
"""


class AlphaSteps(HookBase):
    """After each weight step from iteration `start` on, Adam's step on α with other images."""

    def __init__(self, model, loader, start: int, rate: float):
        self.model, self.batches, self.start = model, iter(loader), start
        alphas = nats.alpha_parameters(model)
        for alpha in alphas:
            alpha.requires_grad_(False)  # no weight step changes it
        self.optimizer = torch.optim.Adam(alphas, lr=rate, weight_decay=1e-5)

    def after_step(self):
        if self.trainer.iter >= self.start:
            with nats.alpha_training(self.model):
                self.optimizer.zero_grad()
                sum(self.model(next(self.batches)).values()).backward()
                self.optimizer.step()


def search(cfg, args: argparse.Namespace) -> nats.Architecture:
    model = instantiate(cfg.model).to(cfg.train.device)
    nats.to_supernet(model.backbone, nats.SearchSpace(args.space, num_groups=args.groups))
    DetectionCheckpointer(model).load(cfg.train.init_checkpoint)
    train = instantiate(cfg.dataloader.train)
    cfg.dataloader.train.dataset.names = args.calibration
    calibration = instantiate(cfg.dataloader.train)
    # first of all, so that the weights' optimizer passes α over
    alpha_steps = AlphaSteps(model, calibration, int(0.4 * cfg.train.max_iter), args.alpha_rate)
    cfg.optimizer.params.model = model
    trainer = SimpleTrainer(model.train(), train, instantiate(cfg.optimizer))
    writer = hooks.PeriodicWriter([CommonMetricPrinter(cfg.train.max_iter)], period=20)
    schedule = hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier))
    trainer.register_hooks([alpha_steps, hooks.IterationTimer(), schedule, writer])
    trainer.train(0, cfg.train.max_iter)
    return nats.Architecture.decode(model, "voted")


def main(args: argparse.Namespace) -> None:
    cfg = LazyConfig.apply_overrides(model_zoo.get_config(args.config), args.overrides)
    if not torch.cuda.is_available():
        cfg.train.device = "cpu"
    os.makedirs(args.output, exist_ok=True)
    architecture = os.path.abspath(f"{args.output}/architecture.yaml")
    search(cfg, args).save(architecture)
    result = LazyConfig.apply_overrides(model_zoo.get_config(args.config), args.overrides)
    searched = L(nats.apply_architecture)(backbone=result.model.backbone, architecture=architecture)
    result.model.backbone = searched
    instantiate(result.model)  # it fits
    LazyConfig.save(result, f"{args.output}/searched.yaml")
    print(f"wrote {args.output}/searched.yaml")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="name of a LazyConfig in the model zoo")
    parser.add_argument("--calibration", required=True, help="data set to train α on")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--space", default="C", help="genotypes: A, B or C (%(default)s)")
    parser.add_argument("--groups", type=int, default=16, help="channel groups (%(default)s)")
    parser.add_argument("--alpha-rate", type=float, default=0.01, help="Adam's (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="key=value, such as train.max_iter=100")
    main(parser.parse_args())
