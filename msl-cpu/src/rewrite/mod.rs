//! The source pre-pass: preprocessed MSL in, C++17 out.
//!
//! MSL is C++14 plus a few things no C++ compiler accepts. This pass works on tokens (not on a
//! syntax tree) and changes only those, keeping every line where it was, so compiler errors and
//! run-time reports name lines of the original .metal file:
//!
//! * address spaces: `device`/`thread` go, `constant` becomes `const`, `threadgroup` goes in types;
//! * `threadgroup T a[N];` inside a kernel becomes a reference to storage the runtime owns;
//! * attributes are removed; the ones on kernels and their parameters end up in tables;
//! * every kernel gets a thunk that fetches its arguments from the runtime; explicit
//!   instantiations with `[[host_name("x")]]` become further entries in the same table;
//! * `[[function_constant(n)]]` constants become variables the host can set before a launch;
//! * swizzles become calls (`v.xy` -> `v.xy()`, `v.xy = e` -> `v.set_xy() = e`);
//! * literals: `1.0h` -> `half(1.0f)`, and `1.0` -> `1.0f` because MSL has no double;
//! * member functions repeated once per address space (`T() threadgroup = default`) are merged.

mod emit;
mod lex;
mod local;

use std::collections::{BTreeSet, HashSet};

use lex::{lex, match_brackets, unquote};

/// Kernel inputs that are not buffers, in the order of `enum msl_builtin` in msl_abi.h.
const BUILTINS: [&str; 17] = [
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "thread_index_in_threadgroup",
    "threadgroup_position_in_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
    "threadgroups_per_grid",
    "thread_execution_width",
    "threads_per_simdgroup",
    "simdgroup_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroups_per_threadgroup",
    "dispatch_simdgroups_per_threadgroup",
    "quadgroup_index_in_threadgroup",
    "thread_index_in_quadgroup",
    "quadgroups_per_threadgroup",
];

#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    Ident,
    Number,
    Text,  // string or character literal
    Punct, // one character
    Blank, // white space, line markers, and everything this pass has removed
}

struct Tok {
    kind: Kind,
    text: String,
    line: u32,
}

struct Attr {
    at: usize, // token index of the first `[`
    name: String,
    args: String,
}

enum ParamKind {
    Buffer(String),
    Threadgroup(String),
    Builtin(usize),
}

struct Param {
    name: String,
    kind: ParamKind,
    optional: bool,
}

struct Kernel {
    name: String, // as called from C++
    template: bool,
    host_name: Option<String>,
    max_threads: Option<String>,
    params: Vec<Param>,
    line: u32,
}

struct Instance {
    kernel: usize,
    host_name: String,
    call: String, // `gemv` or `gemv<half, 4>`
    line: u32,
}

struct FnConst {
    name: String,
    index: String,
}

struct Rewriter {
    t: Vec<Tok>,
    mate: Vec<usize>,
    attrs: Vec<Attr>,
    kernels: Vec<Kernel>,
    explicit: Vec<(String, String, String, u32)>, // host name, function, call, line
    fn_consts: Vec<FnConst>,
    derived: Vec<(String, String)>, // name, expression
    swizzles: BTreeSet<String>,
    file: String,
}

/// Rewrites `source` (the output of `c++ -E`). `only` limits the kernels that are compiled to
/// these host names; the result lists the host names that are available.
pub fn rewrite(
    source: &str,
    file: &str,
    only: Option<&[&str]>,
    checked: bool,
) -> Result<(String, Vec<String>), String> {
    let mut r = Rewriter {
        t: lex(source)?,
        mate: Vec::new(),
        attrs: Vec::new(),
        kernels: Vec::new(),
        explicit: Vec::new(),
        fn_consts: Vec::new(),
        derived: Vec::new(),
        swizzles: BTreeSet::new(),
        file: file.to_string(),
    };
    r.mate = match_brackets(&r.t)?;
    r.take_attributes();
    r.merge_members();
    let ranges = r.declarations(0, r.t.len());
    for &(a, b) in &ranges {
        r.function_constants(a, b);
    }
    for &(a, b) in &ranges {
        r.kernel(a, b)?;
    }
    r.local_rewrites()?;
    for &(a, b) in &ranges {
        r.instantiation(a, b)?;
    }
    r.merge_declarations(&ranges);
    r.emit(only, checked)
}

impl Rewriter {
    // --------------------------------------------------------------------------- navigation

    fn is(&self, i: usize, s: &str) -> bool {
        self.t.get(i).is_some_and(|t| t.kind != Kind::Blank && t.kind != Kind::Text && t.text == s)
    }
    fn ident(&self, i: usize) -> bool {
        self.t.get(i).is_some_and(|t| t.kind == Kind::Ident)
    }
    /// The next / previous significant token (`len` / `usize::MAX` if there is none).
    fn next(&self, i: usize) -> usize {
        (i + 1..self.t.len()).find(|&j| self.t[j].kind != Kind::Blank).unwrap_or(self.t.len())
    }
    fn prev(&self, i: usize) -> usize {
        (0..i.min(self.t.len())).rev().find(|&j| self.t[j].kind != Kind::Blank).unwrap_or(usize::MAX)
    }
    fn first(&self, i: usize) -> usize {
        if self.t.get(i).is_some_and(|t| t.kind == Kind::Blank) { self.next(i) } else { i }
    }
    fn erase(&mut self, a: usize, b: usize) {
        for t in &mut self.t[a..b] {
            if !t.text.starts_with('#') {
                t.text.retain(|c| c == '\n'); // lines and line markers stay
            }
            t.kind = Kind::Blank;
        }
    }
    fn render(&self, a: usize, b: usize) -> String {
        let s: String =
            self.t[a..b].iter().filter(|t| !t.text.starts_with('#')).map(|t| t.text.replace('\n', " ")).collect();
        s.trim().to_string()
    }
    /// The index after the `>` that closes the `<` at `i`.
    fn skip_angles(&self, i: usize) -> usize {
        let (mut depth, mut j) = (0, i);
        while j < self.t.len() {
            match self.t[j].text.as_str() {
                "<" => depth += 1,
                ">" => {
                    depth -= 1;
                    if depth == 0 {
                        return j + 1;
                    }
                }
                "(" | "[" | "{" if self.t[j].kind == Kind::Punct => j = self.mate[j],
                ";" => return j,
                _ => {}
            }
            j += 1;
        }
        j
    }

    // --------------------------------------------------------------------------- attributes

    /// Removes every `[[...]]`, remembering where it stood.
    fn take_attributes(&mut self) {
        let mut i = 0;
        while i + 1 < self.t.len() {
            if !(self.is(i, "[") && self.is(i + 1, "[")) {
                i += 1;
                continue;
            }
            let end = self.mate[i];
            let mut j = self.next(i + 1);
            while j < end - 1 {
                if self.ident(j) {
                    let name = self.t[j].text.clone();
                    let p = self.next(j);
                    let mut args = String::new();
                    if self.is(p, "(") {
                        args = self.render(p + 1, self.mate[p]);
                        j = self.mate[p];
                    }
                    self.attrs.push(Attr { at: i, name, args });
                }
                j = self.next(j);
            }
            self.erase(i, end + 1);
            i = end + 1;
        }
    }
    fn attrs_in(&self, a: usize, b: usize) -> impl Iterator<Item = &Attr> {
        self.attrs.iter().filter(move |x| x.at >= a && x.at < b)
    }

    // --------------------------------------------------------------------------- declarations

    /// Splits a stretch of namespace scope into declarations, looking inside namespaces.
    fn declarations(&self, a: usize, b: usize) -> Vec<(usize, usize)> {
        let mut out = Vec::new();
        let mut i = self.first(a);
        let mut start = a; // attributes may precede the first significant token
        while i < b {
            let n = if self.is(i, "inline") { self.next(i) } else { i };
            if self.is(n, "namespace") || (self.is(i, "extern") && self.t[self.next(i)].kind == Kind::Text) {
                let brace = (n..b).find(|&j| self.is(j, "{") || self.is(j, ";")).unwrap_or(b);
                if self.is(brace, "{") {
                    out.extend(self.declarations(brace + 1, self.mate[brace]));
                    start = self.mate[brace] + 1;
                    i = self.first(start);
                    continue;
                }
            }
            let end = self.declaration_end(i, b);
            out.push((start, end));
            start = end;
            i = self.first(end);
        }
        out
    }
    fn declaration_end(&self, start: usize, limit: usize) -> usize {
        let mut j = start;
        if self.is(j, "template") && self.is(self.next(j), "<") {
            j = self.first(self.skip_angles(self.next(j)));
        }
        let class = ["struct", "class", "union", "enum", "typedef", "using"].iter().any(|k| self.is(j, k));
        let (mut parens, mut equals) = (false, false);
        while j < limit {
            match self.t[j].text.as_str() {
                ";" => return j + 1,
                "operator" => j = (j..limit).find(|&k| self.is(k, "(")).unwrap_or(j) - 1,
                "(" => {
                    parens = true;
                    j = self.mate[j];
                }
                "[" => j = self.mate[j],
                "{" => {
                    j = self.mate[j];
                    if parens && !equals && !class {
                        return j + 1; // a function body
                    }
                }
                "=" => equals = true,
                _ => {}
            }
            j = self.next(j);
        }
        limit
    }

    /// `constant T x [[function_constant(n)]];` and constants computed from such.
    fn function_constants(&mut self, a: usize, b: usize) {
        let semi = b - 1;
        if !self.is(semi, ";") || !(a..b).any(|i| self.is(i, "constant")) {
            return;
        }
        let fc = self.attrs_in(a, b).find(|x| x.name == "function_constant").map(|x| x.args.clone());
        let start = self.first(a);
        let eq = (a..b).find(|&i| self.is(i, "="));
        let plain = !(a..b).any(|i| self.is(i, "(") && eq.is_none_or(|e| i < e)) && !self.is(start, "template");
        if let (Some(index), true) = (fc, plain) {
            let name = self.t[self.prev(semi)].text.clone();
            let at = (a..b).find(|&i| self.is(i, "constant")).unwrap_or(start);
            self.t[at].text = "static".into();
            self.t[semi].text = format!("; static bool {name}_msl_defined;");
            self.fn_consts.push(FnConst { name, index });
        } else if let (Some(eq), true) = (eq, plain) {
            let known: HashSet<String> =
                self.fn_consts.iter().map(|f| f.name.clone()).chain(self.derived.iter().map(|d| d.0.clone())).collect();
            if (eq..b).any(|i| self.ident(i) && known.contains(&self.t[i].text)) {
                let name = self.t[self.prev(eq)].text.clone();
                for i in a..eq {
                    if self.is(i, "constant") || self.is(i, "static") || self.is(i, "const") || self.is(i, "constexpr")
                    {
                        self.erase(i, i + 1);
                    }
                }
                let f = self.first(a);
                self.t[f].text.insert_str(0, "static ");
                let e = self.render(eq + 1, semi);
                self.derived.push((name, e));
            }
        }
    }

    /// Records a kernel definition.
    fn kernel(&mut self, a: usize, b: usize) -> Result<(), String> {
        let mut s = self.first(a);
        let template = self.is(s, "template");
        if template {
            if !self.is(self.next(s), "<") {
                return Ok(()); // explicit instantiation: see instantiation()
            }
            s = self.first(self.skip_angles(self.next(s)));
        }
        // the parameter list is the first `(` after a name
        let mut p = s;
        while p < b && !(self.is(p, "(") && self.ident(self.prev(p)) && !self.is(self.prev(p), "decltype")) {
            if self.is(p, "{") || self.is(p, "=") || self.is(p, ";") {
                return Ok(());
            }
            p = if self.is(p, "(") { self.mate[p] + 1 } else { p + 1 };
        }
        if p >= b {
            return Ok(());
        }
        let word = (s..p).any(|i| self.is(i, "kernel"));
        if ["vertex", "fragment"].iter().any(|k| (s..p).any(|i| self.is(i, k))) {
            return Err(format!("{}:{}: vertex and fragment functions are not supported", self.file, self.t[s].line));
        }
        if !word && !self.attrs_in(a, p).any(|x| x.name == "kernel") {
            return Ok(());
        }
        if self.is(b - 1, ";") {
            return Ok(()); // only a prototype
        }
        let name = self.t[self.prev(p)].text.clone();
        let line = self.t[self.prev(p)].line;
        let host_name = self.attrs_in(a, p).find(|x| x.name == "host_name").map(|x| unquote(&x.args));
        let max_threads = self
            .attrs_in(a, p)
            .find(|x| x.name == "max_total_threads_per_threadgroup")
            .map(|x| x.args.clone())
            .filter(|_| !template); // may depend on template parameters
        let params = self.params(&name, p, self.mate[p])?;
        self.kernels.push(Kernel { name, template, host_name, max_threads, params, line });
        Ok(())
    }

    fn params(&self, kernel: &str, open: usize, close: usize) -> Result<Vec<Param>, String> {
        let mut parts = Vec::new();
        let (mut start, mut j) = (open + 1, open + 1);
        while j < close {
            match self.t[j].text.as_str() {
                "(" | "[" | "{" if self.t[j].kind == Kind::Punct => j = self.mate[j],
                "<" => j = self.skip_angles(j) - 1,
                "," => {
                    parts.push((start, j));
                    start = j + 1;
                }
                _ => {}
            }
            j += 1;
        }
        if self.first(start) < close {
            parts.push((start, close));
        }
        let used = |kind: &str| -> HashSet<String> {
            self.attrs_in(open, close).filter(|x| x.name == kind).map(|x| x.args.clone()).collect()
        };
        let (buffers, groups) = (used("buffer"), used("threadgroup"));
        let (mut free_buffer, mut free_group) = (0, 0);
        let auto = |taken: &HashSet<String>, next: &mut u32| {
            while taken.contains(&next.to_string()) {
                *next += 1;
            }
            *next += 1;
            (*next - 1).to_string()
        };
        let mut out = Vec::new();
        let mut slots = HashSet::new();
        for (a, b) in parts {
            let at = format!("{}:{}: kernel `{kernel}`", self.file, self.t[self.first(a)].line);
            let end = (a..b).find(|&i| self.is(i, "[") || self.is(i, "=")).unwrap_or(b);
            let name = self.t[self.prev(end)].text.clone();
            let attr = |n: &str| self.attrs_in(a, b).find(|x| x.name == n).map(|x| x.args.clone());
            let builtin = self.attrs_in(a, b).find_map(|x| BUILTINS.iter().position(|n| *n == x.name));
            let pointer = (a..b).any(|i| self.is(i, "*") || self.is(i, "&"));
            let group = (a..b).any(|i| self.is(i, "threadgroup"));
            let kind = if let Some(n) = attr("buffer") {
                ParamKind::Buffer(n)
            } else if let Some(n) = attr("threadgroup") {
                ParamKind::Threadgroup(n)
            } else if let Some(n) = builtin {
                ParamKind::Builtin(n)
            } else if pointer && group {
                ParamKind::Threadgroup(auto(&groups, &mut free_group))
            } else if pointer {
                ParamKind::Buffer(auto(&buffers, &mut free_buffer))
            } else {
                let have: Vec<_> = self.attrs_in(a, b).map(|x| x.name.clone()).collect();
                return Err(format!("{at}: parameter `{name}` is not supported (attributes {have:?})"));
            };
            // two mistakes only Metal's own compiler would object to
            if pointer && !["device", "constant", "threadgroup"].iter().any(|k| (a..b).any(|i| self.is(i, k))) {
                return Err(format!("{at}: `{name}` needs an address space (device, constant or threadgroup)"));
            }
            if let ParamKind::Buffer(n) | ParamKind::Threadgroup(n) = &kind
                && !slots.insert((group, n.clone()))
            {
                return Err(format!("{at}: `{name}` reuses index {n}"));
            }
            out.push(Param { name, kind, optional: attr("function_constant").is_some() });
        }
        Ok(out)
    }

    /// `template [[host_name("x")]] [[kernel]] decltype(f<A>) f<A>;` and relatives: recorded, and
    /// removed, because the thunk instantiates the function anyway.
    fn instantiation(&mut self, a: usize, b: usize) -> Result<(), String> {
        let s = self.first(a);
        if !self.is(s, "template") || self.is(self.next(s), "<") || !self.is(b - 1, ";") {
            return Ok(());
        }
        let Some(host) = self.attrs_in(a, b).find(|x| x.name == "host_name").map(|x| unquote(&x.args)) else {
            return Ok(());
        };
        let mut end = self.prev(b - 1);
        if self.is(end, ")") {
            end = self.prev(self.mate[end]); // the parameter list is repeated
        }
        let (mut depth, mut j) = (0i32, end);
        loop {
            match self.t[j].text.as_str() {
                ">" => depth += 1,
                "<" => depth -= 1,
                ")" | "]" => j = self.mate[j],
                _ => {}
            }
            if depth == 0 || j <= a {
                break;
            }
            j -= 1;
        }
        let name = self.prev(j);
        if !self.ident(name) {
            return Err(format!("{}:{}: cannot read this instantiation", self.file, self.t[s].line));
        }
        let entry = (host, self.t[name].text.clone(), self.render(name, end + 1), self.t[s].line);
        self.explicit.push(entry);
        self.erase(a, b);
        Ok(())
    }

    // --------------------------------------------------------------------------- members

    /// Merges members that differ only in the address space of `this`.
    fn merge_members(&mut self) {
        let mut seen = HashSet::new();
        let mut i = 0;
        while i < self.t.len() {
            let (p, n) = (self.prev(i), self.next(i));
            let after_parens =
                p != usize::MAX && (self.is(p, ")") || (self.is(p, "const") && self.is(self.prev(p), ")")));
            let space = ["thread", "threadgroup", "device", "constant"].iter().any(|k| self.is(i, k));
            let qualifier = space && after_parens && ["{", "=", ";", ":"].iter().any(|k| self.is(n, k));
            let defaulted = self.is(i, "=") && self.is(n, "default") && after_parens;
            if !qualifier && !defaulted {
                i += 1;
                continue;
            }
            // the member runs from the last `;`, `{`, `}` or access label ...
            let mut a = p;
            while !(self.is(a, ";")
                || self.is(a, "{")
                || self.is(a, "}")
                || (self.is(a, ":") && !self.is(self.prev(a), ":") && !self.is(a + 1, ":")))
            {
                a = if self.is(a, ")") { self.mate[a] } else { a };
                a = self.prev(a);
                if a == usize::MAX {
                    break;
                }
            }
            let a = if a == usize::MAX { 0 } else { a + 1 };
            // ... to its `;` or the end of its body
            let mut b = i;
            while !self.is(b, ";") && !self.is(b, "{") {
                b = if self.is(b, "(") { self.mate[b] } else { b };
                b = self.next(b);
            }
            let end = if self.is(b, "{") { self.mate[b] + 1 } else { b + 1 };
            let class = (0..a).rev().find(|&k| self.is(k, "{") && self.mate[k] > end);
            let key: String = (a..p + 1)
                .filter(|&k| self.t[k].kind != Kind::Blank)
                .map(|k| self.t[k].text.as_str())
                .collect::<Vec<_>>()
                .join(" ");
            if qualifier {
                self.erase(i, i + 1);
            }
            if !seen.insert((class, key)) {
                self.erase(a, end);
            } else if self.is(self.next(i), "default") || self.is(self.next(self.next(i)), "default") {
                // a defaulted constructor that leaves members unset is not constexpr in C++17
                for k in a..i {
                    if self.is(k, "constexpr") {
                        self.erase(k, k + 1);
                    }
                }
            }
            i = n + 1; // past the `=` of a default
        }
    }

    /// Overloads and specialisations that differed only in an address space are now the same
    /// text twice: keep one. (If their bodies differ, both stay and the C++ compiler objects.)
    fn merge_declarations(&mut self, ranges: &[(usize, usize)]) {
        let mut seen = HashSet::new();
        for &(a, b) in ranges {
            let words: Vec<&str> =
                (a..b).filter(|&i| self.t[i].kind != Kind::Blank).map(|i| self.t[i].text.as_str()).collect();
            if words.contains(&"{") && !seen.insert(words.join(" ")) {
                self.erase(a, b);
            }
        }
    }

    // --------------------------------------------------------------------------- local changes
}
