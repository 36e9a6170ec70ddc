"""Calls the CUDA kernels of csrc/cuda, emulated on the CPU, with tensors."""

import ctypes
import os

import torch
from emulation_build import kernels

from vitdiv_kernels._layout import accumulation_dtype
from vitdiv_kernels.ops.pairs.two_gram.reference import PENALTIES as PENALTIES_OF_TWO_GRAMS

ORDERS = {"forward": 0, "reverse": 1, "random": 2}
SHARED_BYTES = {
    80: 163 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
}  # that a block may have, by architecture
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
COUNTS = [
    "mma",
    "ldmatrix",
    "ldmatrix_rounds",
    "shuffles",
    "barriers",
    "shared_bytes",
    "global_bytes",
    "copied_bytes",
    "launches",
    "switches",
]


class HeadsView(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        *[(f"stride_{axis}", ctypes.c_int64) for axis in "bhn"],
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        ("q", HeadsView),
        ("k", HeadsView),
        ("H", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("scale", ctypes.c_double),
    ]


class GramArgs(ctypes.Structure):
    _fields_ = [
        ("B", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("M", ctypes.c_int64),
        ("layers", Layer * 2),
        ("threads", ctypes.c_int),
    ]


class GramForward(GramArgs):
    _fields_ = [("gram", ctypes.c_void_p)]


class GramBackward(GramArgs):
    _fields_ = [("coupling", ctypes.c_void_p), ("dq", HeadsView * 2), ("dk", HeadsView * 2)]


class BatchView(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("offset", ctypes.POINTER(ctypes.c_int64)),
        ("stride_n", ctypes.c_int64),
    ]


class CosineArgs(ctypes.Structure):
    _fields_ = [
        *[(size, ctypes.c_int64) for size in "LNMD"],
        ("x", BatchView),
        ("y", BatchView),
        ("penalty", ctypes.c_int),
        ("include_self", ctypes.c_bool),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int),
    ]


class RowsArgs(ctypes.Structure):
    _fields_ = [
        *[(size, ctypes.c_int64) for size in "LNMD"],
        ("x", BatchView),
        ("y", BatchView),
        ("scale", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int),
    ]


class LogSumExpForward(RowsArgs):
    _fields_ = [("rows", ctypes.c_void_p), ("saved", ctypes.c_void_p)]


class LogSumExpBackward(RowsArgs):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("drows", "rows", "saved")],
        ("dx", BatchView),
        ("dy", BatchView),
    ]


class NearestForward(RowsArgs):
    _fields_ = [("nearest", ctypes.c_void_p)]


class TwoGramArgs(ctypes.Structure):
    _fields_ = [
        *[(size, ctypes.c_int64) for size in ("L", "N", "D", "D2")],
        ("x", BatchView),
        ("y", BatchView),
        ("penalty", ctypes.c_int),
        ("margin", ctypes.c_double),
        ("normalise", ctypes.c_bool),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int),
    ]


class TwoGramForward(TwoGramArgs):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("sums", "saved")],
        *[(name, ctypes.c_bool) for name in ("needs_dx", "needs_dy")],
    ]


class TwoGramBackward(TwoGramArgs):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("dsums", "saved")],
        ("dx", BatchView),
        ("dy", BatchView),
    ]


class ReattentionArgs(ctypes.Structure):
    _fields_ = [
        *[(size, ctypes.c_int64) for size in ("B", "H", "N", "M", "d", "dv")],
        *[(name, HeadsView) for name in "qkv"],
        ("scale", ctypes.c_double),
        *[(name, ctypes.c_void_p) for name in ("pre_mix", "pre_bias", "folded_mix", "folded_bias")],
        ("centred", ctypes.c_bool),
        *[(name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias")],
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int),
    ]


class CosineForward(CosineArgs):
    _fields_ = [("sums", ctypes.c_void_p), ("saved", ctypes.c_void_p)]


class CosineBackward(CosineArgs):
    _fields_ = [
        ("dsums", ctypes.c_void_p),
        ("saved", ctypes.c_void_p),
        ("dx", BatchView),
        ("dy", BatchView),
    ]


class ReattentionForward(ReattentionArgs):
    _fields_ = [("out", HeadsView), ("gram", ctypes.c_void_p)]


class ReattentionBackward(ReattentionArgs):
    _fields_ = [
        *[(name, HeadsView) for name in ("dout", "dq", "dk", "dv_out")],
        ("coupling", ctypes.c_void_p),
        ("coupling_stride_b", ctypes.c_int64),
        *[
            (name, ctypes.c_void_p)
            for name in ("dpre_mix", "dfolded_mix", "dfolded_bias", "dnorm_weight", "dnorm_bias")
        ],
    ]


OPERATORS = {
    "attention_gram_fwd": GramForward,
    "attention_gram_bwd": GramBackward,
    "pairwise_cosine_fwd": CosineForward,
    "pairwise_cosine_bwd": CosineBackward,
    "pairwise_logsumexp_fwd": LogSumExpForward,
    "pairwise_logsumexp_bwd": LogSumExpBackward,
    "pairwise_nearest": NearestForward,
    "two_gram_fwd": TwoGramForward,
    "two_gram_bwd": TwoGramBackward,
    "reattention_fwd": ReattentionForward,
    "reattention_bwd": ReattentionBackward,
}


class Emulator:
    """Calls the kernels with CPU tensors; they may touch only what they are given."""

    def __init__(self):
        self.library = ctypes.CDLL(str(kernels()))
        self.offsets = []
        for name, args in OPERATORS.items():
            getattr(self.library, name).restype = ctypes.c_char_p
            getattr(self.library, f"{name}_scratch").restype = ctypes.c_int64
            assert getattr(self.library, f"{name}_size")() == ctypes.sizeof(args)
        self.library.pairwise_cosine_saved_words.restype = ctypes.c_int64
        self.configure()

    def configure(self, order="forward", seed=0, architecture=90, as_hardware=None):
        """The order in which warps, lanes and blocks run, the GPU whose shared memory there is, and whether
        tensor cores and approximate functions round as hardware does (arithmetic.h) or once.
        """
        if as_hardware is None:
            as_hardware = os.environ.get("VITDIV_EMULATION_ARITHMETIC") == "hardware"
        self.as_hardware = as_hardware
        shared = ctypes.c_int64(SHARED_BYTES[architecture])
        self.library.emulation_configure(ORDERS[order], seed, shared, as_hardware)

    def counts(self):
        """What the kernels did since the last time."""
        counts = (ctypes.c_uint64 * len(COUNTS))()
        self.library.emulation_take_counts(counts)
        return dict(zip(COUNTS, counts, strict=True))

    def allow(self, tensor, output=False):
        """Let kernels read a tensor, not what lies around it; an output must be written before it is read."""
        if tensor.numel():
            elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            bytes = ctypes.c_int64(elements * tensor.element_size())
            self.library.emulation_allow(ctypes.c_void_p(tensor.data_ptr()), bytes, output, not output)

    def scratch(self, bytes):
        scratch = torch.full((bytes,), 0xFF, dtype=torch.uint8)
        self.allow(scratch, output=True)
        return scratch

    def heads(self, tensor, output=False):
        assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        self.allow(tensor, output)
        return HeadsView(tensor.data_ptr(), DTYPES[tensor.dtype], *tensor.stride()[:3])

    def call(self, name, args):
        scratch = self.scratch(getattr(self.library, f"{name}_scratch")(ctypes.byref(args)))
        error = getattr(self.library, name)(ctypes.byref(args), ctypes.c_void_p(scratch.data_ptr()))
        self.library.emulation_forbid_all()
        self.offsets.clear()
        if error is not None:
            raise RuntimeError(error.decode())

    def gram_args(self, kind, q, k, scale, q2=None, k2=None, scale2=0.0):
        args = kind(B=q.shape[0], N=q.shape[2], M=k.shape[2])
        for layer, (q_, k_, scale_) in enumerate([(q, k, scale), (q2, k2, scale2)]):
            if q_ is not None:
                args.layers[layer] = Layer(self.heads(q_), self.heads(k_), q_.shape[1], q_.shape[3], scale_)
        return args

    def attention_gram_fwd(self, q, *others):
        args = self.gram_args(GramForward, q, *others)
        H = args.layers[0].H + args.layers[1].H
        acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        gram = torch.full((q.shape[0], H, H), float("nan"), dtype=acc)
        self.allow(gram, output=True)
        args.gram = gram.data_ptr()
        self.call("attention_gram_fwd", args)
        return gram

    def attention_gram_bwd(self, coupling, q, k, scale, q2=None, k2=None, scale2=0.0, needs=(True,) * 4):
        """dq, dk, dq2, dk2 in the layout of what they are gradients of; None for what is not needed."""
        args = self.gram_args(GramBackward, q, k, scale, q2, k2, scale2)
        self.allow(coupling)
        args.coupling = coupling.data_ptr()
        gradients = [
            torch.full_like(x, float("nan")) if need and x is not None else None
            for x, need in zip((q, k, q2, k2), needs, strict=True)
        ]
        for views, pair in (args.dq, gradients[::2]), (args.dk, gradients[1::2]):
            for layer, gradient in enumerate(pair):
                if gradient is not None:
                    views[layer] = self.heads(gradient, output=True)
        self.call("attention_gram_bwd", args)
        return gradients

    def batch(self, tensor, output=False):
        """Of a tensor [items, N, D]."""
        assert tensor.stride(-1) == 1 or tensor.shape[-1] == 1
        self.allow(tensor, output)
        items = tensor.shape[0]
        offsets = (ctypes.c_int64 * max(items, 1))(*(item * tensor.stride(0) for item in range(items)))
        self.offsets.append(offsets)  # a structure keeps what only some of its fields point to
        return BatchView(tensor.data_ptr(), DTYPES[tensor.dtype], offsets, tensor.stride(1))

    def cosine_args(self, kind, x, y, penalty, include_self, eps):
        args = kind(L=x.shape[0], N=x.shape[1], M=(x if y is None else y).shape[1], D=x.shape[2])
        args.x = self.batch(x)
        if y is not None:
            args.y = self.batch(y)
        args.penalty = ["signed", "abs", "square", "relu"].index(penalty)
        args.include_self = include_self
        args.eps = eps
        return args

    def pairwise_cosine_fwd(self, x, y, penalty, include_self=False, eps=1e-8, for_backward=True):
        """The sums, and what the backward needs or None."""
        args = self.cosine_args(CosineForward, x, y, penalty, include_self, eps)
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        sums = torch.full((x.shape[0],), float("nan"), dtype=acc)
        self.allow(sums, output=True)
        args.sums = sums.data_ptr()
        saved = None
        if for_backward:
            words = self.library.pairwise_cosine_saved_words(ctypes.byref(args))
            saved = torch.full((words,), -1, dtype=torch.int32)
            self.allow(saved, output=True)
            args.saved = saved.data_ptr()
        self.call("pairwise_cosine_fwd", args)
        return sums, saved

    def pairwise_cosine_bwd(
        self, dsums, x, y, saved, penalty, include_self=False, eps=1e-8, needs=(True, True)
    ):
        """dx and dy; None for what is not needed."""
        args = self.cosine_args(CosineBackward, x, y, penalty, include_self, eps)
        for name, tensor in ("dsums", dsums), ("saved", saved):
            self.allow(tensor)
            setattr(args, name, tensor.data_ptr())
        gradients = self.vector_gradients(args, x, y, needs)
        self.call("pairwise_cosine_bwd", args)
        return gradients

    def output(self, args, name, *shape, dtype):
        tensor = torch.full(shape, -1 if dtype == torch.int64 else float("nan"), dtype=dtype)
        self.allow(tensor, output=True)
        setattr(args, name, tensor.data_ptr())
        return tensor

    def vector_gradients(self, args, x, y, needs):
        """Outputs dx and dy; None for what is not needed."""
        gradients = [
            None if t is None or not need else torch.full(t.shape, float("nan"), dtype=t.dtype)
            for t, need in zip((x, y), needs, strict=True)
        ]
        for name, gradient in zip(("dx", "dy"), gradients, strict=True):
            if gradient is not None:
                setattr(args, name, self.batch(gradient, output=True))
        return gradients

    def rows_args(self, kind, x, y, scale, eps):
        args = kind(L=x.shape[0], N=x.shape[1], M=(x if y is None else y).shape[1], D=x.shape[2])
        args.x = self.batch(x)
        if y is not None:
            args.y = self.batch(y)
        args.scale, args.eps = scale, eps
        return args

    def pairwise_logsumexp_fwd(self, x, y, scale, eps=1e-8):
        args = self.rows_args(LogSumExpForward, x, y, scale, eps)
        rows = self.output(args, "rows", *x.shape[:2], dtype=accumulation_dtype(x))
        self.call("pairwise_logsumexp_fwd", args)
        return rows

    def pairwise_logsumexp_bwd(self, drows, rows, x, y, scale, eps=1e-8, needs=(True, True)):
        args = self.rows_args(LogSumExpBackward, x, y, scale, eps)
        for name, tensor in ("drows", drows), ("rows", rows):
            self.allow(tensor)
            setattr(args, name, tensor.data_ptr())
        gradients = self.vector_gradients(args, x, y, needs)
        self.call("pairwise_logsumexp_bwd", args)
        return gradients

    def pairwise_nearest(self, x, y, eps=1e-8):
        args = self.rows_args(NearestForward, x, y, 1.0, eps)
        nearest = self.output(args, "nearest", *x.shape[:2], dtype=torch.int64)
        self.call("pairwise_nearest", args)
        return nearest

    def two_gram_args(self, kind, x, y, penalty, margin, normalise, eps):
        args = kind(L=x.shape[0], N=x.shape[1], D=x.shape[2], D2=0 if y is None else y.shape[2])
        args.x = self.batch(x)
        if y is not None:
            args.y = self.batch(y)
        args.penalty = list(PENALTIES_OF_TWO_GRAMS).index(penalty)
        args.margin, args.normalise, args.eps = margin, normalise, eps
        return args

    def two_gram_fwd(self, x, y, penalty, margin=0.0, normalise=True, eps=1e-8):
        args = self.two_gram_args(TwoGramForward, x, y, penalty, margin, normalise, eps)
        sums = self.output(args, "sums", x.shape[0], dtype=accumulation_dtype(x))
        self.call("two_gram_fwd", args)
        return sums

    def two_gram_bwd(self, dsums, x, y, penalty, margin=0.0, normalise=True, eps=1e-8, needs=(True, True)):
        args = self.two_gram_args(TwoGramBackward, x, y, penalty, margin, normalise, eps)
        self.allow(dsums)
        args.dsums = dsums.data_ptr()
        gradients = self.vector_gradients(args, x, y, needs)
        self.call("two_gram_bwd", args)
        return gradients

    def reattention_args(
        self, kind, q, k, v, scale, pre_mix, pre_bias, folded_mix, folded_bias, centred, norm_weight,
        norm_bias, eps,
    ):  # fmt: skip
        args = kind(*q.shape[:3], *k.shape[2:], v.shape[3], *map(self.heads, (q, k, v)), scale)
        args.centred, args.eps = centred, eps
        parameters = dict(
            pre_mix=pre_mix,
            pre_bias=pre_bias,
            folded_mix=folded_mix,
            folded_bias=folded_bias,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
        )
        for name, parameter in parameters.items():
            if parameter is not None:
                assert parameter.is_contiguous()
                assert parameter.dtype == accumulation_dtype(q)
                self.allow(parameter)
                setattr(args, name, parameter.data_ptr())
        return args

    def reattention_fwd(self, *inputs, needs_out, needs_gram):
        """What the operator of that name returns; None for what is not needed."""
        args = self.reattention_args(ReattentionForward, *inputs)
        q, v = inputs[0], inputs[2]
        out = gram = None
        if needs_out:  # as the operator lays it out, [B, N, H, d] in memory
            shape = q.shape[0], q.shape[2], q.shape[1], v.shape[3]
            out = torch.full(shape, float("nan"), dtype=q.dtype).transpose(1, 2)
            args.out = self.heads(out, output=True)
        if needs_gram:
            gram = torch.full((q.shape[0], *q.shape[1:2] * 2), float("nan"), dtype=accumulation_dtype(q))
            self.allow(gram, output=True)
            args.gram = gram.data_ptr()
        self.call("reattention_fwd", args)
        return out, gram

    def reattention_bwd(self, dout, coupling, *inputs, needs):
        """Gradients by name, of those that `needs` names: dq, dk, dv, dpre_mix, dfolded_mix, dnorm."""
        args = self.reattention_args(ReattentionBackward, *inputs)
        q, k, v = inputs[:3]
        if dout is not None:
            args.dout = self.heads(dout)
        if coupling is not None:
            assert coupling.is_contiguous()
            self.allow(coupling)
            args.coupling = coupling.data_ptr()
            args.coupling_stride_b = coupling[0].numel() if coupling.shape[0] == q.shape[0] else 0
        gradients = {}
        for name, field, like in ("dq", "dq", q), ("dk", "dk", k), ("dv", "dv_out", v):
            if name in needs:
                gradients[name] = torch.full_like(like, float("nan"))
                setattr(args, field, self.heads(gradients[name], output=True))
        heads = q.shape[1]
        of_needs = {
            "dpre_mix": ["dpre_mix"], "dfolded_mix": ["dfolded_mix", "dfolded_bias"],
            "dnorm": ["dnorm_weight", "dnorm_bias"],
        }  # fmt: skip
        for name in (name for need, names in of_needs.items() if need in needs for name in names):
            shape = (heads, heads) if name.endswith("mix") else (heads,)
            gradients[name] = torch.full(shape, float("nan"), dtype=accumulation_dtype(q))
            self.allow(gradients[name], output=True)
            setattr(args, name, gradients[name].data_ptr())
        self.call("reattention_bwd", args)
        return gradients
