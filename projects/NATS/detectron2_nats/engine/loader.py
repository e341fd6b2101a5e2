"""Training batches that depend only on a seed and a position, so that a run can be resumed exactly.

The main process decides which images form batch k before any image is read, from the sizes in the
annotations. An image's augmentation is seeded by its position. The batches are therefore the same
for any number of loader processes, and after any resume.
"""

import functools
import itertools
import logging
import multiprocessing
from typing import Any, Callable, Dict, Iterable, Iterator, List, Sequence, Set, Tuple

import torch
from torch.utils.data import DataLoader, Dataset

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_test_loader
from detectron2.data import detection_utils as utils
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm

from ..data.annotations import digest
from ..errors import NATSError, one_line
from .determinism import preserved_random_states
from .processes import (
    STOPPED_EXIT_CODE,
    held_signals,
    kill,
    kill_children_at_exit,
    stop_requested,
)
from .weights import check_proposals

logger = logging.getLogger(__name__)


class _Samples(Dataset):
    """(position, index) → (mapped sample, [(file name, reason) that could not be read])."""

    MAX_TRIES = 20

    def __init__(self, records: Dataset, mapper: Callable[[dict], Any], seed: int):
        self.records, self.mapper, self.seed = records, mapper, seed

    def __getitem__(self, item: Tuple[int, int]):
        position, index = item
        unreadable = []
        # A bad image is replaced by the next one: the choice must not depend on the loader process
        for index in range(index, index + self.MAX_TRIES):
            with preserved_random_states((self.seed, position)):
                sample, bad = mapped(self.mapper, self.records[index % len(self.records)])
            if not bad:
                return sample, unreadable
            unreadable += bad
        name, reason = unreadable[0]
        raise NATSError(
            f"{self.MAX_TRIES} images in a row cannot be used, the first {name}: {reason}"
        )


def mapped(mapper: Callable[[dict], Any], record: dict) -> Tuple[Any, List[Tuple[str, str]]]:
    """(mapped sample, []), or (None, [(file name, reason)]) where the file cannot be read."""
    try:
        return mapper(record), []
    except Exception as error:
        if not _is_bad_image(record, error):
            return mapper(record), []  # a disk that failed once; the code's own faults come again
        return None, [(record["file_name"], one_line(error))]


def _is_bad_image(record: dict, error: Exception) -> bool:
    """Whether the file is at fault, and not the code that handles it."""
    if isinstance(error, utils.SizeMismatchError):
        return True
    try:
        utils.read_image(record["file_name"], "RGB")
    except Exception:
        return True
    return False


class ResumableLoader:
    """An endless iterable of this rank's batches (lists of mapped samples) for training.

    What they are, ``cfg.DATALOADER`` and ``cfg.INPUT`` say.

    Args:
        names: of the data sets.
        total_batch_size: images per batch, on all ranks together.
        seed: of order and augmentation; the same on all ranks.
    """

    def __init__(self, cfg: CfgNode, names: Sequence[str], *, total_batch_size: int, seed: int):
        world_size = comm.get_world_size()
        if total_batch_size < 1 or total_batch_size % world_size:
            raise NATSError(
                f"a batch of {total_batch_size} images cannot be shared by {world_size} processes: "
                "choose a multiple (SOLVER.IMS_PER_BATCH, SEARCH.ALPHA_IMS_PER_BATCH)"
            )
        dicts = dataset_dicts(cfg, names)
        self.names = names
        self.files: List[str] = [record["file_name"] for record in dicts]
        self.digest = digest(dicts)
        self._wide: List[bool] = []  # only wide or only tall images come into a batch
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            if not all("width" in record and "height" in record for record in dicts):
                raise NATSError(
                    f"{', '.join(names)}: records without width and height: add them, or set "
                    "DATALOADER.ASPECT_RATIO_GROUPING False"
                )
            self._wide = [record["width"] > record["height"] for record in dicts]
        # One block of bytes. Loader processes share a list of dicts only at first: reading a dict
        # changes its reference count, which copies its memory page, until each has copied them all.
        self._records = DatasetFromList(dicts, copy=False, serialize=True)
        self._mapper = DatasetMapper(cfg, is_train=True)
        self._make_sampler = _sampler_maker(cfg, dicts)
        self.batch_size = total_batch_size // world_size  # of this rank
        self.num_workers, self.seed = cfg.DATALOADER.NUM_WORKERS, seed
        self.batches = 0  # handed out so far
        self.bad_files: Set[str] = set()
        self.max_bad_share = cfg.RUN.MAX_BAD_DATA

    def state_dict(self) -> Dict[str, Any]:
        images = len(self.files)
        return dict(seed=self.seed, batches=self.batches, images=images, digest=self.digest)

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore the position. It takes effect at the next ``iter()``.

        Raises:
            NATSError: it is a position in other data.
        """
        if state["digest"] != self.digest:
            raise NATSError(
                f"the checkpoint is of a run on other data: {', '.join(self.names)} had "
                f"{state['images']} images (digest {state['digest']}), it has {len(self.files)} "
                f"({self.digest}). Restore the annotation file, or choose another OUTPUT_DIR"
            )
        self.seed, self.batches = state["seed"], state["batches"]

    def _batch_items(self) -> Iterator[List[Tuple[int, int]]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        buckets: List[List[Tuple[int, int]]] = [[], []]
        for step, index in enumerate(self._make_sampler(seed=self.seed)):
            bucket = buckets[1 if self._wide and not self._wide[index] else 0]
            bucket.append((step * world_size + rank, index))
            if len(bucket) == self.batch_size:
                yield list(bucket)
                bucket.clear()

    def _make_loader(self) -> DataLoader:
        return DataLoader(
            _Samples(self._records, self._mapper, self.seed),
            batch_sampler=itertools.islice(self._batch_items(), self.batches, None),
            num_workers=self.num_workers,
            collate_fn=list,
            # Its own generator: else the global random state depends on when loaders start
            generator=torch.Generator(),
            multiprocessing_context="fork" if self.num_workers else None,
        )

    def __iter__(self) -> Iterator[List[Any]]:
        for batch in _start(self._make_loader):
            self.batches += 1
            self._note_bad(itertools.chain(*(unreadable for _, unreadable in batch)))
            yield [sample for sample, _ in batch]

    def _note_bad(self, unreadable: Iterable[Tuple[str, str]]) -> None:
        """Warn of each image once.

        Args:
            unreadable: (file name, reason) of images that were replaced.

        Raises:
            NATSError: they are more than ``RUN.MAX_BAD_DATA`` of all.
        """
        total = len(self.files)
        for name, reason in unreadable:
            if name in self.bad_files:
                continue
            self.bad_files.add(name)
            count = len(self.bad_files)
            logger.warning(
                f"skipping image {name}, which cannot be read ({count} of {total} so far): {reason}"
            )
            if count > self.max_bad_share * total:
                raise NATSError(
                    f"{count} of {total} images cannot be read, the last {name} ({reason}): "
                    f"repair the data, or raise RUN.MAX_BAD_DATA ({self.max_bad_share})"
                )


class EvaluationLoader:
    """Detectron2's loader of test images, which can be stopped.

    If a stop has been requested, the process exits with status 75 before the next batch, because an
    evaluation can take longer than a scheduler waits.

    Raises:
        NATSError: while iterating, if an image cannot be read: without it the AP would be another.
    """

    def __init__(self, cfg: CfgNode, dataset_name: str):
        check_proposals(cfg, cfg.DATASETS.PROPOSAL_FILES_TEST)
        mapper = functools.partial(mapped, DatasetMapper(cfg, is_train=False))
        self.loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        self.loader.multiprocessing_context = "fork" if self.loader.num_workers else None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[List[dict]]:
        for batch in _start(lambda: self.loader):
            _exit_if_requested()
            for name, reason in itertools.chain(*(unreadable for _, unreadable in batch)):
                raise NATSError(f"test image {name} cannot be read: {reason}")
            yield [sample for sample, _ in batch]
        _exit_if_requested()  # computing the AP can take minutes too


def _exit_if_requested() -> None:
    """Exit if a stop was requested. Each rank does so on its own, at any image."""
    if stop_requested():
        logger.info("stopped on request, in the middle of an evaluation")
        raise SystemExit(STOPPED_EXIT_CODE)


_PATIENCE_S = 60.0
"""How long a loader process may take to start. It takes well under a second."""


def _start(make_loader: Callable[[], DataLoader]) -> Iterator[Any]:
    """``iter(make_loader())``, after all its processes have said that they run.

    They are forks, also of a spawned rank: spawning takes seconds for each. But a fork may wait for
    ever before its first line, for a lock that another thread held. In CPython 3.10.13 gloo's
    threads do it (python/cpython#112275). Then all are started anew.
    """
    kill_children_at_exit()
    for _ in range(3):
        loader, running = make_loader(), multiprocessing.get_context("fork").Semaphore(0)
        loader.worker_init_fn = lambda _: running.release()
        with held_signals():
            iterator = iter(loader)
        if all(running.acquire(timeout=_PATIENCE_S) for _ in range(loader.num_workers)):
            return iterator
        logger.warning("a loader process has not started: starting all of them anew")
        kill(iterator._workers)
    raise RuntimeError("the loader processes do not start: set DATALOADER.NUM_WORKERS 0")


def dataset_dicts(cfg: CfgNode, names: Sequence[str]) -> List[dict]:
    """The dataset dicts of `names`, filtered as the config says for training."""
    keypoint_head = cfg.MODEL.ROI_KEYPOINT_HEAD
    check_proposals(cfg, cfg.DATASETS.PROPOSAL_FILES_TRAIN)
    try:
        return get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoint_head.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except (AssertionError, OSError) as error:  # an empty data set; proposals that are not there
        raise NATSError(f"data sets {', '.join(names)}: {error}") from None


def _sampler_maker(cfg: CfgNode, dicts: List[dict]) -> Callable[..., Iterator[int]]:
    """A function of `seed` that makes the sampler; it must not keep the list of dicts."""
    name, size = cfg.DATALOADER.SAMPLER_TRAIN, len(dicts)
    if name == "TrainingSampler":
        return functools.partial(TrainingSampler, size)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return functools.partial(RepeatFactorTrainingSampler, factors)
    if name == "RandomSubsetTrainingSampler":
        ratio = cfg.DATALOADER.RANDOM_SUBSET_RATIO
        if not int(size * ratio):
            raise NATSError(
                f"DATALOADER.RANDOM_SUBSET_RATIO {ratio} of {size} images leaves none: raise it"
            )
        return lambda seed: RandomSubsetTrainingSampler(
            size, ratio, seed_shuffle=seed, seed_subset=seed
        )
    raise NATSError(
        f"DATALOADER.SAMPLER_TRAIN {name!r} cannot be resumed exactly: use TrainingSampler, "
        "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
    )
