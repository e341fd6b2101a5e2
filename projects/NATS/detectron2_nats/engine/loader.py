"""Training batches that depend only on a seed and a position, so that a run can be resumed exactly.

The main process decides which images form batch k before any image is read, from the sizes in the
annotations. An image's augmentation is seeded by its position. The batches are therefore the same
for any number of loader processes, and after any resume.
"""

import functools
import itertools
import logging
import multiprocessing
import os
import select
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch.utils.data import DataLoader, Dataset

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data import DatasetMapper as ImageMapper
from detectron2.data import build_detection_test_loader
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
    hold_signals,
    ignore_signals,
    kill,
    kill_children_at_exit,
    stop_requested,
)

logger = logging.getLogger(__name__)

_CAN_FORK = sys.platform.startswith("linux")


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
                sample, bad = _mapped(self.mapper, self.records[index % len(self.records)])
            if not bad:
                return sample, unreadable
            unreadable += bad
        name, reason = unreadable[0]
        raise NATSError(
            f"{self.MAX_TRIES} images in a row cannot be used, the first {name}: {reason}"
        )


def _mapped(mapper: Callable[[dict], Any], record: dict):
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
    """An endless iterable of this rank's batches (lists of mapped samples).

    Args:
        dicts: Detectron2's dataset dicts, with `width` and `height` if images are grouped. The list
            is not kept.
        mapper: dataset dict → sample.
        make_sampler: called with `seed`; returns an endless iterable of this rank's indices, the
            same for the same seed.
        batch_size: number of samples in this rank's batch.
        aspect_ratio_grouping: put only wide or only tall images into a batch.
        num_workers: number of loader processes; 0 reads in this process.
        seed: of order and augmentation; the same on all ranks.
        max_bad_share: the share of the data set's images that may be unreadable.
    """

    def __init__(
        self,
        dicts: List[dict],
        mapper: Callable[[dict], Any],
        make_sampler: Callable[..., Iterator[int]],
        *,
        batch_size: int,
        aspect_ratio_grouping: bool,
        num_workers: int,
        seed: int,
        max_bad_share: float,
    ):
        self.mapper, self.make_sampler = mapper, make_sampler
        self.files: List[str] = [record["file_name"] for record in dicts]
        self.digest = digest(dicts)
        self._wide: List[bool] = []
        if aspect_ratio_grouping:
            self._wide = [record["width"] > record["height"] for record in dicts]
        # One block of bytes. Loader processes share a list of dicts only at first: reading a dict
        # changes its reference count, which copies its memory page, until each has copied them all.
        self._records = DatasetFromList(dicts, copy=False, serialize=True)
        self.batch_size = batch_size
        self.num_workers, self.seed, self.max_bad_share = num_workers, seed, max_bad_share
        self.batches = 0  # handed out so far
        self.bad_files: Dict[str, str] = {}  # file name → why it could not be read

    def state_dict(self) -> Dict[str, Any]:
        return {
            "seed": self.seed,
            "batches": self.batches,
            "bad_files": dict(self.bad_files),
            "images": len(self.files),
            "digest": self.digest,
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Restore the position. It takes effect at the next ``iter()``."""
        self.seed, self.batches = state["seed"], state["batches"]
        self.bad_files = dict(state["bad_files"])

    def _batch_items(self) -> Iterator[List[Tuple[int, int]]]:
        rank, world_size = comm.get_rank(), comm.get_world_size()
        buckets: List[List[Tuple[int, int]]] = [[], []]
        for step, index in enumerate(self.make_sampler(seed=self.seed)):
            bucket = buckets[1 if self._wide and not self._wide[index] else 0]
            bucket.append((step * world_size + rank, index))
            if len(bucket) == self.batch_size:
                yield list(bucket)
                bucket.clear()

    def _loader(self) -> DataLoader:
        return DataLoader(
            _Samples(self._records, self.mapper, self.seed),
            batch_sampler=itertools.islice(self._batch_items(), self.batches, None),
            num_workers=self.num_workers,
            collate_fn=list,
            # Its own generator: else the global random state depends on when loaders start
            generator=torch.Generator(),
            multiprocessing_context=_worker_context(self.num_workers),
        )

    def __iter__(self) -> Iterator[List[Any]]:
        for batch in _start(self._loader):
            self.batches += 1
            _note_bad(batch, self.bad_files, len(self.files), self.max_bad_share)
            yield [sample for sample, _ in batch]

    def merge_bad_files(self) -> None:
        """Tell all ranks which files any rank has found unreadable."""
        for found in comm.all_gather(self.bad_files):
            self.bad_files.update(found)


def _note_bad(batch: List[tuple], bad_files: Dict[str, str], total: int, max_share: float) -> None:
    """Add a batch's unreadable images to `bad_files`, with one warning for each.

    Raises:
        NATSError: they are more than `max_share` of all `total` images.
    """
    for file_name, reason in itertools.chain(*(unreadable for _, unreadable in batch)):
        if file_name in bad_files:
            continue
        bad_files[file_name] = reason
        logger.warning(
            f"skipping image {file_name}, which cannot be read ({len(bad_files)} of {total} so "
            f"far): {reason}"
        )
        if len(bad_files) > max_share * total:
            raise NATSError(
                f"{len(bad_files)} of {total} images cannot be read, the last {file_name} "
                f"({reason}): repair the data, or raise RUN.MAX_BAD_DATA ({max_share})"
            )


class EvaluationLoader:
    """Detectron2's loader of test images, which also survives unreadable images and stops.

    Unreadable images are left out, with a warning for each. Their objects count as missed. If a
    stop has been requested, the process exits with status 75 before the next batch, because an
    evaluation can take longer than a scheduler waits.

    Raises:
        NATSError: while iterating, if more than ``RUN.MAX_BAD_DATA`` of the images are unreadable.
    """

    def __init__(self, cfg: CfgNode, dataset_name: str):
        mapper = functools.partial(_mapped, ImageMapper(cfg, is_train=False))
        self.loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        self.loader.multiprocessing_context = _worker_context(self.loader.num_workers)
        self.max_bad_share = cfg.RUN.MAX_BAD_DATA

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[List[dict]]:
        bad_files: Dict[str, str] = {}
        for batch in _start(lambda: self.loader):
            _exit_if_requested()
            _note_bad(batch, bad_files, len(self.loader.dataset), self.max_bad_share)
            readable = [sample for sample, unreadable in batch if not unreadable]
            if readable:
                yield readable
        _exit_if_requested()  # computing the AP can take minutes too


def _exit_if_requested() -> None:
    """Exit if a stop was requested. Each rank does so on its own, at any image."""
    if stop_requested():
        logger.info("stopped on request, in the middle of an evaluation")
        raise SystemExit(STOPPED_EXIT_CODE)


_PATIENCE_S = (30, 60, 120)
"""How long a try waits for its loader processes. They take well under a second."""


def _start(make_loader: Callable[[], DataLoader]) -> Iterator[Any]:
    """``iter(make_loader())``, after all its processes have said that they run.

    A forked process may wait for ever before its first line: for a lock that another thread held at
    the fork. In CPython 3.10.13 gloo's threads do it (python/cpython#112275). Unnoticed, the
    run would wait as long. Such processes are killed, and all are started anew.
    """
    kill_children_at_exit()
    for seconds in _PATIENCE_S:
        loader = make_loader()
        reader, writer = os.pipe()
        loader.worker_init_fn = functools.partial(_begin_worker, reader, writer)
        others = multiprocessing.active_children()
        with hold_signals():
            iterator = iter(loader)
        os.close(writer)
        # elsewhere the processes are spawned: they inherit neither the pipe nor any lock
        forked = loader.num_workers if _CAN_FORK else 0
        started = _count_started(reader, forked, seconds)
        os.close(reader)
        if started == forked:
            return iterator
        logger.warning(
            f"{forked - started} of {forked} loader processes have not started: "
            "starting them anew"
        )
        kill([process for process in multiprocessing.active_children() if process not in others])
        del iterator
    raise RuntimeError("the loader processes do not start: set DATALOADER.NUM_WORKERS 0")


def _begin_worker(reader: int, writer: int, worker_id: int) -> None:
    """The first line of a loader process."""
    ignore_signals()
    if _CAN_FORK:
        os.write(writer, b".")
        os.close(reader)
        os.close(writer)


def _count_started(reader: int, processes: int, seconds: float) -> int:
    """How many have begun: all of them, or fewer after so many seconds or if one has died."""
    started, deadline = 0, time.monotonic() + seconds
    while started < processes:
        ready, _, _ = select.select([reader], [], [], max(0, deadline - time.monotonic()))
        begun = os.read(reader, processes) if ready else b""
        if not begun:
            break
        started += len(begun)
    return started


def _worker_context(num_workers: int) -> Optional[str]:
    """A spawned rank would spawn its loaders too: slow, and a signal meanwhile hangs the rank."""
    return "fork" if num_workers and _CAN_FORK else None


def dataset_dicts(cfg: CfgNode, names: Sequence[str]) -> List[dict]:
    """The dataset dicts of `names`, filtered as the config says for training."""
    keypoint_head = cfg.MODEL.ROI_KEYPOINT_HEAD
    try:
        return get_detection_dataset_dicts(
            names,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoint_head.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except (AssertionError, OSError) as error:  # an empty data set; proposals that are not there
        raise NATSError(f"data sets {', '.join(names)}: {error}") from None


def _random_subset(size: int, ratio: float, *, seed: int) -> RandomSubsetTrainingSampler:
    return RandomSubsetTrainingSampler(size, ratio, seed_shuffle=seed, seed_subset=seed)


def build_resumable_loader(
    cfg: CfgNode, dicts: List[dict], *, total_batch_size: int, seed: int
) -> ResumableLoader:
    """A training loader over `dicts`, as ``cfg.DATALOADER`` and ``cfg.INPUT`` describe it.

    Args:
        total_batch_size: images per batch, on all ranks together.
        seed: of order and augmentation; the same on all ranks.
    """
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise NATSError(
            f"a batch of {total_batch_size} images cannot be shared by {world_size} processes: "
            "choose a multiple (SOLVER.IMS_PER_BATCH, SEARCH.ALPHA_IMS_PER_BATCH)"
        )
    # A sampler must not keep the list: see ResumableLoader
    name, size = cfg.DATALOADER.SAMPLER_TRAIN, len(dicts)
    if name == "TrainingSampler":
        make_sampler = functools.partial(TrainingSampler, size)
    elif name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        make_sampler = functools.partial(RepeatFactorTrainingSampler, factors)
    elif name == "RandomSubsetTrainingSampler":
        make_sampler = functools.partial(_random_subset, size, cfg.DATALOADER.RANDOM_SUBSET_RATIO)
        if not int(size * cfg.DATALOADER.RANDOM_SUBSET_RATIO):
            raise NATSError(
                f"DATALOADER.RANDOM_SUBSET_RATIO {cfg.DATALOADER.RANDOM_SUBSET_RATIO} of {size} "
                "images leaves none: raise it"
            )
    else:
        raise NATSError(
            f"DATALOADER.SAMPLER_TRAIN {name!r} cannot be resumed exactly: use TrainingSampler, "
            "RepeatFactorTrainingSampler or RandomSubsetTrainingSampler"
        )
    return ResumableLoader(
        dicts,
        ImageMapper(cfg, is_train=True),
        make_sampler,
        batch_size=total_batch_size // world_size,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=seed,
        max_bad_share=cfg.RUN.MAX_BAD_DATA,
    )
