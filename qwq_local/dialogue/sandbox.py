"""A chat template from somebody else's file, rendered within bounds of time and size.

A template's source and its variables come in; the rendered text goes out, or a TemplateError. The only
module, with its meter, that imports jinja2. Knows no messages and no tokens.

Jinja's sandbox keeps a template from Python's internals, but not from the processor and the memory. Here
the template is parsed, and its tree rewritten so that everything which can take time or make something
large is counted: loops, macros and output tick and are measured; `~`, literals and slices become measured
filters; calls, operators and filters are measured where Jinja lets an environment intercept them. Filters
and attributes are those that chat templates use, and no others. What stays unmeasured is one primitive
operation on operands that were measured, so the clock is at most a fraction of a second late.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from qwq_local.dialogue.foreign import ForeignText, escape_places, text_of, width
from qwq_local.dialogue.meter import MAX_INT_BITS, Meter
from qwq_local.errors import TemplateError

MAX_SOURCE = 64 * 1024
MAX_RANGE = 10_000


_FILTERS = """abs capitalize count d default dictsort first float int items last length list lower map
    max min reject rejectattr reverse select selectattr sort title trim unique upper"""
_ATTRIBUTES: dict[type, str] = {
    str: """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower
        isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace
        rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper""",
    dict: "get items keys values",
    list: "count index",
    tuple: "count index",
    LoopContext: """changed cycle depth depth0 first index index0 last length nextitem previtem revindex
        revindex0""",
}
# Names with a space: the rewritten tree can name these filters, a template's own text cannot.
_TICK, _WRITTEN, _MEASURED, _JOINED = "on tick", "on written", "on measured", "on joined"
_WIDE = re.compile(r"%(?:\([^)]*\))?[^a-zA-Z%]*(?:\*|[0-9]{3})")
_DATE_FORMAT = re.compile(r"(?:[^%]|%-?[A-Za-z%]){0,100}")


class Sandbox:
    """One compiled template. Raises TemplateError for one that is too long or is not a template."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"The chat template has {len(source):,} characters, {MAX_SOURCE:,} are allowed."
            )
        self._environment = _MeteredEnvironment()
        self._lock = threading.Lock()
        try:
            tree = self._environment.parse(source)
            self._template = self._environment.from_string(_Instrumented().visit(tree))
        except TemplateError:
            raise
        except Exception as error:
            raise TemplateError(f"The chat template does not compile: {_reason(error)}") from error

    def render(self, variables: Mapping[str, object], n_texts: int) -> str:
        """The rendered text. `n_texts` foreign texts are in the variables: more of them, more is allowed."""
        with self._lock:
            self._environment.meter = Meter(n_texts)
            try:
                return self._template.render(variables)
            except TemplateError:
                raise
            except Exception as error:
                raise TemplateError(f"The chat template does not render: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The error as one line without place holders."""
    text = "".join(character if character.isprintable() else " " for character in str(error)[:300])
    return f"{type(error).__name__}: {' '.join(text.split())}"


class _Instrumented(NodeTransformer):
    """Rewrites a template's tree so that what it makes is measured while it renders."""

    def _wrapped(self, node: nodes.Expr, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def _ticking(self, node: Any) -> Any:
        self.generic_visit(node)
        tick = self._wrapped(nodes.Const(None, lineno=node.lineno), _TICK)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _ticking  # noqa: N815

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [
            self._wrapped(
                nodes.Const(child.data, lineno=child.lineno)
                if isinstance(child, nodes.TemplateData)
                else child,
                _WRITTEN,
            )
            for child in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return self._wrapped(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return self._wrapped(node, _MEASURED) if isinstance(node.arg, nodes.Slice) else node

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        return node if is_target else self._wrapped(node, _MEASURED)

    visit_List = visit_Tuple = visit_Dict = _literal  # noqa: N815


class _MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, with the meter in every interception it offers."""

    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            cache_size=0,
            extensions=["jinja2.ext.loopcontrols"],
        )
        self.meter = Meter(0)
        known = self.filters
        self.filters = {name: self._metered(known[name]) for name in _FILTERS.split()} | {
            "join": self._join,
            "replace": self._replace,
            "safe": pass_context(lambda _, value: value),
            "tojson": self._to_json,
            _TICK: pass_context(lambda _, value: self.meter.tick()),
            _WRITTEN: pass_context(lambda _, value: self.meter.measure(value, printable=True)),
            _MEASURED: pass_context(lambda _, value: self.meter.measure(value)),
            "string": pass_context(lambda _, value: self._string(value)),
            _JOINED: pass_context(lambda _, values: self._join(None, values)),
        }
        self.globals = {
            "namespace": Namespace,
            "range": self._range,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter with its arguments and its result measured, called as Jinja would call it."""
        passed = getattr(function, "jinja_pass_arg", None)

        @pass_context
        def call(context: Context, *args: Any, **options: Any) -> Any:
            self.meter.measure((args, options))
            first: dict[str, tuple[Any, ...]] = {
                "context": (context,),
                "eval_context": (context.eval_ctx,),
                "environment": (self,),
            }
            extra = first[passed.name] if passed is not None else ()
            return self.meter.measure(function(*extra, *args, **options))

        return call

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Only what chat templates use: no method that formats, pads or encodes."""
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, Namespace):
            return True
        return any(isinstance(obj, kind) and attr in names.split() for kind, names in _ATTRIBUTES.items())

    def wrap_str_format(self, value: Any) -> None:
        """Nothing: `format` is not among the attributes, since a field's width has no bound."""

    def call(self, context: Context, obj: Any, /, *args: Any, **options: Any) -> Any:
        """Calls with measured arguments, measures the result, and sees the amplifying methods coming."""
        self.meter.measure((args, options))
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "join" and len(args) == 1:
            return self._join(context, args[0], owner)
        if isinstance(owner, str) and name == "replace":
            return self._replace(context, owner, *args, **options)
        return self.meter.measure(super().call(context, obj, *args, **options))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Operators whose result is bounded before it is made."""
        if isinstance(left, int) and isinstance(right, int):
            factor = right if operator == "**" else 1
            bits = left.bit_length() * max(factor, 0) + (right.bit_length() if factor == 1 else 0)
            if operator in ("*", "**") and bits > MAX_INT_BITS:
                raise TemplateError(f"The chat template computes with more than {MAX_INT_BITS} bits.")
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(sequence, str | list | tuple):
                    n_items = width(sequence) if isinstance(sequence, str) else len(sequence)
                    self.meter.check(n_items * times)
        elif operator == "%" and isinstance(left, str):
            self.meter.measure(right, printable=True)
            if _WIDE.search(str.__str__(left)):
                raise TemplateError("The chat template pads to a width without a bound. Use another GGUF.")
        return self.meter.measure(super().call_binop(context, operator, left, right))

    def _range(self, *args: int) -> range:
        made = range(*args)
        if len(made) > MAX_RANGE:
            raise TemplateError(f"The chat template loops {len(made):,} times, {MAX_RANGE:,} are allowed.")
        return made

    def _string(self, value: object) -> str:
        self.meter.measure(value, printable=True)
        return value if isinstance(value, str) else str(value)

    @pass_context
    def _join(
        self, context: Context | None, values: Iterable[Any], d: str = "", attribute: str | None = None
    ) -> Any:
        items = list(values)
        if attribute is not None:
            items = [self.getattr(item, attribute) for item in items]
        pieces = [self._string(item) for item in items]
        self.meter.check(sum(width(piece) for piece in pieces) + width(d) * len(pieces))
        return self.meter.measure(str.join(d, pieces))

    @pass_context
    def _replace(self, context: Context, value: object, old: str, new: str, count: int | None = None) -> Any:
        source = self._string(value)
        if not isinstance(source, ForeignText):
            longer = max(0, width(new) - width(old))
            self.meter.check(width(source) + longer * str.count(source, old))
            return self.meter.measure(str.replace(source, old, new, -1 if count is None else count))
        inside, former, latter = (cast(str, text_of(text)) for text in (source, old, new))
        longer = max(0, len(latter) - len(former)) * inside.count(former)
        if longer > len(inside):  # up to its own size again, the budget of the foreign texts decides
            self.meter.check(longer)
        return self.meter.measure(source.replace(old, new, -1 if count is None else count))

    @pass_context
    def _to_json(
        self,
        context: Context,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON as transformers writes it for chat templates; non-ASCII text always stays readable."""
        self.meter.measure((value, separators), printable=True)
        if indent is not None and not 0 <= indent <= 8:
            raise TemplateError(f"The chat template indents JSON by {indent}; 0 to 8 are allowed.")
        text = json.dumps(
            value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return escape_places(text)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if not _DATE_FORMAT.fullmatch(pattern):
        raise TemplateError("The chat template asks for a date in a format that is not allowed.")
    return datetime.now().astimezone().strftime(pattern)
