"""Triton kernels for CUDA. Each file holds one; they are imported only where they run."""
