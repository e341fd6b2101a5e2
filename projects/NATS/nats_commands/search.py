"""Search which dilation each channel group of a detector's backbone should use."""

from .train import STATUS, add_arguments

__all__ = ["EXAMPLES", "add_arguments"]

EXAMPLES = """
examples:
  the paper's search, eight GPUs of one machine:
    $ nats-search --num-gpus 8 --config-file configs/search/faster_rcnn_R_50_FPN.yaml
  resume after a kill:
    $ nats-search --num-gpus 8 --config-file ... --resume

The search writes checkpoints, architecture.yaml (the result) and retrain.yaml (a plain config for
nats-train) to OUTPUT_DIR.
""" + STATUS
