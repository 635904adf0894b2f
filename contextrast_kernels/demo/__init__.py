"""A small segmentation network trained with and without the Contextrast loss: `python -m contextrast_kernels demo`."""
