"""jaxtl: transfer learning in JAX, with freezing that the trainer can see and exploit."""

from importlib import metadata

__version__ = metadata.version("jaxtl")
