"""From the JSON files of `benchmarks/results` to README's table, `benchmarks/REPORT.md` and the plots of both."""
