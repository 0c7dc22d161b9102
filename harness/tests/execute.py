"""python -m harness.tests.execute CODE: runs its argument, for tests that need a process of their own."""

import sys

if __name__ == "__main__":
    exec(compile(sys.argv[1], "<argument>", "exec"), {"__name__": "__main__"})
