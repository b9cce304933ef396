"""A differential fuzzer: random calls of every operation, ours beside torch's, judged by torch's in float64.

``make fuzz`` runs it on every instruction set of the build; ``python -m tests.fuzz --help`` says what it takes. A case
is its seed: the line of a finding names the command that repeats it.
"""
