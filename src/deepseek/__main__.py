"""`python -m deepseek` is the command `deepseek`."""

from deepseek.cli import main

main()
