"""RULER (Hsieh et al. 2024, arXiv 2404.06654): its 13 tasks, at any length.

Begin with ``families.py`` (the tasks), then ``benchmark.py``.
"""
