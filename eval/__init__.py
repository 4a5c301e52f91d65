"""Measures a model under selection policies, and shows the results.

Folders, each importing only those before it:

- ``display/``: text tables, heat maps, SVG charts.
- ``harness/``: runs any benchmark, resumes it, and stores its records. Begin with ``harness/runner.py``.
- ``benchmarks/``: one module or folder for each ``attnpred eval`` command.
- ``report/``: tables and one HTML page of finished runs (``attnpred report``).

Beside them, over ``display`` and ``harness``: ``bench/`` (timings, ``attnpred bench``) and ``analysis/`` (attention
patterns and layer pruning, ``attnpred analyze`` and ``prune``).
"""
