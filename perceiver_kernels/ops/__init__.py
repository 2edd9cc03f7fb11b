"""The torch.library boundary: schemas, fakes, autograd and FLOP formulas of the kernel backends.

Each operation is one dispatcher-visible op for the forward and one for the backward, wrapped in an autograd.Function. Two
Functions per operation: a ctx-style one for eager and compiled calls, and one with ``setup_context`` and ``vmap`` that is used
only under functorch transforms, where the former is not allowed (its ``apply`` costs 10 us less per call).
"""
