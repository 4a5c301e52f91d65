"""The pocket model's own tasks: facts planted in text, and questions about them.

Begin with ``tasks.py``, which makes documents and questions; ``documents.py`` fits them to a number of tokens;
``benchmark.py`` is ``attnpred eval synthetic``.
"""
