"""Backends: how an operation is computed. Each is importable everywhere and says in sentences what it cannot serve.

A module that serves an operation has ``COMPOSITE`` (True: made of torch operations and differentiated by torch; False: a
forward and a backward function) and ``reasons_against(problem) -> list[str]``, empty where it can serve the problem.
"""

import torch.nn.functional

torch_attention = torch.nn.functional.scaled_dot_product_attention
"""torch's own, also where a program has put another function in its place."""
