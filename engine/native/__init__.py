"""The native CPU path (csrc/cpu): decoder passes from packed weights, and the search through the catalogue.

Only here is `_cpu` imported. A row's arithmetic depends on the row alone, by the order in which everything is summed,
so that nothing need be padded and an answer is the same bit for bit whatever stands beside it.
"""
