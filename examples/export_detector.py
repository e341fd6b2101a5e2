#!/usr/bin/env python
"""Export a searched detector to TorchScript, by tracing, and to ONNX.

Each file is tested on an image of another size than it was made with, and compared with the
detector. ONNX needs the packages of requirements-optional.txt. It uses torch's TorchScript exporter
(dynamo=False), because the newer one can export the backbone but not the detector, whose proposals
depend on the data.
"""

import argparse
import os
import warnings
from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2_nats.config import load_config
from detectron2_nats.engine.checkpoint import SafeCheckpointer

EPILOG = """
example:
  $ python examples/export_detector.py --config-file output/search/retrain.yaml \\
      --weights output/search/retrain/model_final.pth --output output/exported
This writes traced.ts, detector.onnx and backbone.onnx.
"""

_OPSET = 17


class _Backbone(nn.Module):
    """A backbone that returns its features as a tuple: ONNX has no dicts."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.names = list(backbone.output_shape())

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        features = self.backbone(images)
        return tuple(features[name] for name in self.names)


def traceable(model: nn.Module, image: Tensor) -> TracingAdapter:
    """The detector as a function of one image (3, H, W) that returns a tuple of tensors."""

    def inference(model, inputs):
        # without pasting masks into the image, which tracing cannot follow
        return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]

    is_rcnn = isinstance(model, GeneralizedRCNN)
    return TracingAdapter(model, [{"image": image}], inference if is_rcnn else None).eval()


def trace(model: nn.Module, image: Tensor) -> torch.jit.ScriptModule:
    return torch.jit.trace(traceable(model, image), (image,), check_trace=False)


def detector_to_onnx(model: nn.Module, image: Tensor, path: str) -> None:
    """Input "image": (3, H, W), with free H and W. Outputs: the tensors of :func:`traceable`."""
    axes = {"image": {1: "height", 2: "width"}}
    _to_onnx(traceable(model, image), image, path, ["image"], None, axes)


def backbone_to_onnx(backbone: nn.Module, images: Tensor, path: str) -> None:
    """Input "images": (B, 3, H, W), with free B, H and W. Outputs: the features, by name."""
    module = _Backbone(backbone).eval()
    free = {0: "batch", 2: "height", 3: "width"}
    _to_onnx(module, images, path, ["images"], module.names, {"images": free})


def _to_onnx(module, example, path, inputs, outputs, axes) -> None:
    torch.onnx.export(
        module,
        (example,),
        path,
        input_names=inputs,
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=_OPSET,
        dynamo=False,
    )


def run_onnx(path: str, *inputs: Tensor) -> List[Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    values = session.run(None, {name: x.numpy() for name, x in zip(names, inputs)})
    return [torch.from_numpy(value) for value in values]


def difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference relative to the largest value of its tensor; inf if shapes differ."""
    if [tuple(a.shape) for a in actual] != [tuple(e.shape) for e in expected]:
        return float("inf")
    pairs = [(a.double(), e.double()) for a, e in zip(actual, expected) if e.numel()]
    return max((float((a - e).abs().max() / e.abs().max().clamp(min=1e-6)) for a, e in pairs))


@torch.no_grad()
def export_all(model: nn.Module, folder: str, size: Tuple[int, int]) -> Dict[str, float]:
    """Write all files; returns path → :func:`difference` to the detector on another image.

    Args:
        model: a detector in eval mode, on the CPU.
        size: (height, width) of the example image, multiples of 32. The files take any size.
    """
    os.makedirs(folder, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    height, width = size
    image = torch.rand(3, height, width, generator=generator) * 255
    other = torch.rand(3, width, height + 64, generator=generator) * 255
    expected = traceable(model, other)(other)
    differences = {}

    path = os.path.join(folder, "traced.ts")
    torch.jit.save(trace(model, image), path)
    differences[path] = difference(torch.jit.load(path)(other), expected)

    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        print(f"ONNX skipped: {error}; install requirements-optional.txt")
        return differences

    path = os.path.join(folder, "detector.onnx")
    detector_to_onnx(model, image, path)
    differences[path] = difference(run_onnx(path, other), expected)

    path = os.path.join(folder, "backbone.onnx")
    images = torch.randn(1, 3, height, width, generator=generator)
    backbone_to_onnx(model.backbone, images, path)
    images = torch.randn(2, 3, width, height, generator=generator)
    features = _Backbone(model.backbone)(images)
    differences[path] = difference(run_onnx(path, images), features)
    return differences


def main(args: argparse.Namespace) -> None:
    cfg = load_config(args.config_file)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    SafeCheckpointer(model, "").load(args.weights, checkpointables=[])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that both exporters are old
        differences = export_all(model, args.output, (256, 320))
    for path, value in differences.items():
        print(f"wrote {path} (largest relative difference to the detector {value:.1e})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="config of a frozen detector")
    parser.add_argument("--weights", required=True, help="its weights")
    parser.add_argument("--output", required=True, help="folder to write")
    main(parser.parse_args())
