"""Triton kernels. Importing a module of this package imports Triton; `backends/triton_.py` does so on first use.

- `logits`: device functions that all kernels share.
- `rows`, `topk`: row passes over a tile of products in memory, one program per row.
- `product`, `fused`: kernels that compute the products with `tl.dot` and never store a logit.
- `hopper`: the same in Gluon, persistent, for compute capability 9.0.
"""
