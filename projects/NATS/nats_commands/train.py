"""Train or evaluate a detector: a plain one, or one with a searched backbone."""

import argparse

from .kinds import add_pairs

STATUS = """With MODEL.DEVICE cpu, --num-gpus 2 starts two processes on the CPU.
exit status: 0 done, 2 bad input, 75 stopped on request (continue with --resume), 1 failed.
"""

EXAMPLES = """
examples:
  retrain the result of a search:
    $ nats-train --num-gpus 8 --config-file output/search/retrain.yaml
  resume after a kill; evaluate only:
    $ nats-train --config-file ... --resume
    $ nats-train --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

--config-file takes any YAML config of Detectron2, or the name of one in its model zoo.
""" + STATUS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Detectron2's own options."""
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="a config: a path or a zoo name"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in OUTPUT_DIR"
    )
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS on DATASETS.TEST"
    )
    parser.add_argument(
        "--num-gpus", type=int, default=1, help="processes on this machine (%(default)s)"
    )
    parser.add_argument("--num-machines", type=int, default=1, help="in all (%(default)s)")
    parser.add_argument(
        "--machine-rank", type=int, default=0, help="of this machine, from 0 (%(default)s)"
    )
    parser.add_argument(
        "--dist-url",
        default="auto",
        help="where the processes meet, such as tcp://HOST:PORT; of one machine found by itself",
    )
    add_pairs(parser)
