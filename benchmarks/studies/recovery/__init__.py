"""Does daDPO bring a pruned student back? The claim of arXiv 2506.15717 at the size of a laptop.

    python -m benchmarks.studies.recovery --work runs/recovery --out benchmarks/results/recovery.json

SmolLM2-135M-Instruct is the teacher; the student is the same model without six of its thirty layers, after distilled
SFT on the teacher's answers. From there six methods go on under one budget (the same pairs, steps and batch size),
each tuned over four points on a seed and on pairs that nothing else uses, then run with further seeds and measured on
held-out prompts. An interrupted run goes on where it stopped.
"""
