"""Tables and one HTML page of finished runs: ``attnpred report``.

Begin with ``results_table.py``, which computes every figure; ``text_formats.py`` and ``html_page.py`` write them.
"""
