"""Losses on selected log-probabilities, in plain PyTorch on `[N]` and `[N, K]` tensors."""
