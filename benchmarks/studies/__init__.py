"""Measurements that answered one question each: `python -m benchmarks.studies.NAME --out FILE`.

Each is a module that makes rows (`benchmarks.rows`) of the study NAME, with `TABLES` and `PLOTS` of them that
`python -m benchmarks.report` puts into the pages.
"""
