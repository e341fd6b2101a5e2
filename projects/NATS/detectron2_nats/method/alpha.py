"""Training α in any loop: which parameters it is, and a step that changes nothing else."""

import contextlib
import warnings
from typing import Iterator, List

from torch import nn

from ..errors import NATSError
from .forward_state import ForwardState
from .names import searched_layers


def alpha_parameters(model: nn.Module) -> List[nn.Parameter]:
    """α of each searched conv, (N, G), in the order of :func:`.searched_layers`.

    Args:
        model: what :func:`to_supernet` gave, or a detector around it.

    Raises:
        NATSError: it has no searched conv.
    """
    alphas = [conv.alpha for conv in searched_layers(model).values()]
    if not alphas:
        raise NATSError("no conv is searched: call to_supernet first")
    return alphas


@contextlib.contextmanager
def alpha_training(model: nn.Module) -> Iterator[None]:
    """In here a forward and backward pass is for α alone.

    α takes gradients, and the weights do not, so that backward ends at the first α. What a forward
    pass changes is put back at the end (:class:`ForwardState`): batch norms are not to learn from
    the images that α is trained on. Afterwards the weights take gradients as before, and α
    takes none until the next time. A warning names convs on which no loss depended.

    Args:
        model: what :func:`to_supernet` gave, or a detector around it; not wrapped for data
            parallelism, in which α's gradients are yours to average.
    """
    alphas = alpha_parameters(model)
    of_alpha = {id(alpha) for alpha in alphas}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in of_alpha]
    state = ForwardState(model)
    _take_gradients(weights, False)
    _take_gradients(alphas, True)
    try:
        yield
    finally:
        _take_gradients(alphas, False)
        _take_gradients(weights, True)
        state.restore()
    idle = untrained_convs(model)
    if 0 < len(idle) < len(alphas):  # all of them: no loss was computed
        warnings.warn(f"the loss did not depend on {', '.join(idle)}: α stays at (1, 1) there")


def untrained_convs(model: nn.Module) -> List[str]:
    """Searched convs whose α has no gradient: nothing moves it, and they decode to (1, 1)."""
    return [name for name, conv in searched_layers(model).items() if conv.alpha.grad is None]


def _take_gradients(parameters: List[nn.Parameter], on: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(on)
