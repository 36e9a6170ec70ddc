#!/usr/bin/env bash
# torch 2.13.0: an operator of torch.library with register_autograd is differentiated by autograd, by torch.compile and by
# torch.export, but not by torch.func: grad, vjp, jacrev of it raise an error about a setup_context that the operator was
# registered with. An Autograd kernel of one's own, around a torch.autograd.function._SingleLevelFunction, serves all.
# Output seen: autograd: [0.0, 2.0, 4.0]; torch.func.grad: In order to use an autograd.Function with functorch ...
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PY'
import torch


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


square.register_autograd(lambda ctx, g: 2 * g * ctx.saved_tensors[0], setup_context=setup)
x = torch.arange(3.0, requires_grad=True)
gradient = torch.autograd.grad(square(x).sum(), x)[0].tolist()
print("autograd:", gradient)
try:
    torch.func.grad(lambda t: square(t).sum())(x.detach())
    raised = ""
except RuntimeError as error:
    raised = str(error)
print("torch.func.grad:", raised)
assert gradient == [0.0, 2.0, 4.0] and "setup_context" in raised, "the behaviour has changed"
PY
