"""Train or evaluate a detector: a plain one, or one with a searched backbone."""

from typing import Optional

from ..engine.launch import run_script, setup, train_or_evaluate
from ..engine.resumable import ResumableTrainer

EPILOG = """
examples:
  retrain what a search found:
    $ %(prog)s --num-gpus 8 --config-file output/search/retrain.yaml
  the plain detector beside it:
    $ %(prog)s --num-gpus 8 --config-file configs/retrain/faster_rcnn_R_50_FPN.yaml
  go on after a kill; evaluate only:
    $ %(prog)s --config-file ... --resume
    $ %(prog)s --config-file ... --eval-only MODEL.WEIGHTS output/model_final.pth

Any Detectron2 config works, and the name of a zoo config too. With MODEL.DEVICE cpu, --num-gpus 2
runs two processes on the CPU.
exit status: 0 done, 2 bad input, 75 stopped on request (go on with --resume), 1 failed.
"""


def main(args):
    return train_or_evaluate(ResumableTrainer, setup(args), args)


def run(prog: Optional[str] = None) -> None:
    """The command; `prog` is its name in the help."""
    run_script(main, __doc__, EPILOG, prog)


if __name__ == "__main__":  # for torchrun
    run()
