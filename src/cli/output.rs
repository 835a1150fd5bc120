//! The end of every command: on stdout one JSON object or words, on stderr what went wrong, and the exit status.

use std::io::Write;

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::agent::api::{ErrorReport, ExitCode};

/// How a command ends.
#[derive(Clone, Debug)]
pub struct Output {
    /// One JSON object instead of words.
    pub json: bool,
    /// The verb; empty when there was none.
    pub command: &'static str,
}

/// What a verb came to: both forms, of which one is shown.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Also the exit status; not always success: a node may be unfit.
    pub code: ExitCode,
    /// The fields of the JSON object.
    pub fields: Value,
    /// For a person; may be empty.
    pub text: String,
}

impl Answer {
    /// A success. `fields` must serialize to a JSON object.
    pub fn new(fields: impl Serialize, text: impl Into<String>) -> Self {
        let fields =
            serde_json::to_value(fields).unwrap_or_else(|e| json!({ "unserializable": e.to_string() }));
        Self { code: ExitCode::Ok, fields, text: text.into() }
    }

    /// With an exit status.
    pub fn code(mut self, code: ExitCode) -> Self {
        self.code = code;
        self
    }
}

impl Output {
    /// Prints it.
    pub fn end(&self, result: Result<Answer, ErrorReport>) -> ExitCode {
        // A reader that has gone away is no reason to end by another status than the work did.
        if self.json {
            let _ = writeln!(std::io::stdout(), "{}", self.object(&result));
        } else {
            match &result {
                Ok(answer) if answer.text.is_empty() => {}
                Ok(answer) => drop(writeln!(std::io::stdout(), "{}", answer.text.trim_end())),
                Err(error) => drop(writeln!(std::io::stderr(), "{}", error_text(error))),
            }
        }
        match result {
            Ok(answer) => answer.code,
            Err(error) => error.code,
        }
    }

    /// The JSON object: `command`, `ok`, `exit`, then the verb's fields or `error`.
    fn object(&self, result: &Result<Answer, ErrorReport>) -> Value {
        let mut object = Map::new();
        let code = result.as_ref().map_or_else(|e| e.code, |a| a.code);
        object.insert("command".into(), json!(self.command));
        object.insert("ok".into(), json!(code == ExitCode::Ok));
        object.insert("exit".into(), json!(code.code()));
        match result {
            Ok(Answer { fields: Value::Object(fields), .. }) => object.extend(fields.clone()),
            Ok(answer) => drop(object.insert("result".into(), answer.fields.clone())),
            Err(error) => drop(object.insert("error".into(), json!(error))),
        }
        Value::Object(object)
    }
}

/// What failed, where, in which phase, what state everything is in now, and what to do; empty parts are left out.
pub fn error_text(error: &ErrorReport) -> String {
    let mut text = format!("error: {}", error.message);
    for (label, value) in
        [("node", &error.node), ("phase", &error.phase), ("now", &error.state), ("do", &error.advice)]
    {
        if !value.is_empty() {
            text.push_str(&format!("\n  {:<6} {value}", format!("{label}:")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output() -> Output {
        Output { json: true, command: "ps" }
    }

    #[test]
    fn success_and_failure_have_one_shape() {
        let good = output().object(&Ok(Answer::new(json!({ "containers": [] }), "")));
        assert_eq!(good, json!({ "command": "ps", "ok": true, "exit": 0, "containers": [] }));
        let bad = output().object(&Err(ErrorReport::new(ExitCode::NoAgent, "gone")));
        assert_eq!(bad["ok"], json!(false));
        assert_eq!(bad["exit"], json!(10));
        assert_eq!(bad["error"]["code"], json!("no-agent"));
        assert_eq!(bad["error"]["message"], json!("gone"));
    }

    #[test]
    fn an_object_is_one_line() {
        let bad = output().object(&Err(ErrorReport::new(ExitCode::Failed, "two\nlines")));
        assert!(!bad.to_string().contains('\n'));
    }

    #[test]
    fn errors_say_everything_that_is_known_and_nothing_else() {
        let mut error = ErrorReport::new(ExitCode::DumpFailed, "the dump failed");
        assert_eq!(error_text(&error), "error: the dump failed");
        error.node = "node-a".into();
        error.phase = "final".into();
        error.state = "redis runs on node-a as before".into();
        error.advice = "close the io_uring".into();
        assert_eq!(
            error_text(&error),
            "error: the dump failed\n  node:  node-a\n  phase: final\n  now:   redis runs on node-a as before\n  do:    close the io_uring"
        );
    }
}
