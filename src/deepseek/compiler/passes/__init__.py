"""Passes over one captured graph: fusion, memory, placement. A graph in, a graph out."""
