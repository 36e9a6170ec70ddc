"""What the Triton kernels of maps share: tiles of all heads, and a workspace for the maps of a few images."""
