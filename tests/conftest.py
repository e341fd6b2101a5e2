"""For all tests."""

import torch

# The tensors are tiny: more threads cost more than they give, above all on a busy machine.
torch.set_num_threads(1)
