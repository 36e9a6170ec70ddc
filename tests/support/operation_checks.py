"""What the tests of several operations check in the same way; each gives the call and the tensors."""

import torch
from comparing import assert_within_budget, gradients
from torch.nn.functional import normalize


def draw_away_from_0(shape, dtype=torch.float64, other=None):
    """Vectors whose cosines, with each other or with those of another set, stay away from 0, where |S| and
    max(S, 0) have a kink."""
    while True:
        x = torch.randn(shape, dtype=torch.float64).to(dtype)
        unit, unit_other = (normalize(t.double(), dim=-1) for t in (x, x if other is None else other))
        if (unit @ unit_other.mT).abs().min() > 1e-6:
            return x


def gram(x, normalise):
    x = normalize(x, dim=-1) if normalise else x
    return x @ x.mT


def draw_two_grams(leading, n, width, width2, dtype=torch.float64, margin=0.25, normalise=True, size=1.0):
    """Two sets of vectors whose products stay away from the kinks of two_gram's penalties; the second is None
    with no width2."""
    while True:
        x, y = (
            None if w is None else (size * torch.randn(*leading, n, w, dtype=torch.float64)).to(dtype)
            for w in (width, width2)
        )
        s, t = (torch.eye(n) if z is None else gram(z.double(), normalise) for z in (x, y))
        others = ~torch.eye(n, dtype=torch.bool)  # of those with themselves the cosines are 1
        d, s = (s - t)[..., others], s[..., others]
        t = s if y is None else t[..., others]  # the identity has no gradient
        if all(kink.abs().min() > 1e-6 for kink in (s, t, d, d.abs() - margin) if kink.numel()):
            return x, y


def of_pair(x, y):
    """x and y as leaves by name; y may be None."""
    return {name: None if t is None else t.detach().requires_grad_() for name, t in (("x", x), ("y", y))}


def assert_pairs(operation, formula, inputs, dtype, scale_of, cotangent_from=0.5):
    """Value and every gradient of operation(x, y) against the formula in float64. scale_of(name, truth): see
    `assert_within_budget`."""

    def value_and_gradients(function, cast):
        leaves = {name: None if t is None else cast(t) for name, t in inputs.items()}
        value = function(*leaves.values())
        cotangent = torch.linspace(cotangent_from, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
        return {"value": value.detach(), **gradients(value, cotangent, leaves)}

    truth = value_and_gradients(formula, lambda t: t.detach().double().requires_grad_())
    plain, got = (value_and_gradients(function, lambda t: t) for function in (formula, operation))
    for name, expected in truth.items():
        assert_within_budget(got[name], plain[name], expected, dtype, name, scale_of(name, expected))
    assert got["value"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got["x"].dtype == dtype


def value_and_leaves(operation, x, y):
    """(value, gradient of x, gradient of y) of the sum of a value."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (x, y)]
    value = operation(*leaves)
    value.sum().backward()
    return value.detach(), *(None if t is None else t.grad for t in leaves)


def assert_zero_vectors(operation, formula, x, y=None):
    """The gradient of a zero vector is dx_hat / eps: 1e8 times the others, which are compared apart."""
    (got, *ours), (expected, *theirs) = (
        value_and_leaves(function, x, y) for function in (operation, formula)
    )
    torch.testing.assert_close(got, expected)
    for original, a, b in zip((x, y), ours, theirs, strict=True):
        if original is not None:
            zero = (original == 0).all(-1)
            torch.testing.assert_close(a[zero], b[zero])
            torch.testing.assert_close(a[~zero], b[~zero])


def assert_far_apart(operation, inputs, far_apart, names=("x", "y", "q", "k", "v")):
    """The same bits of tensors whose items are far apart in memory, of those of these names; returns them."""
    near = {name: t.requires_grad_() for name, t in inputs.items()}
    far = {
        name: (far_apart(t.detach()) if name in names else t.detach().clone()).requires_grad_()
        for name, t in near.items()
    }
    values = [operation(**each) for each in (near, far)]
    assert torch.equal(*values)
    for value in values:
        value.float().square().sum().backward()
    for name, t in near.items():
        assert torch.equal(t.grad, far[name].grad), name
    return near, far


def assert_only_one_gradient(loss, inputs, wanted):
    """Where one input alone asks for a gradient, it is the same as where all do, and the others have none."""
    every, one = ({name: t.detach().clone() for name, t in inputs.items()} for _ in range(2))
    for t in (*every.values(), one[wanted]):
        t.requires_grad_()
    for leaves in (every, one):
        loss(**leaves).backward()
    torch.testing.assert_close(one[wanted].grad, every[wanted].grad)
    assert all(t.grad is None for name, t in one.items() if name != wanted)


def assert_backward_twice(loss, *inputs):
    """The same bits twice from one graph, and the inputs as they were."""
    before = [(t.detach().clone(), t._version) for t in inputs]
    wanted = [t for t in inputs if t.requires_grad]
    value = loss(*inputs)
    first = torch.autograd.grad(value, wanted, retain_graph=True)
    second = torch.autograd.grad(value, wanted)
    assert all(map(torch.equal, first, second))
    for t, (old, version) in zip(inputs, before, strict=True):
        assert torch.equal(t, old)
        assert t._version == version


def assert_same_on_any_number_of_threads(operation, *inputs):
    """The same bits of values and gradients on one thread and on two."""
    results, before = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        value = operation(*leaves)
        value.backward(torch.linspace(-1, 1, value.numel()).reshape(value.shape))
        results.append([value.detach(), *(t.grad for t in leaves)])
    torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
