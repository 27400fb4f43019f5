//! Chat templates: a conversation made into the text that the model was trained on. The template crate renders them;
//! this file passes it what transformers passes.

use candle_pipeline_template::{Limits, Template};
use serde_json::{Map, Value, json};

use super::{ChatMessage, Tokenizer};
use crate::error::{Error, Result};

/// A template ready to be rendered, or why it does not compile.
pub(super) type Compiled = std::result::Result<Template, String>;

/// What a chat template is given beside the messages.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct ChatOptions {
    /// Whether the text ends where the assistant's next message begins.
    pub add_generation_prompt: bool,
    /// Tools that the model may call, usually as JSON schemas. Without them the template sees none.
    pub tools: Option<Vec<Value>>,
    /// Documents that the model may quote, usually objects with a `title` and a `text`.
    pub documents: Option<Vec<Value>>,
    /// Variables that the model's template knows, such as `enable_thinking`. They hide special tokens of the same name.
    pub variables: Map<String, Value>,
}

impl ChatOptions {
    /// Options for a prompt: the text ends where the assistant's message begins.
    pub fn prompt() -> Self {
        Self { add_generation_prompt: true, ..Self::default() }
    }

    /// Sets the tools.
    pub fn with_tools(mut self, tools: Vec<Value>) -> Self {
        self.tools = Some(tools);
        self
    }

    /// Sets the documents.
    pub fn with_documents(mut self, documents: Vec<Value>) -> Self {
        self.documents = Some(documents);
        self
    }

    /// Sets all variables.
    pub fn with_variables(mut self, variables: Map<String, Value>) -> Self {
        self.variables = variables;
        self
    }

    /// Sets one variable.
    pub fn with_variable(mut self, name: impl Into<String>, value: impl Into<Value>) -> Self {
        self.variables.insert(name.into(), value.into());
        self
    }
}

impl Tokenizer {
    /// The text that the model's template makes of a conversation, special tokens spelled out in it.
    /// `add_generation_prompt` ends it where the assistant's next message begins.
    ///
    /// Templates are rendered as transformers does, within the default [`Limits`] of the template crate.
    pub fn apply_chat_template(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String> {
        self.apply_chat_template_with(messages, &ChatOptions { add_generation_prompt, ..ChatOptions::default() })
    }

    /// The same with tools, documents and variables of the template.
    pub fn apply_chat_template_with(&self, messages: &[ChatMessage], options: &ChatOptions) -> Result<String> {
        let template = match &self.shared.chat {
            Some(Ok(template)) => template,
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
        let messages = serde_json::to_value(messages).map_err(|error| Error::ChatTemplate(error.to_string()))?;
        let mut variables: Map<String, Value> =
            self.shared.named.iter().map(|(name, text)| (name.clone(), json!(text))).collect();
        variables.extend(options.variables.clone());
        // Tools and documents are defined and none where there are none: templates ask `tools is not none`.
        let fixed = [
            ("messages", messages),
            ("tools", json!(options.tools)),
            ("documents", json!(options.documents)),
            ("add_generation_prompt", json!(options.add_generation_prompt)),
        ];
        for (name, value) in fixed {
            if options.variables.contains_key(name) {
                return Err(Error::InvalidOption {
                    option: "variables",
                    reason: format!("`{name}` is no variable of its own: it has a place in the call or in the options"),
                });
            }
            variables.insert(name.to_owned(), value);
        }
        template.render(&variables).map_err(|error| Error::ChatTemplate(error.to_string()))
    }

    /// The prompt for the assistant's next message in a conversation. The template writes the special tokens, so none
    /// are added to it.
    pub fn encode_chat(&self, messages: &[ChatMessage]) -> Result<Vec<u32>> {
        self.encode_chat_with(messages, &ChatOptions::prompt())
    }

    /// The same with tools, documents and variables of the template.
    pub fn encode_chat_with(&self, messages: &[ChatMessage], options: &ChatOptions) -> Result<Vec<u32>> {
        self.encode(&self.apply_chat_template_with(messages, options)?, false)
    }
}

pub(super) fn compile(source: String) -> Compiled {
    Template::compile(&source, &Limits::default()).map_err(|error| error.to_string())
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
        assert_eq!(render("{{ strftime_now('%Y')|length }}"), "4");
    }

    #[test]
    fn maps_keep_the_order_they_were_given_in() {
        let render =
            |template: &str| chat_model(template).apply_chat_template(&[ChatMessage::user("Hi")], true).unwrap();
        assert_eq!(render("{{ messages[0] | tojson }}"), r#"{"role": "user", "content": "Hi"}"#);
        assert_eq!(render("{% for k, v in {'z': 1, 'a': 2}.items() %}{{ k }}={{ v }};{% endfor %}"), "z=1;a=2;");
        let call = "{{ {'type': 'function', 'name': 'f', 'arguments': {'z': 1, 'a': 2}} | tojson }}";
        assert_eq!(render(call), r#"{"type": "function", "name": "f", "arguments": {"z": 1, "a": 2}}"#);

        let tool: Value = serde_json::from_str(r#"{"name": "f", "args": {"z": 1, "b": 2, "a": 3}}"#).unwrap();
        let options = ChatOptions::prompt().with_tools(vec![tool]);
        let text = chat_model("{{ tools | tojson }}").apply_chat_template_with(&[], &options).unwrap();
        assert_eq!(text, r#"[{"name": "f", "args": {"z": 1, "b": 2, "a": 3}}]"#);
    }

    #[test]
    fn carriage_returns_end_lines_in_a_template() {
        let render = |template: &str| chat_model(template).apply_chat_template(&[], true).unwrap();
        assert_eq!(render("a\r\n{% if true %}\r\nb\r\n{% endif %}\r\nc\r\n"), "a\nb\nc");
        assert_eq!(render("a\r  {% if true %}\rb{% endif %}\r"), "a\nb");
        assert_eq!(render("{{ 'x\r\ny' }}"), "x\ny");
    }

    #[test]
    fn what_is_not_given_is_none_and_empty() {
        let tokenizer = chat_model(
            "{% if tools is iterable and tools | length > 0 %}[tools]{% endif %}{% for m in messages %}\
             {% if m.tool_calls | length > 0 %}[call]{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}\
             {{ documents is none }}{{ tools is none }}",
        );
        assert_eq!(tokenizer.apply_chat_template(&[ChatMessage::user("Hi")], true).unwrap(), "<user>HiTrueTrue");
    }

    #[test]
    fn tools_documents_and_variables_reach_the_template() {
        let tokenizer = chat_model(
            "{{ tools[0].name }}{{ documents | length }}{{ enable_thinking }}{{ bos_token }}{{ add_generation_prompt }}",
        );
        let options = ChatOptions::default()
            .with_tools(vec![json!({"name": "f"})])
            .with_documents(vec![json!({"title": "t"}), json!({})])
            .with_variable("enable_thinking", false)
            .with_variable("bos_token", "B");
        assert_eq!(tokenizer.apply_chat_template_with(&[], &options).unwrap(), "f2FalseBFalse");
        assert_eq!(tokenizer.apply_chat_template(&[], true).unwrap_err().kind(), "chat_template");
        let tokens = tokenizer.encode_chat_with(&[], &options).unwrap();
        assert_eq!(tokenizer.decode(&tokens, false).unwrap(), "f2FalseBFalse");

        let error = tokenizer.apply_chat_template_with(&[], &ChatOptions::prompt().with_variable("messages", 1));
        assert!(matches!(error, Err(Error::InvalidOption { option: "variables", .. })), "{error:?}");
    }

    #[test]
    fn a_template_cannot_take_the_process_down() {
        let terms = format!("{{{{ {}1 }}}}", "1+".repeat(8000));
        let broken = chat_model(&terms);
        let error = broken.apply_chat_template(&[], true).unwrap_err().to_string();
        assert!(error.contains("does not compile") && error.contains("limit `nesting`"), "{error}");
        let error = chat_model("{{ 'abc' | indent(1000000000000, true) }}").apply_chat_template(&[], true).unwrap_err();
        assert!(error.to_string().contains("limit `text`"), "{error}");
    }
}
