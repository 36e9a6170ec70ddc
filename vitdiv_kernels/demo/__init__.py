"""Three small ViTs on handwritten digits: `python -m vitdiv_kernels.demo --help`."""
