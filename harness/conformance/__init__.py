"""How far the emulated CANN carries: the vendor's operator tests, real architectures, effective bits, the wheel's
symbols.
"""
