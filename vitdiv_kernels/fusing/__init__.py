"""`fuse` and `unfuse`: the attentions of other packages, in a model that exists, by fused kernels."""
