"""The operations, a package each: `api` is public, `reference` the specification, `function` the kernels."""
