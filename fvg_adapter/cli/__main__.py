"""`python -m fvg_adapter.cli`."""

from fvg_adapter.cli import main

main()
