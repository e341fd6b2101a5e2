"""For all tests."""

import os
from pathlib import Path

# The tensors are tiny: more threads cost more than they give, above all on a busy machine. Read by
# torch when it is first imported, also in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

# Where drawn data sets are kept: else a test in a folder of its own draws them anew.
os.environ.setdefault("DETECTRON2_DATASETS", str(Path(__file__).resolve().parents[1] / "datasets"))
