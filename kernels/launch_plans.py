"""Launch plans: an operation's launches, recorded once and repeated without Triton's binder.

An operation's first calls with operands of some geometry run as they are written, and a
:class:`Recorder` notes their steps: what they allocate, which compiled kernels they launch, with
which constants, and where each pointer comes from. :meth:`Recorder.plan` makes a Python function of
that, a row of calls of compiled kernels. Later calls with operands of the same geometry run it: the
same launches, without a specialisation of arguments, a choice of tiles, or views.

What a caller owes: the operands of a plan agree in dtype, shape, strides, device and in whether
their pointers are multiples of 16, and whatever the recorded call decided is a function of that and
of :class:`Surroundings`. A recorder that does not recognise a tensor, which is then neither an
operand nor allocated here, gives up: there is no plan, and every call runs as it is written.
"""

import functools
import itertools
import threading
from types import FunctionType
from typing import Any, NamedTuple

import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from triton.tools.tensor_descriptor import TensorDescriptor

from . import out_of_resources, plan_memory, workspace
from .plan_memory import address
from .surroundings import Surroundings

# The argument of a kernel that is the synchronisation words of its stream.
_WORDS = "sync_ptr"
# Of more arguments Python makes a list, one by one.
_MOST_ARGUMENTS = 30


class _OfThread(threading.local):
    recorder: Any = None


_of_thread = _OfThread()


def empty(like, *shape, dtype=None):
    """like.new_empty(shape), which a recorder notes."""
    made = like.new_empty(shape) if dtype is None else like.new_empty(shape, dtype=dtype)
    if _of_thread.recorder is not None:
        _of_thread.recorder.allocated(made)
    return made


def called(function, *args, **options):
    """function(*args, **options), which a recorder notes: a new tensor, or one of `args`."""
    made = function(*args, **options)
    if _of_thread.recorder is not None:
        _of_thread.recorder.called(function, args, options, made)
    return made


def launch(kernel, grid, *args, **constants):
    """kernel[grid](*args, **constants), which a recorder notes."""
    compiled = kernel[grid](*args, **constants)
    if _of_thread.recorder is not None:
        _of_thread.recorder.launched(kernel, compiled, grid, args, constants)


def give_up():
    """Let there be no plan of what a recorder notes: something else than the operation runs."""
    if _of_thread.recorder is not None:
        _of_thread.recorder.gives_up = True


def runner_of(kernel, compiled, constants):
    """What launches a compiled kernel: Triton's launcher, which takes its grid, stream, handles,
    metadata, hooks and arguments. `constants` are those of the launch, with its options."""
    return compiled.run


def are_possible():
    """Whether launches may be recorded: not in the interpreter, which compiles nothing, while a
    tuner tries what fits, nor while each of them is checked or observed."""
    runtime = triton.knobs.runtime
    return not (
        runtime.interpret
        or workspace.DEBUG
        or _of_thread.recorder is not None
        or out_of_resources.is_recording_drops()
        or _observes(runtime.launch_enter_hook)
        or _observes(runtime.launch_exit_hook)
    )


def _observes(hook):
    """Whether a hook of Triton's, None or a chain, calls anything."""
    return hook is not None and bool(getattr(hook, "calls", True))


class Plan:
    """The launches of an operation for one geometry of its operands."""

    __slots__ = ("_device", "_kind", "_multiplies", "_repeat", "_surroundings", "_words")

    def __init__(self, repeat, surroundings, device, words, multiplies):
        self._repeat, self._surroundings, self._words = repeat, surroundings, words
        self._device, self._kind, self._multiplies = device, device.type, multiplies

    def run(self, operands, seeds=(0, 0)):
        """The results for `operands`, in the order in which they were recorded; None if launches
        depend on something that has changed since."""
        surroundings = self._surroundings
        if workspace.DEBUG or not surroundings.hold():
            return None
        stream = surroundings.driver.get_current_stream(surroundings.device)
        words, kind = None, self._kind
        if self._words:
            words = workspace.words_of(self._device, stream, self._words, is_cuda=kind == "cuda")
        try:
            if self._multiplies and torch.is_autocast_enabled(kind):
                # It would cast operands of PyTorch's products.
                with torch.autocast(kind, enabled=False):
                    return self._repeat(operands, stream, words, seeds)
            return self._repeat(operands, stream, words, seeds)
        except BaseException:
            workspace.forget()
            raise


class _Known:
    """Memory of a tensor: of an operand or an allocation."""

    def __init__(self, name, tensor):
        self.name, self.dtype, self.device = name, tensor.dtype, tensor.device
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.start = tensor.data_ptr()
        last = sum([(n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)])
        self.stop = self.start + (last + 1) * tensor.element_size()
        # Memory, once released, may become that of a tensor which nobody noted.
        self.memory = StorageWeakRef(tensor.untyped_storage())

    def is_laid_out_as(self, tensor):
        return (self.dtype, self.shape, self.stride) == (
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
        )


class Recorder:
    """Notes the steps of one operation, as a context.

    operands: its tensors among other things, which must be the same in every call; seeds: the two
    words of every seed of dropout, which a plan is given anew. Of equal seeds a plan reads the
    first: they are equal whenever it runs.
    """

    def __init__(self, operands, seeds=(0, 0)):
        self._seeds = list(zip(seeds[::2], seeds[1::2], strict=True))
        self._steps: list[_Step] = []
        self._known: list[_Known] = []
        self._equal: list[tuple[str, str]] = []
        self._constants: dict[str, Any] = {}
        self._numbers = itertools.count()
        self._shapes: dict[str, Any] = {}
        self._exact: set[str] = set()
        self._used: set[str] = set()
        self._words, self._multiplies, self.gives_up = 0, False, False
        for i, operand in enumerate(operands):
            if isinstance(operand, torch.Tensor):
                self._add_operand(_Known(f"e{i}", operand))
        self._count = len(operands)
        self._surroundings = Surroundings(self._known[0].dtype)
        # Launches follow the operands to a device that is not the current one, plans do not.
        device = self._known[0].device
        self.gives_up |= device.type == "cuda" and device.index != self._surroundings.device

    def __enter__(self):
        _of_thread.recorder = self
        return self

    def __exit__(self, *exc):
        _of_thread.recorder = None

    def _add_operand(self, known):
        """Operands that are one tensor now may be two in another call, which a plan must notice."""
        twin = next((other for other in self._known if other.start == known.start), None)
        if twin is not None:
            self._equal.append((twin.name, known.name))
        self._known.append(known)
        self.gives_up |= known.start == 0

    def allocated(self, tensor):
        known = self._new(tensor)
        self.gives_up |= not tensor.is_contiguous()
        self._shapes[known.name] = tensor.shape
        allocate = self._constant(plan_memory.allocator(known.device))
        form = f"{allocate}({{}}, {{}}, {self._constant(known.dtype)})"
        self._steps.append(_Step(form, known.name, set()))

    def called(self, function, args, options, made):
        self._used, self._multiplies = set(), True
        code = [self._code(arg, exactly=True) for arg in args]
        code += [f"{name}={self._constant(value)}" for name, value in options.items()]
        code = f"{self._constant(function)}({', '.join(code)})"
        writes = any(made is arg for arg in args)
        name = None if writes or not isinstance(made, torch.Tensor) else self._new(made).name
        self._steps.append(_Step(code, name, self._used))

    def launched(self, kernel, compiled, grid, args, constants):
        if getattr(compiled, "packed_metadata", None) is None or callable(grid):
            self.gives_up = True
            return
        self._used = set()
        given = dict(zip(kernel.arg_names, args, strict=False)) | constants
        words = given.get(_WORDS)
        if words is not None:
            self._words = max(self._words, words.numel())
        seed = given.get("seed_low"), given.get("seed_high")
        i = self._seeds.index(seed) if seed in self._seeds else None
        codes = [self._argument(name, given[name], i) for name in kernel.arg_names]
        run = self._constant(runner_of(kernel, compiled, constants))
        front = [compiled.function, compiled.packed_metadata]
        front = [
            *(self._constant(n) for n in (*grid, 1, 1)[:3]),
            "stream",
            *map(self._constant, front),
        ]
        code = f"{run}({self._row([*front, 'None', 'None', 'None', *codes])})"
        checked = self._constant(kernel)
        guard = f"{checked}.pre_run_hooks or {checked}.hash is not {self._constant(kernel.hash)}"
        self._steps.append(_Step(code, None, self._used, guard))

    def plan(self, results):
        """A Plan that returns what `results` is, tensors in tuples and lists; None where the
        recorder gave up."""
        self._used = set()
        found = self._code(results, exactly=True, shapes=True)
        if self.gives_up:
            return None
        kept, lines = self._used, []
        read = kept.union(*(step.used for step in self._steps))
        # Memory that no launch was given.
        self._steps = [s for s in self._steps if s.makes not in self._shapes or s.makes in read]
        last = {name: i for i, step in enumerate(self._steps) for name in step.used}
        guards = dict.fromkeys(step.guard for step in self._steps if step.guard)
        guards |= dict.fromkeys(f"{a}.data_ptr() != {b}.data_ptr()" for a, b in self._equal)
        lines += [f"if {' or '.join(guards)}: return None"] if guards else []
        for i, step in enumerate(self._steps):
            code = step.code
            if step.makes in self._shapes:
                shape = self._shapes[step.makes]
                sizes = self._constant(tuple(shape)), self._constant(plan_memory.contiguous(shape))
                code = code.format(*sizes)
            lines.append(code if step.makes is None else f"{step.makes} = {code}")
            gone = [n for n in step.used if n[0] == "t" and last[n] == i and n not in kept]
            lines += [f"del {', '.join(sorted(gone))}"] if gone and i + 1 < len(self._steps) else []
        lines.append(f"return {found}")
        operands = ", ".join(f"e{i}" for i in range(self._count))
        words = ", ".join([f"seed_low_{i}, seed_high_{i}" for i in range(len(self._seeds))])
        # An activation whose layers are all computed elsewhere has no seeds.
        given_words = [f"{words} = seeds"] if words else []
        body = "\n    ".join([f"{operands}, = e", *given_words, *lines])
        names = {"new": tuple.__new__, "described": plan_memory.described}
        names |= {"address": address, "view": plan_memory.view()} | self._constants
        # Defaults, since what Python learns of global names holds for one of the plans that share
        # the code.
        given = ", ".join(names)
        code = _compiled(f"def repeat(e, stream, words, seeds, {given}):\n    {body}\n")
        repeat = FunctionType(code, {}, argdefs=tuple(names.values()))
        device = self._known[0].device
        return Plan(repeat, self._surroundings, device, self._words, self._multiplies)

    def _new(self, tensor):
        known = _Known(f"t{len(self._steps)}", tensor)
        self._known.append(known)
        self.gives_up |= known.start == 0
        return known

    def _argument(self, name, value, seed):
        """The source of an argument by its name; seed: the launch's, by its place, or None."""
        if name == _WORDS and value is not None:
            return "words"
        if name in ("seed_low", "seed_high") and seed is not None:
            return f"{name}_{seed}"
        return self._code(value)

    def _code(self, value, *, exactly=False, shapes=False):
        """The source of an argument; `exactly`: a tensor's shape matters, and not only its memory,
        which with `shapes` an allocation may take over."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value, exactly=exactly, shapes=shapes)
        if isinstance(value, TensorDescriptor):
            fields = self._constant({k: v for k, v in vars(value).items() if k != "base"})
            return f"described({fields}, {self._tensor(value.base, described=True)})"
        if isinstance(value, list):
            return f"[{', '.join([self._code(v, exactly=exactly, shapes=shapes) for v in value])}]"
        if isinstance(value, tuple) and _has_tensor(value):
            whole = f"({self._row([self._code(v, exactly=exactly, shapes=shapes) for v in value])})"
            plain = type(value) is tuple
            return whole if plain else f"new({self._constant(type(value))}, {whole})"
        return self._constant(value)

    def _tensor(self, tensor, *, exactly=False, shapes=False, described=False):
        start = tensor.data_ptr()
        found = [k for k in self._known if k.start <= start < k.stop and not k.memory.expired()]
        exact = [k for k in found if k.start == start]
        if not found or (not exact and len(found) > 1):
            self.gives_up = True
            return "None"
        known = (exact or found)[0]
        if exact and exactly:
            known = next((k for k in exact if k.is_laid_out_as(tensor)), known)
        self._used.add(known.name)
        if exact and (not exactly or known.is_laid_out_as(tensor)):
            if exactly:
                self._exact.add(known.name)
            return known.name
        if exact and shapes and self._takes_over(known, tensor):
            return known.name
        self.gives_up |= known.dtype != tensor.dtype
        where = self._constant(tuple(tensor.shape)), self._constant(tensor.stride())
        offset = start - known.start
        if not exactly and not described:
            return f"address({known.name}, {self._constant(offset)}, {', '.join(where)})"
        offset = self._constant(offset // tensor.element_size())
        return f"view({known.name}, {', '.join(where)}, {offset})"

    def _takes_over(self, known, tensor):
        """Whether the allocation may have the shape of a result that is all of it: launches take
        its memory alone, while PyTorch's functions, and other results, may need its own shape."""
        whole = tensor.is_contiguous() and tensor.numel() == known.shape.numel()
        free = known.name in self._shapes and known.name not in self._exact
        if not free or not whole or known.dtype != tensor.dtype:
            return False
        self._shapes[known.name] = known.shape = tensor.shape
        known.stride = tensor.stride()
        self._exact.add(known.name)
        return True

    def _constant(self, value):
        """A name for a value: sources of the same steps are equal whatever the numbers are."""
        if value is None:
            return "None"
        name = f"c{next(self._numbers)}"
        self._constants[name] = value
        return name

    def _row(self, codes):
        """The source of arguments, each constant of which has one use: those in a row are one."""
        shortest, found = 2 if len(codes) > _MOST_ARGUMENTS else 8, []
        for constant, group in itertools.groupby(codes, lambda code: self._is_constant(code)):
            names = list(group)
            if constant and len(names) >= shortest:
                names = [f"*{self._constant(tuple(self._constants.pop(n, None) for n in names))}"]
            found += names
        return "".join(f"{code}, " for code in found)

    def _is_constant(self, code):
        return code == "None" or code in self._constants


class _Step(NamedTuple):
    """The source of a step, the allocation that it makes and those that it uses, and the condition
    under which no step may be repeated."""

    code: str
    makes: str | None
    used: set[str]
    guard: str | None = None


@functools.lru_cache(maxsize=256)
def _compiled(source):
    """The code of the one function that `source` defines."""
    return compile(source, "<launch plan>", "exec").co_consts[0]


def _has_tensor(value):
    if isinstance(value, (tuple, list)):
        return any(map(_has_tensor, value))
    return isinstance(value, (torch.Tensor, TensorDescriptor))
