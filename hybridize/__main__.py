"""`python -m hybridize`."""

from hybridize.cli.main import main

main()
