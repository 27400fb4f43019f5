//! Changes that concern a few neighbouring tokens: address spaces, threadgroup variables, swizzles, literals.

use std::collections::HashSet;
use std::fmt::Write as _;

use super::lex::{number, swizzle_indices};
use super::{Kind, Rewriter, Tok};

impl Rewriter {
    pub(super) fn local_rewrites(&mut self) -> Result<(), String> {
        let fields = self.struct_fields();
        let mut open: Vec<usize> = Vec::new();
        let mut next_id = 0;
        for i in 0..self.t.len() {
            if self.is(i, "{") && self.range_initializer(i)? {
                continue;
            }
            match self.t[i].kind {
                Kind::Punct => match self.t[i].text.as_str() {
                    "(" | "[" | "{" => open.push(i),
                    ")" | "]" | "}" => {
                        open.pop();
                    }
                    "." => self.swizzle(i, &fields),
                    ">" if i > 0 && self.is(i - 1, "-") => self.swizzle(i, &fields),
                    _ => {}
                },
                Kind::Number => {
                    let n = number(&self.t[i].text);
                    self.t[i].text = n;
                }
                Kind::Ident => match self.t[i].text.as_str() {
                    "kernel" | "device" | "thread" | "object_data" | "ray_data" => self.erase(i, i + 1),
                    "constant" => self.constant(i),
                    "threadgroup" => {
                        let in_block = open.last().is_some_and(|&o| self.is(o, "{"));
                        if in_block && self.threadgroup_variable(i, next_id)? {
                            next_id += 1;
                        } else {
                            self.erase(i, i + 1);
                        }
                    }
                    "is_function_constant_defined" => {
                        let p = self.next(i);
                        if self.is(p, "(") {
                            let name = self.next(p);
                            self.t[name].text.push_str("_msl_defined");
                            self.erase(i, i + 1);
                        }
                    }
                    _ => {}
                },
                _ => {}
            }
        }
        Ok(())
    }

    /// `constant` -> `const`, unless the declaration says `const` already.
    fn constant(&mut self, i: usize) {
        let specifier =
            |t: &Tok| ["static", "constexpr", "inline", "volatile", "const", "typename"].contains(&t.text.as_str());
        let mut dup = false;
        let mut j = self.prev(i);
        while j != usize::MAX && specifier(&self.t[j]) {
            dup |= self.is(j, "const");
            j = self.prev(j);
        }
        let mut j = self.next(i);
        while j < self.t.len() && specifier(&self.t[j]) {
            dup |= self.is(j, "const");
            j = self.next(j);
        }
        // east const: `constant T const &`
        if self.ident(j) {
            j = self.next(j);
            while self.is(j, ":") || (self.ident(j) && self.is(self.prev(j), ":")) {
                j = self.next(j);
            }
            if self.is(j, "<") {
                j = self.first(self.skip_angles(j));
            }
            dup |= self.is(j, "const");
        }
        if dup {
            self.erase(i, i + 1);
        } else {
            self.t[i].text = "const".into();
        }
    }

    /// `threadgroup T a[N], b;` -> references to storage owned by the runtime. False if the
    /// declaration is a pointer or reference, which needs nothing.
    fn threadgroup_variable(&mut self, i: usize, id: usize) -> Result<bool, String> {
        let mut j = self.next(i);
        let type_start = j;
        let mut name = usize::MAX;
        loop {
            if self.is(j, "alignas") {
                let p = self.next(j);
                self.erase(j, self.mate[p] + 1);
                j = self.first(j);
            } else if self.ident(j) {
                name = j;
                j = self.next(j);
            } else if self.is(j, "<") {
                j = self.first(self.skip_angles(j));
            } else if self.is(j, ":") {
                j = self.next(j);
            } else {
                break;
            }
        }
        if name == usize::MAX || !["[", ";", ","].iter().any(|k| self.is(j, k)) {
            return Ok(false);
        }
        let ty = self.render(type_start, name);
        if ty.is_empty() {
            return Err(format!("{}:{}: cannot read this threadgroup declaration", self.file, self.t[i].line));
        }
        let mut text = String::new();
        let mut sub = 0;
        loop {
            let var = self.t[name].text.clone();
            let mut dims = String::new();
            let mut k = self.next(name);
            while self.is(k, "[") {
                let _ = write!(dims, "[({})]", self.render(k + 1, self.mate[k]));
                k = self.next(self.mate[k]);
            }
            let declarator = if dims.is_empty() { format!("&{var}") } else { format!("(&{var}){dims}") };
            if sub > 0 {
                text.push_str("; ");
            }
            // one id per declarator; 8 declarators per declaration are plenty
            let _ = write!(text, "{ty} {declarator} = msl_tg_var<{ty}{dims}>({}, \"{var}\", __LINE__)", id * 8 + sub);
            sub += 1;
            if self.is(k, ",") && sub < 8 {
                name = self.next(k);
            } else if self.is(k, ";") {
                self.erase(i + 1, k);
                self.t[i].text = text;
                self.t[i].kind = Kind::Text;
                return Ok(true);
            } else {
                return Err(format!("{}:{}: cannot read this threadgroup declaration", self.file, self.t[i].line));
            }
        }
    }

    /// `T a[N] = { [0 ... N-1] = e };` (a GNU C extension g++ lacks) -> a loop.
    fn range_initializer(&mut self, i: usize) -> Result<bool, String> {
        let (o, eq) = (self.next(i), self.prev(i));
        if !(self.is(i, "{") && self.is(o, "[") && self.is(eq, "=")) {
            return Ok(false);
        }
        let (end, dim) = (self.mate[o], self.prev(eq));
        let range: String = self.render(o + 1, end).split_whitespace().collect();
        if !range.contains("...") {
            return Ok(false);
        }
        let assign = self.next(end);
        let size: String = if self.is(dim, "]") {
            self.render(self.mate[dim] + 1, dim).split_whitespace().collect()
        } else {
            String::new()
        };
        if range != format!("0...{size}-1") || !self.is(assign, "=") {
            return Err(format!("{}:{}: this range initialiser is not supported", self.file, self.t[i].line));
        }
        let name = self.t[self.prev(self.mate[dim])].text.clone();
        self.t[eq].text = format!("; for (auto& msl_element : {name}) msl_element = (");
        self.erase(i + 1, assign + 1);
        let close = self.mate[i];
        self.t[i].text = String::new();
        self.t[close].text = ")".into();
        for k in [i, close, eq] {
            self.t[k].kind = Kind::Text; // no longer brackets
        }
        Ok(true)
    }

    fn swizzle(&mut self, dot: usize, fields: &HashSet<String>) {
        let i = self.next(dot);
        if !self.ident(i)
            || swizzle_indices(&self.t[i].text).is_none()
            || fields.contains(&self.t[i].text)
            || self.is(self.next(i), "(")
        {
            return;
        }
        let name = self.t[i].text.clone();
        let n = self.next(i);
        let op = self.t.get(n).map_or("", |t| t.text.as_str());
        let assigned = (op == "=" && !self.is(n + 1, "="))
            || (["+", "-", "*", "/", "&", "|", "^"].contains(&op) && self.is(n + 1, "="));
        self.t[i].text = if assigned { format!("set_{name}()") } else { format!("{name}()") };
        self.swizzles.insert(name);
    }

    /// Names of struct members that look like swizzles (`float ab;`).
    fn struct_fields(&self) -> HashSet<String> {
        let mut out = HashSet::new();
        for o in 0..self.t.len() {
            if !self.is(o, "{") {
                continue;
            }
            let mut k = self.prev(o);
            let mut class = false;
            while k != usize::MAX && !["{", "}", ";", ")", "="].iter().any(|s| self.is(k, s)) {
                class |= ["struct", "class", "union"].iter().any(|s| self.is(k, s));
                k = self.prev(k);
            }
            let mut j = o + 1;
            while class && j < self.mate[o] {
                if ["(", "[", "{"].iter().any(|s| self.is(j, s)) {
                    j = self.mate[j];
                } else if self.ident(j) && swizzle_indices(&self.t[j].text).is_some() {
                    out.insert(self.t[j].text.clone());
                }
                j += 1;
            }
        }
        out
    }
}
