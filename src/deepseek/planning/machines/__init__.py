"""Hardware and software that a plan runs on: accelerators, links, programs, as values from datasheets or measured."""
