"""Fused Triton kernels of the losses. Nothing here is imported until an op needs it."""
