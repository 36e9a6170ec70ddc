"""The families of operations, a folder each, and an operation a package in it.

Of an operation `api` is public, `reference` the specification, `function` the operators and gradients, and
`triton_kernels` what runs on GPUs; `csrc/` has the native kernels under the same names.
"""
