"""What there is to know about the kernels on a GPU, in two calls of eight minutes: `tools/gpu_suite.sh first|second`.

Tasks measure one row each; stages hold tasks, a time limit and lanes, which are processes side by side (`stages.py`).
A process that crashes, hangs or loses its device costs its row and the rest of that row's group, and the next process
goes on (`runner.py`, `worker.py`). Every row is in the file as soon as it is measured. `--dry-run` goes through all of
it on a CPU, by a clock that runs as the cost model expects the tasks to.
"""
