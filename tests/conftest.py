"""For all tests."""

import os

# The tensors are tiny: more threads cost more than they give, above all on a busy machine. Read by
# torch when it is first imported, also in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
