"""Train or evaluate a detector: a plain one, or one with a searched backbone."""

from typing import Optional

from ..engine.launch import run_script, setup, train_or_evaluate
from ..engine.resumable import ResumableTrainer
from ..errors import NATSError

EPILOG = """
examples:
  retrain the result of a search:
    $ %(prog)s --num-gpus 8 --config-file output/search/retrain.yaml
  train the plain detector, to compare:
    $ %(prog)s --num-gpus 8 --config-file configs/retrain/faster_rcnn_R_50_FPN.yaml
  resume after a kill; evaluate only:
    $ %(prog)s --config-file ... --resume
    $ %(prog)s --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

--config-file takes any Detectron2 config, or the name of one in Detectron2's model zoo. With
MODEL.DEVICE cpu, --num-gpus 2 starts two processes on the CPU.
exit status: 0 done, 2 bad input, 75 stopped on request (continue with --resume), 1 failed.
"""


def main(args):
    cfg = setup(args)
    if cfg.MODEL.BACKBONE.NAME == "build_nats_backbone" and not cfg.MODEL.NATS.ARCHITECTURE:
        raise NATSError(
            f"{args.config_file or 'the config'} describes a search, whose α would be trained like "
            "a weight: start it with search_net.py, or train the retrain.yaml that it writes"
        )
    return train_or_evaluate(ResumableTrainer, cfg, args)


def run(prog: Optional[str] = None) -> None:
    """The command; `prog` is its name in the help."""
    run_script(main, __doc__, EPILOG, prog)


if __name__ == "__main__":  # for torchrun
    run()
