"""Backends: how an operation is computed. Each is importable everywhere and says in sentences what it cannot serve.

A module that serves an operation has ``COMPOSITE`` (True: made of torch operations and differentiated by torch; False: a
forward and a backward function) and ``reasons_against(problem) -> list[str]``, empty where it can serve the problem.
"""
