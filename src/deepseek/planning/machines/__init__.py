"""What a plan runs on: accelerators, links and software as values, from datasheets or measured here."""
