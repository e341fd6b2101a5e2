"""Checkpoints that survive kills and full disks; pretrained weights that must fit the backbone."""

import glob
import logging
import os
import re
import zipfile
from typing import Any, Dict, List

import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from ..errors import NATSError, one_line
from ..files import write_atomically
from ..method.names import searchable
from .weights import fetched, from_torchvision, read_pkl

logger = logging.getLogger(__name__)


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with three differences.

    - A file is written under another name and then renamed. If the newest checkpoint is damaged, a
      warning names it and the one before it is used.
    - Files are read as tensors and plain types only, `.pkl` as NumPy arrays and plain types.
    - Pretrained weights that match nothing in the backbone are an error, not a warning.

    Attributes:
        from_torchvision: whether the file loaded last was one of torchvision's.
    """

    from_torchvision = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name.pth`` and make it the newest checkpoint."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        logger.info(f"Saving checkpoint to {path}")
        try:
            write_atomically(path, lambda file: torch.save(data, file))
            self.tag_last_checkpoint(f"{name}.pth")
        except (OSError, RuntimeError) as error:
            # while handling the OSError, torch's zip writer raises its own RuntimeError
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            if isinstance(cause, RuntimeError) and "PytorchStreamWriter" not in str(cause):
                raise  # not about the disk: a loader process has died
            raise NATSError(
                f"checkpoint {path} could not be written ({one_line(cause)}): make room and "
                f"continue with --resume from {self.get_checkpoint_file() or 'the start'}"
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_atomically(os.path.join(self.save_dir, "last_checkpoint"), last_filename_basename)

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` periodic checkpoints (the final one has no number)."""
        if self.save_to_disk:
            for path in self._periodic_checkpoints()[keep:]:
                os.unlink(path)

    def remove_unfinished(self) -> None:
        """Delete files that a killed process has left incomplete. No other process may write."""
        if self.save_to_disk:
            for path in glob.glob(os.path.join(glob.escape(self.save_dir), ".model_*.pth.*")):
                os.unlink(path)

    def _periodic_checkpoints(self) -> List[str]:
        """Paths, newest first."""
        names = os.listdir(self.save_dir) if os.path.isdir(self.save_dir) else []
        names = [name for name in names if re.fullmatch(r"model_\d+\.pth", name)]
        names.sort(key=lambda name: int(name[6:-4]), reverse=True)
        return [os.path.join(self.save_dir, name) for name in names]

    def find_usable_checkpoint(self) -> str:
        """The newest intact checkpoint, the same on all ranks; "" if there is no checkpoint."""
        found = ""
        if comm.is_main_process():
            candidates = [self.get_checkpoint_file(), *self._periodic_checkpoints()]
            for path in dict.fromkeys(filter(None, candidates)):
                fault = _damage(path)
                if not fault:
                    found = path
                    break
                logger.warning(f"checkpoint {path} is damaged ({fault}): trying the one before it")
        found, any_exists = comm.all_gather((found, self.has_checkpoint()))[0]
        if any_exists and not found:
            raise NATSError(f"no checkpoint in {self.save_dir} is intact: use another OUTPUT_DIR")
        return found

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """Load the newest intact checkpoint if `resume` and there is one, else the file `path`."""
        usable = self.find_usable_checkpoint() if resume else ""
        return self.load(usable) if usable else self.load(path, checkpointables=[])

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        if path and not os.path.isfile(fetched(path.split("?")[0])):
            raise NATSError(f"weights not found: {path} (MODEL.WEIGHTS)")
        self.loaded_from, self._missing = path, {name for name, _ in self.model.named_parameters()}
        return super().load(path, *args, **kwargs)

    def check_complete(self) -> None:
        """Check that the file loaded last had all trained weights of the detector.

        Raises:
            NATSError: it had not, as the weights of a classifier have not.
        """
        parameters = [name for name, _ in self.model.named_parameters()]
        missing = [name for name in parameters if name in self._missing]
        if missing:
            raise NATSError(
                f"{self.loaded_from or 'no file'}: {len(missing)} of the detector's "
                f"{len(parameters)} weights are missing, the first {missing[0]}: set MODEL.WEIGHTS "
                "to those of a trained detector"
            )

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if filename.endswith(".pkl"):
            return read_pkl(filename)
        try:
            loaded = super()._load_file(filename)
        except Exception as error:  # readers raise all kinds of errors for other files
            raise NATSError(f"{filename}: not readable as weights: {one_line(error)}") from None
        if "layer1.0.conv1.weight" in loaded["model"]:
            loaded["model"] = from_torchvision(loaded["model"])
            loaded["matching_heuristics"] = self.from_torchvision = True
        return loaded

    def _torch_load(self, filename: str) -> Dict[str, Any]:
        content = torch.load(filename, map_location="cpu", weights_only=True)
        if "model" not in content and isinstance(content.get("state_dict"), dict):
            return {"model": content["state_dict"]}  # mmdet's, timm's, PyTorch's ImageNet example
        return content

    def _load_model(self, checkpoint: Dict[str, Any]):
        given = list(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        unmatched = set(incompatible.missing_keys)
        unmatched.update(key for key, _, _ in incompatible.incorrect_shapes)
        self._missing = unmatched
        wanted = self._residual_weights()
        matched = [key for key in wanted if key not in unmatched]
        if wanted and not matched:
            raise NATSError(
                f"the pretrained weights match nothing in the backbone: it needs {wanted[0]} of "
                f"shape {tuple(self.model.state_dict()[wanted[0]].shape)}, the file contains "
                f"{', '.join(given[:3])}, …: check MODEL.WEIGHTS and MODEL.RESNETS"
            )
        if len(matched) < len(wanted):
            logger.warning(
                f"the weights match only {len(matched)} of {len(wanted)} convs of the backbone's "
                "residual stages"
            )
        return incompatible

    def _residual_weights(self) -> List[str]:
        """State-dict keys of the weights of the residual stages' 3×3 convs."""
        try:
            network = getattr(self.model, "backbone", self.model)
            convs = set(searchable(network, ["res[2-5].*"]).values())
        except NATSError:  # not a residual network: nothing to check
            return []
        return [f"{name}.weight" for name, m in self.model.named_modules() if m in convs]


def _damage(path: str) -> str:
    """What is wrong with a checkpoint file; "" if it is intact."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # reads everything and verifies the checksums
        if broken:
            return f"bad checksum of {broken}"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return ""
    except Exception as error:  # zipfile raises all kinds of errors for a damaged header
        return one_line(error)
