"""The tuner: finds the best configuration of a kernel on a device, and remembers it.

device    what a device is called in the cache
cache     the file of winners, one per device
ledger    export, import, diff, merge, prune
lookup    which entry serves a problem, by what rule
space     what may be chosen, and what each rule forbids
gate      whether a candidate computes what it should
worker    the child process that runs candidates
measure   the side of it that survives them
replay    recorded trials in place of a device
study     the search
"""
