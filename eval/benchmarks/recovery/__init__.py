"""Attention mass on the blocks that a policy attends to.

Begin with ``recovery_map.py`` (by layer and head); ``command.py`` is ``attnpred eval recovery``.
"""
