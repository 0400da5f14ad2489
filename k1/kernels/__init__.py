"""Triton kernels, one file each. Import them only where a CUDA device is in use.

They compute in float32, store in the dtype of their tensors, and do nothing that a CUDA graph could
not record. Which block is whose child enters as tensors, so one compiled kernel serves every tree.
"""

from importlib.util import find_spec

AVAILABLE = find_spec("triton") is not None
"""Whether the kernels of this package can be imported."""
