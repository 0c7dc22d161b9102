"""Before and after an upgrade: accepted numbers, transitions, known failures, limits that could come down,
bisecting.
"""
