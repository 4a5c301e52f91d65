"""GSM8K, MATH and AIME: problems solved step by step.

Begin with ``benchmark.py``; ``answers.py`` and ``latex.py`` compare answers.
"""
