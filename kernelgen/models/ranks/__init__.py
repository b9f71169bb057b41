"""A model over several processes: who holds what, what it costs, and how they work together.

`plan` and `costs` need nothing but numbers; `mesh` runs a plan on torch.distributed, and `watch`
ends all ranks where one is gone.
"""
