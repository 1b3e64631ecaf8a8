"""A stand-in for a GPU that records kernels, with the same rule of fixed addresses."""

from torch.utils._pytree import tree_leaves


class Recorder:
    """Records as a GPU does: the same addresses each time, and nothing but the kernels runs again."""

    def __init__(self):
        self.num_recorded = 0
        self.inputs = []

    def __call__(self, function, inputs):
        self.num_recorded += 1
        self.inputs.append(inputs)
        outputs = function(*inputs)

        def replay():
            for old, new in zip(tree_leaves(outputs), tree_leaves(function(*inputs)), strict=True):
                old.copy_(new)

        return outputs, replay
