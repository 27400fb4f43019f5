//! Chat templates: a conversation made into the text that the model was trained on. They are written for Python's Jinja
//! as transformers sets it up, so what minijinja does in another way, or not at all, is supplied here.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Value};

use super::{ChatMessage, Tokenizer};
use crate::error::{Error, Result};

/// A template ready to be rendered, or why it does not compile.
pub(super) type Compiled = std::result::Result<Environment<'static>, String>;

impl Tokenizer {
    /// The text that the model's template makes of a conversation, special tokens spelled out in it.
    /// `add_generation_prompt` ends it where the assistant's next message begins.
    ///
    /// Templates are rendered as transformers does: the same whitespace rules and the same variables and functions
    /// (`strftime_now` gives UTC).
    pub fn apply_chat_template(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        let environment = match &self.shared.chat {
            Some(Ok(environment)) => environment,
            Some(Err(reason)) => {
                return Err(Error::ChatTemplate(format!(
                    "it does not compile: {reason}; give the prompt as plain text"
                )));
            }
            None => {
                return Err(Error::ChatTemplate(
                    "this model comes without one: give the prompt as plain text, or put the template as \
                     `chat_template.jinja` into the model's folder"
                        .to_owned(),
                ));
            }
        };
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| Value::from_pairs([("role", &message.role), ("content", &message.content)]))
            .collect();
        let mut variables = vec![
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            // Defined and None, as transformers passes them: templates ask `tools is not none`.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ];
        variables.extend(self.shared.named.iter().map(|(name, text)| (name.as_str(), Value::from(text))));
        let rendered = environment.get_template(TEMPLATE).and_then(|template| {
            // The state of a rendering is the caller's; nothing of it is kept.
            template.render(Value::from_pairs(variables))
        });
        rendered.map_err(|error| Error::ChatTemplate(error.to_string()))
    }

    /// The prompt for the assistant's next message in a conversation. The template writes the special tokens, so none
    /// are added to it.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        self.encode(&self.apply_chat_template(messages, true)?, false)
    }
}

/// The one template's name in its environment. Without an extension nothing is escaped.
const TEMPLATE: &str = "chat template";

pub(super) fn compile(source: String) -> Compiled {
    let mut environment = Environment::new();
    // `trim_blocks` and `lstrip_blocks` are what transformers sets, and templates count on it.
    let syntax = environment.syntax().to_builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(|error| error.to_string())?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> std::result::Result<String, minijinja::Error> {
        Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        strftime(&format, now.as_secs())
    });
    let source = without_generation_tags(&source);
    environment.add_template_owned(TEMPLATE, source).map_err(|error| error.to_string())?;
    Ok(environment)
}

/// `{% generation %}` marks what the assistant said, for training; it changes nothing in the text. Jinja does not know
/// it (transformers adds it), so it becomes an `if` that is always taken.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(end) = tag.find("%}") else { break };
        let (tag, after) = tag.split_at(end + 2);
        let inside = tag[2..end].trim_matches(['-', '+']);
        out.push_str(before);
        match inside.trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out + rest
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`, which is what transformers' filter is; the one of
/// Jinja escapes for HTML.
fn to_json(value: &Value, kwargs: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    if kwargs.get::<Option<bool>>("ensure_ascii")? == Some(true) {
        let reason = "tojson(ensure_ascii=true) is not supported";
        return Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, reason));
    }
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write_json(&mut out, value, indent, 0)?;
    Ok(out)
}

fn write_json(
    out: &mut String,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
) -> std::result::Result<(), minijinja::Error> {
    let new_line = |out: &mut String, depth: usize| {
        if let Some(indent) = indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    // A comma is followed by a space, or by a new line where there is an indent.
    let comma = if indent.is_some() { "," } else { ", " };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        // A template writes Python's `True`.
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::Map => {
            out.push('{');
            let mut empty = true;
            for key in value.try_iter()? {
                out.push_str(if empty { "" } else { comma });
                empty = false;
                new_line(out, depth + 1);
                out.push_str(&json_text(&key));
                out.push_str(": ");
                write_json(out, &value.get_item(&key)?, indent, depth + 1)?;
            }
            if !empty {
                new_line(out, depth);
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut empty = true;
            for item in value.try_iter()? {
                out.push_str(if empty { "" } else { comma });
                empty = false;
                new_line(out, depth + 1);
                write_json(out, &item, indent, depth + 1)?;
            }
            if !empty {
                new_line(out, depth);
            }
            out.push(']');
        }
        _ => out.push_str(&json_text(value)),
    }
    Ok(())
}

fn json_text(value: &Value) -> String {
    serde_json::Value::from(value.to_string()).to_string()
}

/// The directives of C's `strftime` that templates use, in UTC.
fn strftime(format: &str, unix_seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let days = unix_seconds / 86_400;
    let (hour, minute, second) = (unix_seconds / 3600 % 24, unix_seconds / 60 % 60, unix_seconds % 60);
    // Howard Hinnant's `civil_from_days`: years begin in March, so that the leap day is the last one.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let leap = year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let ordinal = if month > 2 { day_of_year + 60 + u64::from(leap) } else { day_of_year - 305 };
    let (day_name, month_name) = (DAYS[((days + 3) % 7) as usize], MONTHS[(month - 1) as usize]);
    let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };

    let mut out = String::new();
    let mut directives = format.chars();
    while let Some(c) = directives.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = directives.next();
        // `%-d` is glibc's way to ask for no leading zero.
        let bare = directive == Some('-');
        if bare {
            directive = directives.next();
        }
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        match directive {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&two(year % 100)),
            Some('m') => out.push_str(&two(month)),
            Some('B') => out.push_str(month_name),
            Some('b' | 'h') => out.push_str(&month_name[..3]),
            Some('d') => out.push_str(&two(day)),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('j') => out.push_str(&if bare { ordinal.to_string() } else { format!("{ordinal:03}") }),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&two(hour)),
            Some('I') => out.push_str(&two(twelve)),
            Some('M') => out.push_str(&two(minute)),
            Some('S') => out.push_str(&two(second)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => out.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('T') => out.push_str(&format!("{hour:02}:{minute:02}:{second:02}")),
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::test_support::{byte_level, chat_model, plain};
    use super::*;

    fn conversation() -> Vec<ChatMessage> {
        vec![
            ChatMessage::system("Be brief."),
            ChatMessage::user("Hi <b>'you' & me</b>"),
            ChatMessage::assistant("Hello!"),
            ChatMessage::user("Bye"),
        ]
    }

    #[test]
    fn chatml() {
        let tokenizer = chat_model(
            "{% for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + \
             '<|im_end|>\\n' -}}\n{% endfor %}\n{% if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' -}}\n\
             {% endif %}\n",
        );
        let expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b>'you' & me</b><|im_end|>\n\
                        <|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n";
        assert_eq!(tokenizer.apply_chat_template(&conversation(), false).unwrap(), expected);
        let with_prompt = format!("{expected}<|im_start|>assistant\n");
        assert_eq!(tokenizer.apply_chat_template(&conversation(), true).unwrap(), with_prompt);
    }

    #[test]
    fn llama3_style() {
        let tokenizer = chat_model(
            "{{- bos_token }}\n{%- if not tools is none %}\n    {{- raise_exception('no tools here') }}\n{%- endif %}\n\
             {#- The first message may be the system's. #}\n{%- if messages[0]['role'] == 'system' %}\n    \
             {%- set system_message = messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n\
             {%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n\
             {{- '<|start_header_id|>system<|end_header_id|>\\n\\n' + system_message + '<|eot_id|>' }}\n\
             {%- for message in messages %}\n    {{- '<|start_header_id|>' + message['role'] + \
             '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\n{%- endfor %}\n\
             {%- if add_generation_prompt %}\n    \
             {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
        );
        let messages = [ChatMessage::system(" Be brief. "), ChatMessage::user("Hi\n")];
        assert_eq!(
            tokenizer.apply_chat_template(&messages, true).unwrap(),
            "<|begin|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user\
             <|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        );
        let tokens = tokenizer.encode_chat(&messages).unwrap();
        assert_eq!(tokens.iter().filter(|&&token| Some(token) == tokenizer.bos_token_id()).count(), 1);
    }

    #[test]
    fn python_in_templates() {
        // As the templates of reasoning models: a namespace, slices backwards, methods of strings, loop controls.
        let tokenizer = chat_model(
            "{%- set ns = namespace(last=-1, system='') %}\n\
             {%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n    \
             {%- if message.role == 'user' and not (message.content.startswith('<tool') and \
             message.content.endswith('>')) %}\n        {%- set ns.last = index %}\n        {%- break %}\n    \
             {%- endif %}\n{%- endfor %}\n\
             {%- for message in messages %}\n    {%- if loop.first and message.role == 'system' %}\n        \
             {%- set ns.system = message.content.strip() %}\n        {%- continue %}\n    {%- endif %}\n    \
             {%- if message.role == 'assistant' and message.tool_calls is not defined %}\n        \
             {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}\n        \
             {%- if loop.index0 > ns.last or loop.last %}{{ raise_exception('not the last') }}{% endif %}\n        \
             {{- 'A:' ~ content }}\n    \
             {%- elif message.content is string and message.role in ['user'] %}\n        \
             {{- 'U' ~ loop.index ~ ':' ~ message.content.rstrip('!').upper().replace('HI', 'ho') }}\n    \
             {%- endif %}\n    {{- '|' if not loop.last else '' }}\n{%- endfor %}\n\
             {{- '[' + ns.system + ',' + ns.last|string + ']' }}",
        );
        let messages = [
            ChatMessage::system("  rules\n"),
            ChatMessage::user("hi you!!"),
            ChatMessage::assistant("<think>\nhm\n</think>\n\nyes"),
            ChatMessage::user("bye"),
        ];
        assert_eq!(tokenizer.apply_chat_template(&messages, true).unwrap(), "U2:ho YOU|A:yes|U4:BYE[rules,3]");
    }

    #[test]
    fn templates_that_refuse() {
        let tokenizer = chat_model(
            "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
             {{ raise_exception('roles must alternate: ' ~ m.role) }}{% endif %}{% endfor %}ok",
        );
        assert_eq!(tokenizer.apply_chat_template(&[ChatMessage::user("a")], true).unwrap(), "ok");
        let error = tokenizer.apply_chat_template(&conversation(), true).unwrap_err();
        assert!(
            matches!(&error, Error::ChatTemplate(reason) if reason.contains("roles must alternate: system")),
            "{error}"
        );

        let none = plain(byte_level());
        assert!(!none.has_chat_template());
        let error = none.encode_chat(&conversation()).unwrap_err().to_string();
        assert!(error.contains("comes without one") && error.contains("chat_template.jinja"), "{error}");

        let broken = chat_model("{% if messages %}");
        assert!(broken.has_chat_template());
        let error = broken.apply_chat_template(&conversation(), true).unwrap_err().to_string();
        assert!(error.contains("does not compile"), "{error}");
    }

    #[test]
    fn functions_of_templates() {
        let render = |template: &str| chat_model(template).apply_chat_template(&conversation()[1..2], true).unwrap();
        assert_eq!(
            render("{{ {'a': [1, 2.5, true, none, \"<é'&>\\n\"], 'b': {}} | tojson }}"),
            "{\"a\": [1, 2.5, true, null, \"<é'&>\\n\"], \"b\": {}}"
        );
        assert_eq!(
            render("{{ {'a': [1, {}], 'b': []} | tojson(indent=2) }}"),
            "{\n  \"a\": [\n    1,\n    {}\n  ],\n  \"b\": []\n}"
        );
        assert_eq!(render("{{ messages[0].content | tojson(ensure_ascii=false) }}"), "\"Hi <b>'you' & me</b>\"");
        assert_eq!(
            render("a\n{%- generation -%}\n b{% endgeneration %}{% if generation is defined %}c{% endif %}"),
            "ab"
        );
        assert_eq!(strftime("%d %b %Y, %A %H:%M:%S", 0), "01 Jan 1970, Thursday 00:00:00");
        assert_eq!(
            strftime("%Y-%m-%d %j %-d.%-m. %I %p %y %a %B %%", 951_827_696),
            "2000-02-29 060 29.2. 12 PM 00 Tue February %"
        );
        assert_eq!(strftime("%F %T %j %e%q%", 1_735_689_599), "2024-12-31 23:59:59 366 31%q%");
        assert_eq!(strftime("%F %j", 1_740_787_200), "2025-03-01 060");
        assert_eq!(render("{{ strftime_now('%Y')|length }}"), "4");
    }
}
