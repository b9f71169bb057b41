"""The tuner: finds the best configuration of a kernel on a device, and remembers it.

device    what a device is called in the cache
cache     the file of winners, one per device
ledger    export, import, diff, merge, prune
lookup    which entry serves a problem, by what rule
energy    meters
space     what may be chosen, and what each rule forbids
gate      whether a candidate computes what it should
worker    the child process that runs candidates
measure   the side of it that survives them
pickers   what to measure next
samplers  the same by Optuna, and candidates as its parameters
storage   trials, shared by many processes
replay    recorded trials in place of a device
report    what is asked for, and what was found
study     the search
page      a page about it
"""
