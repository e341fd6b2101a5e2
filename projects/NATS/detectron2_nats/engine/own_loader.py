"""The training loader of a subclass, which no position can be restored in."""

import logging
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence

from detectron2.config import CfgNode

from ..data.annotations import digest
from .loader import dataset_dicts

logger = logging.getLogger(__name__)


class OwnLoader:
    """What ``build_train_loader`` of a subclass gives, in place of a :class:`.ResumableLoader`.

    Args:
        build: the subclass's method. Its config names the data sets in ``DATASETS.TRAIN``, also
            those that train α.
        names, total_batch_size, seed: see :class:`.ResumableLoader`.
    """

    def __init__(
        self,
        build: Callable[[CfgNode], Iterable[List[dict]]],
        cfg: CfgNode,
        names: Sequence[str],
        *,
        total_batch_size: int,
        seed: int,
    ):
        logger.warning(
            "build_train_loader is overridden: a resumed run begins its data anew, and is not the "
            "same bit for bit"
        )
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TRAIN, cfg.SOLVER.IMS_PER_BATCH = tuple(names), total_batch_size
        dicts = dataset_dicts(cfg, names)
        self.files: List[str] = [record["file_name"] for record in dicts]
        self.digest, self.seed = digest(dicts), seed
        self._loader = build(cfg)

    def state_dict(self) -> Dict[str, Any]:
        return {"seed": self.seed, "digest": self.digest}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.seed = state["seed"]

    def __iter__(self) -> Iterator[List[dict]]:
        yield from self._loader
