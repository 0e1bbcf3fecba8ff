"""What there is to know about the kernels on a GPU, in eight minutes: `python -m benchmarks.gpu_suite --out gpu.json`.

Stages run in processes of their own, in the order of `stages.STAGES`, so that a crash, a hang or a spoilt device ends
one of them and not the suite. Every row is in the file as soon as it is measured.
`python -m benchmarks.gpu_suite.tables gpu.json` prints it; `--profile` shows where the time of one call goes instead.
"""
