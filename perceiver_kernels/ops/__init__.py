"""The torch.library boundary: schemas, fakes, autograd and FLOP formulas of the kernel backends.

pack_inputs is two dispatcher-visible ops, forward and backward; rotary_embedding is one, its own backward. shared_kv_attention
is four: forward, delta (once for each backward), backward, and backward_add, which adds a chunk's part to the query gradient in
place. attention is three: forward, backward, and backward_into, which writes its gradients to memory that is there, parts of a
projection's gradient. Two autograd.Functions wrap each operation: a ctx-style one for eager and compiled calls, and one with
``setup_context`` and ``vmap`` that is used only under functorch transforms, where the former is not allowed (its ``apply``
costs 10 us less per call). Chunks have a Function of their own, functional/chunked.py.
"""
