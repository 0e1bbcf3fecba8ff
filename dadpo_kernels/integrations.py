"""Where `patch` and the trainers for TRL were before they moved."""

raise ImportError(
    "dadpo_kernels.integrations is gone. From dadpo_kernels itself import patch, TRLDaDPOConfig (formerly "
    "integrations.trl.DaDPOConfig) and TRLDaDPOTrainer (formerly integrations.trl.DaDPOTrainer)"
)
