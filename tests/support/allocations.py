"""How much memory a function makes, and how much it copies; on any device, on the meta device too."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Within the block `bytes` grows by every storage that an operation's results have and no tensor had
    before; what is freed is not taken off, so that it is at least the peak."""

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self._storages = {}  # kept alive, or a later one could take an earlier one's place

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            self._is_new(x)
        out = function(*args, **(kwargs or {}))
        self.bytes += sum(x.untyped_storage().nbytes() for x in tree_leaves(out) if self._is_new(x))
        return out

    def _is_new(self, x):
        if not isinstance(x, torch.Tensor) or x.untyped_storage()._cdata in self._storages:
            return False
        storage = x.untyped_storage()
        self._storages[storage._cdata] = storage
        return True


def beyond_results(function, *arguments):
    """Bytes of all that a function of tensors makes, but for its results."""
    with Allocations() as made:
        results = function(*arguments)
    storages = {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(results)}
    return made.bytes - sum(storage.nbytes() for storage in storages.values())


class Copies(TorchDispatchMode):
    """Within the block `bytes` grows by what operations write that only copy, to another layout or dtype."""

    NAMES = ("aten::copy_", "aten::clone", "aten::_to_copy", "aten::cat", "aten::constant_pad_nd")

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name in self.NAMES:
            self.bytes += out.numel() * out.element_size()
        return out
