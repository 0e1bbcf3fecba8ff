"""Triton kernels. Importing a module of this package imports Triton; `backends/triton_.py` does so when first used.

`logits` is what all share; `rows` and `topk` pass over a tile of products in memory, a program per row; `forward` and
`backward` compute the products themselves, on the matrix units, and no logit leaves the chip.
"""
