//! Templates that try to use up memory, time or the stack. Each ends in an error that names the limit.

use std::time::{Duration, Instant};

use candle_pipeline_template::{Error, ErrorKind, Limits, Template};
use serde_json::{Map, Value, json};

fn variables() -> Map<String, Value> {
    let variables = json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "abc"}]});
    variables.as_object().unwrap().clone()
}

fn render(source: &str) -> Result<String, Error> {
    Template::compile(source, &Limits::default())?.render(&variables())
}

/// The template must end in the error of one of these limits, soon.
fn exceeds(limits: &[&str], source: &str) {
    let start = Instant::now();
    let shown: String = source.chars().take(100).collect();
    let error = match render(source) {
        Ok(text) => panic!("{shown} gives {} bytes", text.len()),
        Err(error) => error,
    };
    assert_eq!(error.kind(), ErrorKind::Limit, "{shown}: {error}");
    assert!(
        limits.iter().any(|limit| error.message().starts_with(&format!("limit `{limit}` of "))),
        "{shown}: {error}"
    );
    // A second in a release build; tests run without full optimisation on busy machines.
    assert!(start.elapsed() < Duration::from_secs(60), "{shown}: {:?}", start.elapsed());
}

#[test]
fn deep_expressions_exceed_the_nesting() {
    let repeat = |part: &str, count: usize| part.repeat(count);
    for source in [
        format!("{{{{ {}1 }}}}", repeat("1+", 8000)),
        format!("{{{{ {}1 }}}}", repeat("not ", 8000)),
        format!("{{{{ {}1 }}}}", repeat("-", 8000)),
        format!("{{{{ 1{} }}}}", repeat("**1", 8000)),
        format!("{{{{ a{} }}}}", repeat(".a", 8000)),
        format!("{{{{ a{} }}}}", repeat("['a']", 8000)),
        format!("{{{{ a{} }}}}", repeat("()", 8000)),
        format!("{{{{ ''{} }}}}", repeat("|trim", 8000)),
        format!("{{{{ {}1{} }}}}", repeat("(", 100_000), repeat(")", 100_000)),
        format!("{{{{ {}1{} }}}}", repeat("[", 100_000), repeat("]", 100_000)),
        format!("{{{{ {}1{} }}}}", repeat("{1:", 100_000), repeat("}", 100_000)),
        format!("{{{{ {}1{} }}}}", repeat("f(", 100_000), repeat(")", 100_000)),
        format!("{{{{ {}1 }}}}", repeat("1 if 1 else ", 8000)),
        format!("{{{{ {}1 }}}}", repeat("1 or ", 8000)),
        format!("{{% filter {}trim %}}{{% endfilter %}}", repeat("trim|", 8000)),
        format!("{{% set {}a{} = 1 %}}", repeat("(", 8000), repeat(",)", 8000)),
        repeat("{% if 1 %}", 50_000),
        repeat("{% for a in b %}", 50_000),
        repeat("{% macro a() %}", 50_000),
        repeat("{% call f() %}", 50_000),
        repeat("{% generation %}", 50_000),
        repeat("{% block a %}", 50_000),
        repeat("{% set a %}", 50_000),
    ] {
        exceeds(&["nesting"], &source);
    }
}

#[test]
fn long_but_flat_templates_are_fine() {
    let elif = format!("{{% if 0 %}}a{}{{% else %}}b{{% endif %}}", "{% elif 0 %}c".repeat(20_000));
    assert_eq!(render(&elif).unwrap(), "b");
    assert_eq!(render(&"{{ 'a' }}".repeat(20_000)).unwrap().len(), 20_000);
    assert_eq!(render(&format!("{{{{ 'a'{} }}}}", "~'a'".repeat(20_000))).unwrap().len(), 20_001);
    assert_eq!(render(&format!("{{{{ [{}]|length }}}}", "1,".repeat(20_000))).unwrap(), "20000");
    assert_eq!(render(&format!("{{{{ 1{} }}}}", "<2>1".repeat(20_000))).unwrap(), "True");
    let names: String = (0..20_000).map(|n| format!("{{% if a{n} %}}{{% set b{n} = 1 %}}{{% endif %}}")).collect();
    assert_eq!(render(&names).unwrap(), "");
    exceeds(&["source"], &" ".repeat((1 << 20) + 1));
}

#[test]
fn endless_work_exceeds_the_steps() {
    let range = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}";
    exceeds(&["steps"], &format!("{range}{{% endfor %}}{{% endfor %}}{{% endfor %}}"));
    for work in [
        "{% for b in range(99999) if false %}{% endfor %}",
        "{% set x = range(99999)|list|sort(reverse=true) %}",
        "{% set x = range(99999)|sum %}",
        "{% set x = 5 in range(99999)|list|reverse|list %}",
        "{% set x = range(99999)|map('string')|join %}",
        "{% set x = range(99999)|list == range(99999)|list %}",
        "{% set x = text|upper %}",
        "{% set x = text.replace('a', 'b') %}",
        "{% set x = text.split('b') %}",
        "{% set x = text.count('ab') %}",
        "{% set x = text[::-1] if false else text[5:] %}",
        "{% set x = 'b' in text %}",
        "{% set x = text|tojson %}",
        "{% set x = text|length + (text ~ 'ü')[100000] | length %}",
        "{% set x = text.strip('xyz') %}",
        "{% set x = text == text ~ 'a' %}",
        "{% set x = text|wordcount %}",
        "{% set x = text|e %}",
        "{% set x = [text]|unique|list %}",
        "{% set x = 'Σ'.join(['a'] * 500).title() %}",
        "{% set x = text|indent %}",
        "{% set x = text %  () %}",
    ] {
        let source = format!(
            "{{% set text = 'a' * 1000000 %}}{{% for a in range(99999) %}}{{% for b in range(99999) %}}{work}\
             {{% endfor %}}{{% endfor %}}"
        );
        exceeds(&["steps"], &source);
    }
}

#[test]
fn large_texts_are_refused_before_they_are_made() {
    for source in [
        "{{ 'abc' * 1000000000000 }}",
        "{{ 'abc' | indent(1000000000000, true) }}",
        "{{ 'a\nb' | indent(1000000000000) }}",
        "{{ 'abc' | center(1000000000000) }}",
        "{{ 'abc'.center(1000000000000) }}{{ 1 }}",
        "{{ 'abc'.ljust(1000000000000) }}",
        "{{ 'abc'.rjust(1000000000000, 'ü') }}",
        "{{ 'abc'.zfill(1000000000000) }}",
        "{{ '\t'.expandtabs(1000000000000) }}",
        "{{ '%1000000000000d' % 5 }}",
        "{{ '%*d' % (1000000000000, 5) }}",
        "{{ '%-1000000000000s' % 'a' }}",
        "{{ '{:1000000000000}'.format(5) }}",
        "{{ '{:>{}}'.format(5, 1000000000000) }}",
        "{{ '%1000000000000s' | format('a') }}",
        "{{ messages | tojson(indent=10000000000) }}",
        "{{ 'a' | wordwrap(1) | replace('', 'b' * 30000000) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ ('a' * 1000000).replace('a', 'b' * 1000) }}",
        "{{ ('a' * 1000000) | replace('a', 'b' * 1000) }}",
        "{{ (['a' * 1000] * 100000) | join }}",
        "{{ ('b' * 1000).join('a' * 100000) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='\"') %}{% for i in range(99) %}{% set ns.x = ns.x|tojson %}{% endfor %}",
        "{% set ns = namespace(x='&') %}{% for i in range(99) %}{% set ns.x = (ns.x|forceescape) * 2 %}{% endfor %}",
        "{% set ns = namespace(x='ΐ') %}{% for i in range(99) %}{% set ns.x = (ns.x * 2).upper() %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{% macro m(n) %}{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}{% endmacro %}{{ m() }}",
        "{% macro m(x, n) %}{{ x * 1000000 }}{% if n %}{{ m(x, n - 1) }}{% endif %}{% endmacro %}{{ m('abcdefghij', 200) }}",
    ] {
        exceeds(&["text", "memory", "steps"], source);
    }
    let output = "{% set a = 'abcdefgh' * 100000 %}{% for i in range(9999) %}{{ a }}{% endfor %}";
    exceeds(&["output"], output);
}

#[test]
fn large_containers_are_refused_before_they_are_made() {
    for source in [
        "{{ [1] * 1000000000000 }}",
        "{{ (1,) * 1000000000000 }}",
        "{{ [1, 2] | batch(100000000000, 'x') | list }}",
        "{{ [1, 2] | slice(100000000000, 'x') | list }}",
        "{{ ('a' * 3000000) | list }}",
        "{{ ('a ' * 3000000).split() }}",
        "{{ ('a,' * 3000000).split(',') }}",
        "{{ ('a,' * 3000000).rsplit(',') }}",
        "{{ ('a\n' * 3000000).splitlines() }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + [range(99999)|list] %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = ns.x + ['a' * 100000] %}{% endfor %}",
        "{% set ns = namespace(x=(1,)) %}{% for i in range(99) %}{% set ns.x = (ns.x * 2)|map('string')|list %}{% endfor %}",
        "{% macro m() %}{{ varargs|length }}{% endmacro %}{{ m(*[1] * 100000000) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = namespace(a=i) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% macro m() %}{{ j }}{% endmacro %}{% endfor %}{% endfor %}",
    ] {
        exceeds(&["elements", "memory", "text", "steps"], source);
    }
}

#[test]
fn deep_calls_and_values_are_bounded() {
    exceeds(&["recursion"], "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}");
    exceeds(
        &["recursion"],
        "{% macro m() %}{% call m() %}{{ caller }}{% endcall %}{{ caller }}{% endmacro %}{{ m() }}",
    );
    exceeds(
        &["recursion"],
        "{% macro m(x) %}{% if true %}{{ [m(x)]|map('upper')|list }}{% endif %}{% endmacro %}{{ m(1) }}",
    );
    exceeds(&["recursion"], "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}");
    exceeds(&["recursion"], "{% block a %}{{ self.a() }}{% endblock %}");
    let chain = "{% set ns = namespace(x=0) %}{% for i in range(99999) %}{% set ns.x = CHAIN %}{% endfor %}";
    for link in [
        "[ns.x]",
        "(ns.x,)",
        "{'a': ns.x}",
        "[ns.x]|select",
        "[ns.x]|reverse",
        "[ns.x].index",
        "cycler(ns.x)",
        "joiner(ns.x)",
        "dict(a=ns.x).items()",
    ] {
        exceeds(&["value_depth", "memory", "text", "steps"], &chain.replace("CHAIN", link));
    }
    exceeds(
        &["value_depth"],
        "{% set ns = namespace(x=0) %}{% for i in range(999) %}{% for a in [ns.x] %}{% set ns.x = loop %}{% endfor %}{% endfor %}",
    );
    // Namespaces can hold each other in a chain of any length, or themselves.
    let chain =
        "{% set ns = namespace(x=0) %}{% for i in range(99999) %}{% set ns.x = namespace(x=ns.x) %}{% endfor %}";
    assert_eq!(render(&format!("{chain}ok")).unwrap(), "ok");
    exceeds(&["value_depth"], &format!("{chain}{{{{ ns }}}}"));
    let own = "{% set ns = namespace(a=1) %}{% set ns.self = ns %}{% set ns.list = [ns] %}";
    assert_eq!(
        render(&format!("{own}{{{{ ns }}}}")).unwrap(),
        "<Namespace {'a': 1, 'self': <Namespace {...}>, 'list': [<Namespace {...}>]}>"
    );
    let macros = "{% set ns = namespace(m=none) %}{% for i in range(20000) %}{% set prev = ns.m %}\
                  {% macro m() %}{{ prev is none }}{% endmacro %}{% set ns.m = m %}{% endfor %}{{ ns.m() }}";
    assert_eq!(render(macros).unwrap(), "False");
    let changed = "{% set ns = namespace(l=none) %}{% for i in range(20000) %}{% for a in [1] %}\
                   {% set x = loop.changed(ns.l) %}{% set ns.l = loop %}{% endfor %}{% endfor %}ok";
    assert_eq!(render(changed).unwrap(), "ok");
}

#[test]
fn limits_can_be_set_and_are_named() {
    let mut limits = Limits::default();
    limits.steps = 100;
    let template = Template::compile("{% for a in range(1000) %}{% endfor %}", &limits).unwrap();
    assert_eq!(template.render(&Map::new()).unwrap_err().message(), "limit `steps` of 100 exceeded");
    limits = Limits::default();
    limits.nesting = usize::MAX;
    limits.recursion = usize::MAX;
    limits.value_depth = usize::MAX;
    // The stack of the thread bounds the depths whatever is asked for.
    let deep = format!("{{{{ {}1 }}}}", "-".repeat(100_000));
    assert_eq!(Template::compile(&deep, &limits).unwrap_err().kind(), ErrorKind::Limit);
    let endless = Template::compile("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", &limits).unwrap();
    assert_eq!(endless.render(&Map::new()).unwrap_err().kind(), ErrorKind::Limit);
    let mut nested = json!(1);
    for _ in 0..1000 {
        nested = json!([nested]);
    }
    let variables: Map<String, Value> = [("x".to_owned(), nested)].into_iter().collect();
    let template = Template::compile("{{ x }}", &limits).unwrap();
    assert_eq!(template.render(&variables).unwrap_err().kind(), ErrorKind::Limit);
}

#[test]
fn conversations_of_megabytes_render() {
    let source = "{%- for m in messages %}{% if m.role == 'assistant' %}{% set c = m.content.split('</think>')[-1].lstrip('\\n') \
                  %}{% else %}{% set c = m.content | trim %}{% endif %}{{- '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' }}\
                  {% endfor %}{{ messages | tojson | length }}";
    let content = "Some words, ünïcode and \"quotes\".\n".repeat(200);
    let messages: Vec<Value> =
        (0..2000).map(|n| json!({"role": if n % 2 == 0 { "user" } else { "assistant" }, "content": content})).collect();
    let variables = json!({ "messages": messages });
    let text = Template::compile(source, &Limits::default()).unwrap().render(variables.as_object().unwrap()).unwrap();
    assert!(text.len() > 14_000_000, "{}", text.len());
    let one = json!({"messages": [{"role": "user", "content": "a b ".repeat(3_000_000)}]});
    let text = Template::compile(source, &Limits::default()).unwrap().render(one.as_object().unwrap()).unwrap();
    assert!(text.len() > 11_000_000, "{}", text.len());
}

#[test]
fn templates_render_on_many_threads() {
    let template = Template::compile("{% for i in range(50) %}{{ i }}{% endfor %}", &Limits::default()).unwrap();
    let bomb = Template::compile("{{ 'a' * 10 ** 12 }}", &Limits::default()).unwrap();
    let expected = template.render(&Map::new()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..20 {
                    assert_eq!(template.clone().render(&Map::new()).unwrap(), expected);
                    assert_eq!(bomb.render(&Map::new()).unwrap_err().kind(), ErrorKind::Limit);
                }
            });
        }
    });
}
