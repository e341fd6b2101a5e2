"""The project's config keys, and how configs are read and compared."""

from .keys import add_nats_config
from .reading import load_config

__all__ = ["add_nats_config", "load_config"]
