"""Compares random templates with Python.

    python fuzz.py PROGRAM COUNT [SEED] [--save FILE N]

PROGRAM is the example `render_lines`. `--save` writes N of the cases with Python's results into a fixture.
"""

import json
import random
import sys

import compare
import reference

NAMES = ["messages", "tools", "nope", "bos_token", "s", "l", "d", "n", "f", "t", "u"]
PRELUDE = (
    "{% set s = 'Hello, wörld' %}{% set l = [3, 1, 2] %}{% set d = {'b': 1, 'a': [2, none], 3: 'x'} %}"
    "{% set n = 7 %}{% set f = -2.5 %}{% set t = (1, 'a', none) %}{% set u = ['b', 'A', 'c', 'a'] %}"
)
STRINGS = [
    "", "a", "abc", "Hello World", " \\n x \\t", "a,b,,c", "it\\'s", "q\\\"", "é😀", "ß", "İ", "ΑΣ", "12", "-3.5", "0x1F", " 7 ",
    "%s", "%d|%5.2f", "%(a)s", "{} {}", "{0!r:>5}", "a\\r\\nb\\x0bc\\u2028d", "tab\\there", "<b>&", "x-y_z (w)", "1_000", "nan", "²",
]
NUMBERS = ["0", "1", "2", "-1", "3", "7", "10", "100", "-5", "0.0", "0.5", "2.5", "-1.5", "1e16", "1e-7", "123456789.123", "1e300"]
FILTERS = [
    "abs", "attr('x')", "batch(2)|list", "batch(2, 'z')|list", "capitalize", "center(9)", "count", "d('D')", "default('D', true)",
    "dictsort", "dictsort(true, 'value')", "dictsort(reverse=true)", "e", "filesizeformat", "first", "float", "float(1)", "format(1, 'a')",
    "groupby(0)", "indent", "indent(2, true)", "indent('> ', blank=true)", "int", "int(5, 16)", "int(base=0)", "items|list", "join",
    "join('-')", "last", "length", "list", "lower", "map('upper')|list", "map('string')|list", "map(attribute=0)|list", "max", "min",
    "reject|list", "reject('none')|list", "replace('a', 'bb')", "replace('l', 'L', 1)", "reverse|list", "round", "round(1)",
    "round(2, 'floor')", "round(method='ceil')", "safe", "select|list", "select('string')|list", "selectattr(0)|list", "slice(2)|list",
    "slice(3, 'f')|list", "sort", "sort(reverse=true)", "sort(case_sensitive=true)", "string", "striptags", "sum", "sum(start=2)", "title",
    "tojson", "tojson(indent=2)", "tojson(sort_keys=true)", "tojson(separators=(',', ':'), ensure_ascii=true)", "trim", "trim('aH')",
    "truncate(5)", "truncate(5, true, '.', 0)", "unique|list", "unique(true)|list", "upper", "urlencode", "wordcount", "wordwrap(4)",
    "wordwrap(5, false)", "xmlattr", "map('int')|sum", "map('length')|list", "reject('odd')|list", "select('gt', 1)|list", "reverse",
]
METHODS = [
    "capitalize()", "casefold()", "center(8, '*')", "count('l')", "count('')", "encode()", "endswith('d')", "endswith(('x', 'c'))",
    "expandtabs(4)", "find('l')", "find('l', 4)", "find('', 99)", "format(1, 2)", "format(a=1)", "index('l')", "isalnum()", "isalpha()",
    "isascii()", "isdecimal()", "isdigit()", "isidentifier()", "islower()", "isnumeric()", "isprintable()", "isspace()", "istitle()",
    "isupper()", "join(['x', 'y'])", "join(u)", "ljust(7)", "ljust(7, '.')", "lower()", "lstrip()", "lstrip('H ')", "partition('l')",
    "removeprefix('a')", "removesuffix('c')", "replace('l', 'L')", "replace('', '-')", "replace('l', 'L', 1)", "rfind('l')",
    "rfind('l', 0, 4)", "rindex('o')", "rjust(7)", "rpartition('l')", "rsplit()", "rsplit(none, 1)", "rsplit(',', 1)", "rstrip()",
    "split()", "split(',')", "split(',', 1)", "split(maxsplit=1)", "splitlines()", "splitlines(true)", "startswith('a')",
    "startswith('l', 2)", "startswith(('a', 'H'), 0, -1)", "strip()", "strip('aH')", "swapcase()", "title()", "upper()", "zfill(6)",
    "copy()", "count(1)", "index(1)", "index(2, 1)", "get('a')", "get('z', 'Z')", "get(3)", "keys()|list", "values()|list", "items()|list",
    "keys()", "items()", "append(1)", "pop()", "update({})", "role", "content", "x", "items", "a", "b", "is_integer()", "bit_length()", "real",
]
TESTS = [
    "boolean", "callable", "defined", "divisibleby 2", "divisibleby(3)", "eq 1", "equalto('a')", "escaped", "even", "false", "filter",
    "float", "ge 1", "gt 1", "in [1, 'a']", "in 'abc'", "integer", "iterable", "le 2", "lower", "lt 2", "mapping", "ne 1", "none", "number",
    "odd", "sameas none", "sequence", "string", "test", "true", "undefined", "upper", "not defined", "not none", "not in l",
]
SPECS = ["", "5", "<5", ">8", "^7", "*^9", "05", "+", "+.2f", ".3", ".2f", "e", ".1e", "g", ".3g", "%", ",", "_", ",.2f", "d", "x", "#x", "08b",
         "c", "s", ".2s", "010,", "n", "o", "#o", "=+8", "X", "10.3f", "z", "G"]
PERCENTS = ["%s", "%r", "%d", "%5d", "%-5d|", "%05d", "%+d", "% d", "%.3d", "%x", "%#x", "%X", "%o", "%#o", "%e", "%.2e", "%f", "%.0f", "%#.0f",
            "%8.3f", "%-8.2f|", "%08.2f", "%+.1f", "%g", "%.3g", "%#g", "%G", "%c", "%5s", "%-5s|", "%.2s", "%%", "%i", "%u", "%a", "%*d", "%.*f"]


class Maker:
    def __init__(self, rng):
        self.rng = rng

    def pick(self, items):
        return self.rng.choice(items)

    def literal(self):
        kind = self.rng.randrange(8)
        if kind < 3:
            return "'" + self.pick(STRINGS) + "'"
        if kind < 6:
            return self.pick(NUMBERS)
        return self.pick(["true", "false", "none", "[]", "{}", "()"])

    def expression(self, depth):
        rng = self.rng
        if depth <= 0:
            return self.literal() if rng.random() < 0.5 else self.pick(NAMES)
        e = lambda: self.expression(depth - 1 - rng.randrange(2))
        kind = rng.randrange(22)
        if kind == 0:
            return f"{e()} {self.pick(['+', '-', '*', '/', '//', '%', '**', '~'])} {e()}"
        if kind == 1:
            return f"({e()} {self.pick(['+', '-', '*', '%', '~', 'and', 'or'])} {e()})"
        if kind == 2:
            return f"{e()} {self.pick(['==', '!=', '<', '<=', '>', '>=', 'in', 'not in'])} {e()}"
        if kind == 3:
            return f"{e()} < {e()} {self.pick(['<', '==', 'in'])} {e()}"
        if kind == 4:
            return f"{self.pick(['not ', '-', '+'])}{e()}"
        if kind in (5, 6, 7):
            return f"({e()})|{self.pick(FILTERS)}"
        if kind in (8, 9, 10):
            return f"({e()}).{self.pick(METHODS)}"
        if kind == 11:
            return f"({e()} is {self.pick(TESTS)})"
        if kind == 12:
            return f"({e()} if {e()} else {e()})" if rng.random() < 0.8 else f"({e()} if {e()})"
        if kind == 13:
            return "[" + ", ".join(e() for _ in range(rng.randrange(4))) + "]"
        if kind == 14:
            return "{" + ", ".join(f"{e()}: {e()}" for _ in range(rng.randrange(4))) + "}"
        if kind == 15:
            return "(" + ", ".join(e() for _ in range(rng.randrange(2, 4))) + ")"
        if kind == 16:
            index = self.pick(["0", "1", "-1", "99", "'a'", "'b'", "'role'", "3", "none", "1.0", "true"])
            return f"({e()})[{index}]"
        if kind == 17:
            part = lambda: self.pick(["", "", "0", "1", "-1", "2", "-2", "9", "-9", "none"])
            step = self.pick(["", "", ":", ":1", ":2", ":-1", ":-2", ":0", ":none"])
            # Jinja folds a slice of a constant in another way than it evaluates one.
            return f"({self.pick(NAMES)}|d({e()}))[{part()}:{part()}{step}]"
        if kind == 18:
            return f"'{self.pick(PERCENTS)}' % {self.pick([e(), f'({e()},)', f'({e()}, {e()})'])}"
        if kind == 19:
            return f"'{{:{self.pick(SPECS)}}}'.format({e()})"
        if kind == 20:
            return self.pick([f"dict(a={e()})", f"range({self.pick(['3', '1, 4', '5, 0, -2', '0'])})", f"dict({e()})", "namespace(a=1).a"])
        return f"({e()})"

    def body(self, depth):
        return "".join(self.statement(depth) for _ in range(self.rng.randrange(1, 4)))

    def text(self):
        return self.pick(["x", " y ", "\n", "  \n  ", "\t", "a\nb", "", "-"])

    def statement(self, depth):
        rng = self.rng
        sign = lambda: self.pick(["", "", "", "-", "+"])
        end = lambda: self.pick(["", "", "", "-"])
        tag = lambda inner: f"{{%{sign()} {inner} {end()}%}}"
        kind = rng.randrange(16) if depth > 0 else rng.randrange(3)
        e = lambda: self.expression(rng.randrange(2))
        b = lambda: self.body(depth - 1)
        name = lambda: self.pick(["x", "y", "s", "n", "v"])
        if kind == 0:
            return self.text()
        if kind == 1:
            return f"{{{{{self.pick(['', '-'])} {self.pick([e(), 'x', 'y', 'v', 'loop.index', 'n'])} {end()}}}}}"
        if kind == 2:
            return tag(f"set {name()} = {e()}")
        if kind in (3, 4):
            middle = tag("else") + b() if rng.random() < 0.5 else ""
            more = tag(f"elif {e()}") + b() if rng.random() < 0.3 else ""
            return tag(f"if {e()}") + b() + more + middle + tag("endif")
        if kind in (5, 6, 7):
            test = f" if {self.pick(['v', 'loop is defined', e(), 'v is string', 'x'])}" if rng.random() < 0.3 else ""
            middle = tag("else") + b() if rng.random() < 0.3 else ""
            iterable = self.pick(["l", "u", "range(3)", "'ab'", "messages", "d", "nope", "t", e(), "l|reverse", "u|map('upper')"])
            inner = b() + (self.pick(["{% break %}", "{% continue %}", "{% if v == 1 %}{% break %}{% endif %}"]) + b() if rng.random() < 0.2 else "")
            show = self.pick(["", "{{ loop.last }}", "{{ loop.length }}", "{{ loop.previtem }}", "{{ loop.nextitem }}", "{{ loop.cycle('p', 'q') }}",
                              "{{ loop.changed(v) }}", "{{ loop.revindex }}", "{{ v }}"])
            return tag(f"for v in {iterable}{test}") + show + inner + middle + tag("endfor")
        if kind == 8:
            args = self.pick(["", "x", "x, y=2", "x=n, y=x", "v"])
            call = self.pick(["f()", "f(1)", "f(1, 2)", "f(y=3)", "f(x=1, y=2)", "f(1, z=4)"])
            extra = self.pick(["", "{{ varargs }}", "{{ kwargs }}", "{{ caller is defined }}", "{{ x }}{{ y }}"])
            return tag(f"macro f({args})") + extra + b() + tag("endmacro") + f"{{{{ {call} }}}}"
        if kind == 9:
            return tag(f"macro g(k=1)") + "<{{ caller(k) }}>" + tag("endmacro") + tag("call(q=0) g()") + "{{ q }}" + b() + tag("endcall")
        if kind == 10:
            return tag(f"with {name()} = {e()}, w = {e()}") + b() + "{{ w }}" + tag("endwith")
        if kind == 11:
            return tag(f"filter {self.pick(['upper', 'trim', 'indent', 'title', 'replace(s, n|string)'])}") + b() + tag("endfilter")
        if kind == 12:
            return tag(f"set {name()}" + self.pick(["", " | upper", " | trim | length"])) + b() + tag("endset")
        if kind == 13:
            return tag("set ns = namespace(c=0)") + tag("for v in l") + tag("set ns.c = ns.c + v") + b() + tag("endfor") + "{{ ns.c }}"
        if kind == 14:
            return self.pick([f"{{#{sign()} c {end()}#}}", "{% raw %}{{ x }}{% endraw %}", "{%- raw -%} {% x {%- endraw -%}", "{% generation %}" + b() + "{% endgeneration %}"])
        return tag(f"set x, y = {self.pick(['1, 2', 'l', '(n, s)', 'u[:2]', e()])}")

    def template(self):
        if self.rng.random() < 0.6:
            return PRELUDE + "{{ " + self.expression(self.rng.randrange(1, 5)) + " }}"
        return PRELUDE + self.body(3)


def main():
    program, count = sys.argv[1], int(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 and sys.argv[3].isdigit() else 0
    maker = Maker(random.Random(seed))
    templates = [maker.template() for _ in range(count)]
    if "--save" in sys.argv:
        path, number = sys.argv[sys.argv.index("--save") + 1 :][:2]
        results = [{"template": t, **reference.render(t)} for t in templates]
        # As many that render as fail, so that the fixture shows both.
        volatile = [r for r in results if "ok" in r and (" at 0x" in r["ok"] or len(r["ok"]) > 2000)]
        fine = [r for r in results if "ok" in r and r not in volatile]
        bad = [r for r in results if "error" in r]
        chosen = fine[: int(number) * 3 // 4] + bad[: int(number) // 4]
        lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in chosen)
        variables = json.dumps(reference.VARIABLES, ensure_ascii=False)
        open(path, "w").write(f'{{"variables": {variables},\n"cases": [\n{lines}\n]}}\n')
        print(f"{len(chosen)} cases saved")
        return
    found = compare.differences(program, [(t, reference.VARIABLES) for t in templates])
    for template, _, mine, python in found[:60]:
        print(template.removeprefix(PRELUDE))
        print("   ours  ", json.dumps(mine, ensure_ascii=False)[:300])
        print("   python", json.dumps(python, ensure_ascii=False)[:300])
    print(f"seed {seed}: {count} templates, {len(found)} differ")


if __name__ == "__main__":
    main()
