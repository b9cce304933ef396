"""``python -m dlkernels`` is the ``dlkernels`` command."""

from .cli import main

main()
