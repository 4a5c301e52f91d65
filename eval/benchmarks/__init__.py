"""The benchmarks of ``attnpred eval``: one module or folder each.

Begin with ``perplexity.py``, the shortest. Benchmarks with prompts of a set length (``needle.py``, ``ruler/``) share
``fixed_length.py`` and ``haystack.py``.
"""
