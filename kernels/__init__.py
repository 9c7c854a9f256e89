"""Triton kernels of bark_fast, one module a family. Installed as `bark_fast.kernels`."""
