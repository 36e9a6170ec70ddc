"""Whether torch.export runs."""

import torch


def exporting():
    """What torch.compiler.is_exporting() should say: traced by torch.compile it is True before torch 2.13,
    whether or not anything is exported."""
    return torch.compiler._is_exporting_flag


if not hasattr(torch.compiler, "_is_exporting_flag"):  # no name that torch promises to keep
    exporting = torch.compiler.is_exporting
