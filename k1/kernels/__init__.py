"""Triton kernels. Import a module of this package only where it is used: Triton may be absent."""
