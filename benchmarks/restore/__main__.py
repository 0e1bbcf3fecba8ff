"""See the package's docstring. Worker processes can import from `experiment`, not from here."""

from benchmarks.restore.experiment import main

main()
