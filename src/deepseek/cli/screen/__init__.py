"""The output of the verbs: events, tables, reports, plots and plans."""
