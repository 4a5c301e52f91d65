"""LongBench and LongBench-E (Bai et al. 2023, arXiv 2308.14508), scored as its official scorer does.

Begin with ``tasks.py`` (the 21 tasks), then ``benchmark.py``; ``scorer.py`` and ``metrics.py`` make the scores.
"""
