"""Timings: ``attnpred bench``.

Begin with ``decode.py`` (whole decoding steps). ``cache_setups.py`` names the caches that are compared,
``decode_timing.py`` times one of them; ``parts/`` times single parts of a step.
"""
