"""The trainer of the reference ViT: `python -m vitdiv_kernels.train --help`."""
