"""What `use_backend` holds for: blocks, threads, tasks, generators, decorated and compiled functions."""

import asyncio
import contextvars
import threading

import pytest
import torch

import vitdiv_kernels as vd
from vitdiv_kernels import _dispatch

X = torch.randn(2, 5, 8)


def choice():
    """What overrides the table here: a backend, or "auto" without a block, as VITDIV_BACKEND is not set."""
    return _dispatch._current_choice().backend


def in_thread(function):
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


def test_one_object_can_be_entered_again():
    reference = vd.use_backend("reference")
    with reference:
        with reference, vd.use_backend("triton"), reference:
            assert choice() == "reference"
        assert choice() == "reference"
    assert choice() == "auto"


def test_blocks_nest_and_auto_gives_the_table_back():
    with vd.use_backend("reference"):
        with vd.use_backend("auto"):
            assert choice() == "auto"
            with pytest.raises(KeyError), vd.use_backend("triton"):
                raise KeyError
            assert choice() == "auto"
        assert choice() == "reference"
    assert choice() == "auto"


def test_within_the_environments_choice(monkeypatch):
    monkeypatch.setattr(_dispatch, "_environment", _dispatch._Choice("triton", " (set by the environment)"))

    def program():
        before = choice()
        with vd.use_backend("reference"):
            inside = choice()
        return before, inside, choice()

    assert contextvars.Context().run(program) == ("triton", "reference", "triton")


def test_threads_have_blocks_of_their_own():
    both_are_in, first_is_out = threading.Barrier(2), threading.Event()
    shared, seen = vd.use_backend("reference"), {}

    def first():
        with shared:
            both_are_in.wait()
        seen["first"] = choice()
        first_is_out.set()

    def second():
        with vd.use_backend("native"), shared:
            both_are_in.wait()
            first_is_out.wait()
            seen["second inside"] = choice()
        seen["second"] = choice()

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "auto", "second inside": "reference", "second": "auto"}
    assert choice() == "auto"


def test_a_thread_started_in_a_block_sees_it_in_a_copy_of_its_context():
    with vd.use_backend("reference"):
        context = contextvars.copy_context()
        assert in_thread(lambda: context.run(choice)) == "reference"


def test_tasks_have_blocks_of_their_own_and_take_that_of_their_maker():
    async def task(backend, inside, go):
        before = choice()
        with vd.use_backend(backend):
            inside.set()
            await go.wait()
            return before, choice()

    async def program():
        go, inside = asyncio.Event(), [asyncio.Event(), asyncio.Event()]
        with vd.use_backend("triton"):
            tasks = [
                asyncio.create_task(task(backend, event, go))
                for backend, event in zip(["reference", "native"], inside, strict=True)
            ]
            for event in inside:
                await event.wait()
            assert choice() == "triton"
        go.set()
        return await asyncio.gather(*tasks), choice()

    seen, after = asyncio.run(program())
    assert seen == [("triton", "reference"), ("triton", "native")]
    assert after == "auto"


def test_decorated_functions():
    @vd.use_backend("reference")
    def double(x, *, by=2):
        "Doubles."
        return by * x, choice()

    @vd.use_backend("reference")
    async def later(x):
        await asyncio.sleep(0)
        return x, choice()

    assert double(1, by=3) == (3, "reference")
    assert (double.__name__, double.__doc__) == ("double", "Doubles.")
    assert asyncio.run(later(1)) == (1, "reference")
    assert choice() == "auto"


def generator():
    yield


async def async_generator():
    yield


@pytest.mark.parametrize(
    ("what", "words"),
    [(generator, "inside of it"), (async_generator, "inside of it"), (dict, "a class"), (3, "got int")],
)
def test_what_it_does_not_decorate(what, words):
    with pytest.raises(TypeError, match=words):
        vd.use_backend("reference")(what)


def test_a_generator_that_ends_within_another_block_leaves_no_choice_behind():
    def values():
        with vd.use_backend("reference"):
            yield choice()

    started = values()
    assert next(started) == "reference"
    with vd.use_backend("native"):
        assert next(started, None) is None
    assert choice() == "auto"


def operators_of(gm):
    return [str(node.target) for node in gm.graph.nodes if "vitdiv" in str(node.target)]


@pytest.fixture
def compiled():
    """Compiles without a graph break; `compiled.graphs` lists the operators of each graph made."""

    def compile(function):
        torch._dynamo.reset()
        compile.graphs = []

        def backend(gm, _):
            compile.graphs.append(operators_of(gm))
            return gm

        return torch.compile(function, fullgraph=True, backend=backend)

    yield compile
    torch._dynamo.reset()


NATIVE = ["vitdiv.pairwise_cosine_fwd.default"]


@pytest.mark.usefixtures("library")
def test_a_compiled_function_is_compiled_anew_in_another_block(compiled):
    function = compiled(vd.pairwise_cosine)
    reference = vd.use_backend("reference")
    function(X)
    for _ in range(2):
        with reference:
            function(X)
            in_thread(lambda: function(X))  # outside of the block: the first graph
        function(X)
    assert compiled.graphs == [NATIVE, []]


@pytest.mark.usefixtures("library")
def test_blocks_within_a_compiled_function(compiled):
    @vd.use_backend("reference")
    def decorated(x):
        return vd.pairwise_cosine(x)

    def function(x):
        with vd.use_backend("reference"):
            total = vd.pairwise_cosine(x)
            with vd.use_backend("native"):
                total = total + vd.pairwise_cosine(x)
            total = total + vd.pairwise_cosine(x)
        return total + decorated(x) + vd.pairwise_cosine(x)

    out = compiled(function)(X)
    assert compiled.graphs == [NATIVE * 2]
    torch.testing.assert_close(out, 5 * vd.pairwise_cosine(X))
    assert choice() == "auto"
