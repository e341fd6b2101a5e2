"""For all tests."""

import os

import pytest

# The tensors are tiny: more threads cost more than they give, above all on a busy machine. Read by
# torch when it is first imported, also in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One more than the cores: many tests wait for processes that they started."""
    return len(os.sched_getaffinity(0)) + 1
