"""See the package's docstring. Worker processes can import from `experiment`, not from here."""

from benchmarks.studies.recovery.experiment import main

main()
