"""Which parallel plan, and what it costs: pure arithmetic on frozen values. Nothing distributed runs here.

    models/ and machines/  ->  estimate/ (seconds and bytes of one step)  ->  search/ (the plan within limits)

`distributed.plan.Plan` is what comes out and what a trainer applies.
"""
