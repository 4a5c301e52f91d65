"""Where a model's attention is predictable, and why: by layer and head (TAPPA).

Begin with ``benchmark.py``: a document is a sample. ``patterns.py`` classifies attention maps, ``gallery.py`` writes
the page. ``pruning/`` removes the layers that matter least.
"""
