"""Trainers: transformers' and TRL's, with the fused loss."""
