"""A graph over several devices: what each operator costs where, and the assignment with the shortest finish."""
