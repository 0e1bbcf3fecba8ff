"""TRL's DPOTrainer on the fused primitive."""
