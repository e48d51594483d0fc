"""PTX text → kernels: instructions with resolved registers and labels.

Only what a compiled Triton kernel contains is understood: .entry functions, .shared, .global and
.const variables, .reg declarations (also in nested scopes), labels, .loc lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .instructions import Instruction, Kernel, Module, Param, Variable
from .operands import PTXSyntaxError, Scope, operand, split
from .types import REG_TYPES, TYPE_SIZE

_LABEL = re.compile(r"\s*([A-Za-z_$%][\w$]*)\s*:(?!:)")
_FUNCTION = re.compile(r"\.(entry|func)\b")
_HEADER = re.compile(r"\s*\.(version|target|address_size|file)\b")
_FILE = re.compile(r"^\s*\.file\s+(\d+)\s+\"([^\"]*)\"", re.M)
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_PREDICATED = re.compile(r"@(!?)\s*([%\w$]+)\s+(.*)$")
_VARIABLE = re.compile(
    r"^((?:\.(?:visible|extern|weak|common)\s+)*)\.(shared|global|const|local)\s*"
    r"((?:\.align\s+\d+\s*)?)\.(\w+)\s+([\w$%]+)\s*(\[\s*\d*\s*\])?\s*(?:=\s*(.*))?$",
    re.S,
)
_IGNORED = (".pragma", ".file", ".param", ".callprototype", ".alias")


def parse(text: str) -> Module:
    """The kernels of a PTX file; without device functions, whose calls raise. PTXSyntaxError."""
    module = Module()
    files = {int(number): path for number, path in _FILE.findall(text)}
    clean = _without_comments(text)
    debug = re.search(r"^\s*\.section\b", clean, re.M)  # nothing of interest comes after it
    if debug:
        clean = clean[: debug.start()]
    at = 0
    while found := _FUNCTION.search(clean, at):
        _add_variables(module, clean[at : found.start()])
        opening, semicolon = clean.find("{", found.end()), clean.find(";", found.end())
        if found.group(1) == "func" and semicolon > -1 and (opening < 0 or semicolon < opening):
            at = semicolon + 1  # a declaration
            continue
        closing = _closing_brace(clean, opening)
        if found.group(1) == "entry":
            kernel = _head(clean[found.end() : opening])
            kernel.variables = dict(module.variables)
            line = clean.count("\n", 0, opening + 1) + 1
            _Body(kernel, files).read(clean[opening + 1 : closing], line)
            module.kernels[kernel.name] = kernel
        at = closing + 1
    _add_variables(module, clean[at:])
    return module


def _without_comments(text: str) -> str:
    text = _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)
    return re.sub(r"//[^\n]*", "", text)


def _closing_brace(text: str, opening: int) -> int:
    depth = 0
    for found in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if found.group() == "{" else -1
        if depth == 0:
            return found.start()
    raise PTXSyntaxError("unbalanced braces")


def _add_variables(module: Module, text: str) -> None:
    for statement in text.split(";"):
        lines = [
            line for line in statement.splitlines() if line.strip() and not _HEADER.match(line)
        ]
        variable = _variable("\n".join(lines))
        if variable:
            module.variables[variable.name] = variable


def _variable(statement: str) -> Variable | None:
    found = _VARIABLE.match(statement.strip())
    if not found:
        return None
    linkage, space, align, type_, name, dimension, init = found.groups()
    count = int(dimension.strip("[] \t\n") or 0) if dimension else 1
    data = None
    if init is not None:
        size = TYPE_SIZE[type_]
        values = [value.strip() for value in init.strip().strip("{}").split(",") if value.strip()]
        try:
            numbers = [int(value, 0) for value in values]
        except ValueError:  # addresses of other variables
            return Variable(name, space, 0, 1, False, None)
        data = b"".join((n & (256**size - 1)).to_bytes(size, "little") for n in numbers)
        count = max(count, len(values))
    alignment = int(align.split()[-1]) if align.strip() else 1
    return Variable(name, space, TYPE_SIZE[type_] * count, alignment, "extern" in linkage, data)


def _head(text: str) -> Kernel:
    """The name, the parameters and the number of threads before a kernel's body."""
    found = re.match(r"\s*([\w$]+)\s*(\((.*?)\))?", text, re.S)
    assert found
    params: list[Param] = []
    offset = 0
    for declaration in (found.group(3) or "").split(","):
        if declaration.strip():
            param = _param(declaration.split())
            param.offset = -(-offset // param.align) * param.align
            offset = param.offset + param.size
            params.append(param)
    kernel = Kernel(found.group(1), params)
    threads = re.search(r"\.(reqntid|maxntid)\s+([\d, ]+)", text)
    if threads:
        kernel.threads = 1
        for number in threads.group(2).replace(" ", "").strip(",").split(","):
            kernel.threads *= int(number)
    return kernel


def _param(words: list[str]) -> Param:
    """`.param .align 64 .b8 name[128]`; what comes after `.ptr` is of the memory it points to."""
    words = words[1:]
    name = words[-1]
    before = words[: words.index(".ptr")] if ".ptr" in words else words
    align = int(before[before.index(".align") + 1]) if ".align" in before else None
    type_ = next(word[1:] for word in words if word[1:] in TYPE_SIZE and word.startswith("."))
    count = 1
    array = re.match(r"([\w$]+)\[(\d+)\]$", name)
    if array:
        name, count = array.group(1), int(array.group(2))
    return Param(name, type_, count, align or TYPE_SIZE[type_])


@dataclass(frozen=True)
class _Statement:
    text: str
    line: int
    scope: Scope
    is_label: bool = False


class _Body:
    """Reads the statements of a kernel into it."""

    def __init__(self, kernel: Kernel, files: dict[int, str]) -> None:
        self.kernel = kernel
        self.files = files
        self.loc: tuple[str, int] | None = None
        self.label = ""

    def read(self, body: str, line: int) -> None:
        # Labels are known before the first statement is read: branches go forwards, too.
        for statement in list(_scoped(body, line)):
            if statement.is_label:
                self.label = statement.scope.unique(statement.text)
                self.kernel.labels[self.label] = len(self.kernel.instructions)
            elif statement.text[0] == ".":
                self._directive(statement)
            else:
                self.kernel.instructions.append(_instruction(statement, self.loc))

    def _directive(self, statement: _Statement) -> None:
        word, rest = [*statement.text.split(None, 1), ""][:2]
        if word == ".reg":
            self._registers(rest, statement.scope)
        elif word == ".loc":
            file, line = rest.split()[:2]
            self.loc = (self.files.get(int(file), "?").rsplit("/", 1)[-1], int(line))
        elif word == ".branchtargets":
            targets = [statement.scope.label(name.strip()) for name in rest.split(",")]
            self.kernel.tables[self.label] = [target for target in targets if target]
        elif word not in _IGNORED:
            variable = _variable(statement.text)
            if variable is None:
                raise PTXSyntaxError(f"directive {statement.text!r} at line {statement.line}")
            self.kernel.variables[variable.name] = variable

    def _registers(self, declared: str, scope: Scope) -> None:
        found = re.match(r"(?:\.v[24]\s+)?\.(\w+)\s+(.*)$", declared, re.S)
        assert found
        for name in found.group(2).split(","):
            name = name.strip()
            many = re.match(r"^(.*?)<(\d+)>$", name)
            names = [f"{many.group(1)}{i}" for i in range(int(many.group(2)))] if many else [name]
            for each in names:
                scope.regs[each] = len(self.kernel.regs)
                self.kernel.regs.append(REG_TYPES[found.group(1)])


def _scoped(body: str, line: int) -> Iterator[_Statement]:
    """Statements and labels with the scope that each is in."""
    scope, scopes = Scope(None, 0), 0
    for kind, text, at in _tokens(body, line):
        if kind == "{":
            scopes += 1
            scope = Scope(scope, scopes)
        elif kind == "}":
            assert scope.parent
            scope = scope.parent
        else:
            if kind == "label":
                scope.labels.add(text)
            yield _Statement(text, at, scope, kind == "label")


def _tokens(body: str, line: int) -> Iterator[tuple[str, str, int]]:
    """(kind, text, line), kind being "{", "}", "label" or "statement"."""
    i = 0
    while i < len(body):
        char = body[i]
        if char.isspace() or char == ";":
            line += char == "\n"
            i += 1
        elif char in "{}":
            yield char, "", line
            i += 1
        elif body.startswith((".loc ", ".loc\t", ".file"), i):  # these end with their line
            end = body.find("\n", i)
            end = len(body) if end < 0 else end
            yield "statement", body[i:end], line
            i = end
        elif found := _LABEL.match(body, i):
            yield "label", found.group(1), line
            i = found.end()
        else:
            end = body.find(";", i)
            if end < 0:
                raise PTXSyntaxError(
                    f"no end of the statement at line {line}: {body[i : i + 80]!r}"
                )
            yield "statement", body[i:end].strip(), line
            line += body.count("\n", i, end)
            i = end + 1


def _instruction(statement: _Statement, loc: tuple[str, int] | None) -> Instruction:
    scope = statement.scope
    text = body = " ".join(statement.text.split())
    where = f"in {text!r} at line {statement.line}"
    pred = None
    found = _PREDICATED.match(text)
    if found:
        register = scope.reg(found.group(2))
        if register is None:
            raise PTXSyntaxError(f"unknown predicate {where}")
        pred = (register, bool(found.group(1)))
        body = found.group(3)
    full, *rest = body.split(None, 1)
    try:
        args = [operand(part, scope) for part in split(rest[0])] if rest else []
    except PTXSyntaxError as error:
        raise PTXSyntaxError(f"{error} {where}") from error
    op = full.split(".")[0]
    if op == "bra" or (op == "brx" and len(args) == 2):
        label = scope.label(args[-1][1])
        if label is None:
            raise PTXSyntaxError(f"unknown label {where}")
        args[-1] = ("s", label)
    return Instruction(full, args, pred, text, loc, statement.line)
