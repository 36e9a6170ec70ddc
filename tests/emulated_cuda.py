"""The CUDA kernels of csrc/cuda, run on the CPU by the emulation in tests/cuda_emulation."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

from vitdiv_kernels.ops._layout import accumulation_dtype

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests/cuda_emulation"
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
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


def compiler():
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(*sources, defines=(), shared=True):
    """Compile sources with the emulation to a library or a program, once for each state of the sources."""
    # Plain -O2: g++ 12 at -O3 stores vectors to stack arrays that it has not aligned.
    options = [
        "-std=c++20",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Wno-clobbered",
        f"-I{EMULATION}",
        f"-I{ROOT / 'csrc/cuda'}",
    ]
    options += [f"-D{define}" for define in defines] + (["-shared", "-fPIC"] if shared else [])
    command = [compiler(), *options, str(EMULATION / "emulation.cpp"), "-x", "c++", *map(str, sources)]
    state = hashlib.sha256(" ".join(command).encode())
    for path in sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*"), *EMULATION.glob("*")]):
        state.update(path.read_bytes())
    target = ROOT / "build/emulation" / f"{Path(sources[0]).stem}-{state.hexdigest()[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        for earlier in target.parent.glob(f"{Path(sources[0]).stem}-*"):
            earlier.unlink()
        unfinished = target.with_suffix(f".{os.getpid()}")
        run = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if run.returncode != 0 or "warning" in run.stderr:
            raise RuntimeError(f"the emulated kernels do not compile cleanly:\n{run.stderr}")
        unfinished.rename(target)
    return target


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


class ReattentionArgs(ctypes.Structure):
    _fields_ = [
        *[(size, ctypes.c_int64) for size in ("B", "H", "N", "M", "d", "dv")],
        *[(name, HeadsView) for name in "qkv"],
        ("scale", ctypes.c_double),
        *[(name, ctypes.c_void_p) for name in ("pre_mix", "pre_bias", "mix", "bias")],
        ("centred", ctypes.c_bool),
        *[(name, ctypes.c_void_p) for name in ("norm_weight", "norm_bias")],
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int),
    ]


class ReattentionForward(ReattentionArgs):
    _fields_ = [("out", HeadsView), ("gram", ctypes.c_void_p)]


ARGUMENTS = {
    "attention_gram_fwd": GramForward,
    "attention_gram_bwd": GramBackward,
    "reattention_fwd": ReattentionForward,
}


class Emulator:
    """Calls the kernels with CPU tensors; they may touch only what they are given."""

    def __init__(self):
        self.library = ctypes.CDLL(str(build(EMULATION / "library.cpp", *KERNELS)))
        for name, args in ARGUMENTS.items():
            getattr(self.library, name).restype = ctypes.c_char_p
            getattr(self.library, f"{name}_scratch").restype = ctypes.c_int64
            assert getattr(self.library, f"{name}_size")() == ctypes.sizeof(args)
        self.configure()

    def configure(self, order="forward", seed=0, architecture=90):
        """The order in which warps, lanes and blocks run, and the GPU whose shared memory there is."""
        shared = ctypes.c_int64(SHARED_BYTES[architecture])
        self.library.emulation_configure(ORDERS[order], seed, shared)

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

    def reattention_args(
        self, kind, q, k, v, scale, pre_mix, pre_bias, mix, bias, centred, norm_weight, norm_bias, eps
    ):  # fmt: skip
        args = kind(*q.shape[:3], *k.shape[2:], v.shape[3], *map(self.heads, (q, k, v)), scale)
        args.centred, args.eps = centred, eps
        parameters = dict(
            pre_mix=pre_mix,
            pre_bias=pre_bias,
            mix=mix,
            bias=bias,
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
