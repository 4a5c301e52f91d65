"""Runs benchmarks: every sample of every task, under every policy and budget, with resume.

Begin with ``runner.py``, whose docstring says how a benchmark is written. ``variants.py`` and ``rules.py`` name the
policies, ``evaluated_model.py`` is what a benchmark calls, ``run_folder.py`` and ``predictions.py`` are the files on
disk, ``scores.py`` and ``bootstrap.py`` turn records into means.
"""
