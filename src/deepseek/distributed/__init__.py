"""Which rank holds what, and what it costs: plans as values, their memory and time, and the search for the best one."""
