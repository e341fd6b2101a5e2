"""The package's data sets in Detectron2's catalogue, and its files under ``nats://`` names."""

import os
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathHandler, PathManager

from ..errors import NATSError
from .sets import SETS, WEIGHTS, ensure_embedded_dataset

REGISTERS = "nats_registers"
"""Pages of notaries' registers with boxes of table columns, shipped as files and read in place.

Real images, by LECTAUREP, Archives nationales and Inria, CC BY 4.0: see the LICENSE beside them.
"""

SHIPPED = (WEIGHTS.name, "half_r50_res3.pth", REGISTERS)
"""Files and folders beside this one.

``half_r50_res3.pth`` is stem, res2 and res3 of Yahoo's half-width ResNet-50, with its convs in half
precision. See its LICENSE.
"""


class NATSPathHandler(PathHandler):
    """Files of this package under ``nats://`` names, for Detectron2's PathManager.

    ``nats://NAME`` is one of :data:`SHIPPED`. ``nats://NAME/...`` is a file in the folder of the
    data set NAME; one of :data:`.sets.SETS` is drawn when such a name is first resolved.
    """

    PREFIX = "nats://"

    def _get_supported_prefixes(self):
        return [self.PREFIX]

    def _get_local_path(self, path, force=False, **kwargs):
        top, _, rest = path[len(self.PREFIX) :].partition("/")
        if top in SHIPPED:
            return os.path.join(Path(__file__).parent, top, rest).rstrip("/")
        if top in SETS:
            return os.path.join(ensure_embedded_dataset(top), rest)
        known = [name if name.endswith(".pth") else f"{name}/..." for name in (*SHIPPED, *SETS)]
        known = ", ".join(f"{self.PREFIX}{name}" for name in known)
        raise NATSError(f"Unknown name {path}. There are {known}")

    def _isdir(self, path, **kwargs):
        return os.path.isdir(self._get_local_path(path))

    def _isfile(self, path, **kwargs):
        return os.path.isfile(self._get_local_path(path))


def register_embedded_datasets() -> None:
    """Register ``NAME_SPLIT`` of each data set of the package, and ``nats://`` names. Repeatable.

    Nothing is drawn yet. The metadata uses ``nats://`` names, which Detectron2 resolves wherever it
    reads a file. So an evaluator may be built before any data is loaded.
    """
    PathManager.register_handler(NATSPathHandler(), allow_override=True)
    for split in ("train", "calibration", "val"):
        _register(REGISTERS, split, ("column",))
    for folder, dataset in SETS.items():
        for split in dataset.splits:
            _register(folder, split, dataset.classes)


def _register(folder, split, classes):
    name = f"{folder}_{split}"
    if name in DatasetCatalog:
        return
    json_file = f"{NATSPathHandler.PREFIX}{folder}/instances_{split}.json"
    image_root = f"{NATSPathHandler.PREFIX}{folder}/{split}"
    DatasetCatalog.register(name, partial(_load, name, json_file, image_root))
    MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="coco",
        thing_classes=list(classes),
        thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(classes))},
    )


def _load(name, json_file, image_root):
    # Real paths for the images: loader processes can then read them without this handler.
    return load_coco_json(json_file, PathManager.get_local_path(image_root), name)
