"""Packages: what hosts take as it is, without kernelgen.

plan    which kernels go in, and which of them serves what, from the tuner's cache
write   a target's package as files

What a package of a target looks like is in the target's own `package.py`.
"""
