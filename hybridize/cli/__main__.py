"""`python -m hybridize.cli`."""

from hybridize.cli.main import main

main()
