"""What the verbs show: events, tables, reports, plots and plans."""
