"""Gated products: the kernels of `linear` on interleaved gate and up rows."""
