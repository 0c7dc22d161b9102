"""How far the emulated CANN carries: the vendor's operator tests, real architectures, effective bits, the wheel's
symbols.
"""


def summary_of(docstring: str) -> str:
    """The first paragraph of a docstring on one line, as `--help` shows it.

    >>> summary_of("A sentence\\nin two lines.\\n\\nMore.")
    'A sentence in two lines.'
    """
    return " ".join(docstring.partition("\n\n")[0].split())
