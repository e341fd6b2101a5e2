"""The drawn data sets in Detectron2's catalogue, and their files under ``nats://`` names."""

import os
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.file_io import PathHandler, PathManager

from ..errors import NATSError
from .sets import SETS, WEIGHTS, ensure_embedded_dataset


class NATSPathHandler(PathHandler):
    """Files of this package under ``nats://`` names, for Detectron2's PathManager.

    ``nats://embedded_r50.pth`` is :data:`WEIGHTS`. ``nats://NAME/...`` is a file in the folder of
    the data set NAME, which is drawn when such a name is first resolved.
    """

    PREFIX = "nats://"

    def _get_supported_prefixes(self):
        return [self.PREFIX]

    def _get_local_path(self, path, force=False, **kwargs):
        name = path[len(self.PREFIX) :]
        if name == WEIGHTS.name:
            return str(WEIGHTS)
        top, _, rest = name.partition("/")
        if top in SETS:
            return os.path.join(ensure_embedded_dataset(top), rest)
        known = ", ".join(f"{self.PREFIX}{name}/..." for name in SETS)
        raise NATSError(f"Unknown name {path}. There are {self.PREFIX}{WEIGHTS.name}, {known}")

    def _exists(self, path, **kwargs):
        return os.path.exists(self._get_local_path(path))

    def _isdir(self, path, **kwargs):
        return os.path.isdir(self._get_local_path(path))

    def _isfile(self, path, **kwargs):
        return os.path.isfile(self._get_local_path(path))


def register_embedded_datasets() -> None:
    """Register ``NAME_SPLIT`` of each set in :data:`SETS`, and the ``nats://`` names. Repeatable.

    Nothing is drawn yet. The metadata uses ``nats://`` names, which Detectron2 resolves wherever it
    reads a file. So an evaluator may be built before any data is loaded.
    """
    PathManager.register_handler(NATSPathHandler(), allow_override=True)
    for folder, dataset in SETS.items():
        for split in dataset.splits:
            name = f"{folder}_{split}"
            if name in DatasetCatalog:
                continue
            json_file = f"{NATSPathHandler.PREFIX}{folder}/instances_{split}.json"
            image_root = f"{NATSPathHandler.PREFIX}{folder}/{split}"
            DatasetCatalog.register(name, partial(_load, name, json_file, image_root))
            MetadataCatalog.get(name).set(
                json_file=json_file,
                image_root=image_root,
                evaluator_type="coco",
                thing_classes=list(dataset.classes),
                thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(dataset.classes))},
            )


def _load(name, json_file, image_root):
    # Real paths for the images: loader processes can then read them without this handler.
    return load_coco_json(json_file, PathManager.get_local_path(image_root), name)
