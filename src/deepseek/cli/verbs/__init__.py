"""One file per verb of the command, each with the function of its name."""
