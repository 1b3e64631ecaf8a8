"""The models that a plan lays out: the sizes of a model that decide bytes, operations and messages."""
