//! Reads a tool's arguments: leniently where clients differ, strictly where a guess could do harm. Pure.
//!
//! Models and client libraries send the same call in many forms. This module turns them into the one form that the tools' types
//! take. The tool's own input schema is the rule:
//!
//! ```text
//!  null, "" or [] of an optional field, or its default     absent
//!  5.0, "5", "true", "[1]", "{}" where the type fits       5, true, [1], {}
//!  timeout_seconds: 1.5, or its alias timeout_ms: 1500     timeout_ms: 1500
//!  forwards: ["8080:80"], as on the command line           [{host: 127.0.0.1, host_port: 8080, guest_port: 80}]
//!  a field that the schema does not have                   left out, and named in a note
//!  a required field that is missing, another type,         an error for each, with the shape and an example
//!  a value out of bounds
//! ```
//!
//! Invariants: what the schema allows is read without a note and without an error; no message names a type of Rust.

use nido_api::ForwardSpec;
use nido_api::error::{Code, Error};
use nido_api::sanitize::head;
use serde_json::{Map, Value, json};

use crate::answer::plain;

/// Fields whose empty text is a value: an empty file.
const EMPTY_IS_A_VALUE: [&str; 2] = ["content", "content_base64"];
/// The field that holds published ports.
const FORWARDS: &str = "forwards";
/// How fields end that hold a time, and how their aliases do.
const SECONDS: &str = "_seconds";
const MILLISECONDS: &str = "_ms";
/// The longest time that can be given, in seconds: ten years.
const SECONDS_MAX: f64 = 315_360_000.0;
/// How much of a wrong value is shown, in bytes.
const SHOWN: usize = 60;
/// How many wrong fields, and how many unknown ones, are named.
const NAMED_MAX: usize = 8;

/// An example of a field, where its type alone does not show it.
const EXAMPLES: [(&str, &str); 18] = [
    ("name", r#""web-1""#),
    ("template", r#""sandbox""#),
    ("snapshot", r#""before-upgrade""#),
    ("from", r#""web-1""#),
    ("argv", r#"["ls", "-l", "/"]"#),
    ("command", r#""ls -l /""#),
    ("env", r#"{"LANG": "C"}"#),
    ("labels", r#"{"team": "web"}"#),
    ("forwards", r#"["8080:80"]"#),
    ("allow", r#"["example.com:443"]"#),
    ("deny", r#"["example.com:443"]"#),
    ("guest_port", "80"),
    ("host_port", "8080"),
    ("memory_mib", "1024"),
    ("disk_bytes", "4294967296"),
    ("path", r#""/srv/data.txt""#),
    ("user", r#""root""#),
    ("mode", r#""755""#),
];

/// Arguments that were read.
#[derive(Debug)]
pub struct Arguments {
    /// As the tool's type takes them; without what was wrong.
    pub value: Value,
    /// What was not as it should be and did no harm, for the caller.
    pub notes: Vec<String>,
    /// Why the call cannot be made.
    pub wrong: Option<Error>,
}

/// Reads the arguments of a tool with this schema. Fields in `also` are passed on although the schema does not have them: the tool
/// explains why it does not take them.
pub fn read(schema: &Value, also: &[&str], given: Value) -> Arguments {
    let mut reading = ArgumentReader::default();
    let given = match given {
        Value::Object(fields) => fields,
        Value::Null => Map::new(),
        other => {
            reading.wrong.push(format!("arguments: must be an object, not {}", shown(&other)));
            Map::new()
        }
    };
    let value = reading.object(schema, with_parsed_ports(schema, given), "", also);
    let wrong = (!reading.wrong.is_empty()).then(|| {
        reading.wrong.truncate(NAMED_MAX);
        Error::new(Code::SpecInvalid, reading.wrong.join("; "))
    });
    let notes = if reading.unknown.is_empty() {
        Vec::new()
    } else {
        let more = reading.unknown.len().saturating_sub(NAMED_MAX);
        reading.unknown.truncate(NAMED_MAX);
        let more = if more == 0 { String::new() } else { format!(" and {more} more") };
        vec![format!("arguments that this tool does not have were ignored: {}{more}", reading.unknown.join(", "))]
    };
    Arguments { value, notes, wrong }
}

/// Published ports may be written as on the command line: `8080:80` is port 8080 of the host for port 80 of the guest.
fn with_parsed_ports(schema: &Value, mut given: Map<String, Value>) -> Map<String, Value> {
    if schema["properties"].get(FORWARDS).is_some()
        && let Some(ports) = given.remove(FORWARDS)
    {
        let mut ports = text_as_json(ports);
        for port in ports.as_array_mut().into_iter().flatten().filter(|port| !port.is_object()) {
            let text = port.as_str().map_or_else(|| port.to_string(), str::to_owned);
            if let Ok(parsed) = text.parse::<ForwardSpec>() {
                *port = json!(parsed);
            }
        }
        given.insert(FORWARDS.into(), ports);
    }
    given
}

#[derive(Debug, Default)]
struct ArgumentReader {
    unknown: Vec<String>,
    wrong: Vec<String>,
}

impl ArgumentReader {
    fn object(&mut self, schema: &Value, mut given: Map<String, Value>, place: &str, also: &[&str]) -> Value {
        let mut read = Map::new();
        let required =
            |name: &str| schema["required"].as_array().is_some_and(|list| list.iter().any(|one| one == name));
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let at = if place.is_empty() { name.clone() } else { format!("{place}.{name}") };
            let value = given.remove(name);
            if let Some(stem) = name.strip_suffix(SECONDS) {
                let alias = format!("{stem}{MILLISECONDS}");
                let milliseconds = given.remove(&alias);
                if let Some(ms) = self.time(field, &at, value, milliseconds) {
                    read.insert(alias, ms.into());
                }
                continue;
            }
            if required(name) {
                match value {
                    None | Some(Value::Null) => self.wrong.push(missing(&at, field)),
                    Some(value) => drop(self.value(field, value, &at).map(|value| read.insert(name.clone(), value))),
                }
                continue;
            }
            let Some(value) = value.filter(|value| !is_absent(name, value)) else { continue };
            let value = self.value(field, value, &at);
            if let Some(value) = value.filter(|value| field.get("default") != Some(value)) {
                read.insert(name.clone(), value);
            }
        }
        for (name, value) in given {
            if value.is_null() || also.contains(&name.as_str()) && is_absent(&name, &value) {
                continue;
            }
            if also.contains(&name.as_str()) {
                read.insert(name, value);
            } else {
                let name = plain(head(&name, SHOWN));
                self.unknown.push(if place.is_empty() { name } else { format!("{place}.{name}") });
            }
        }
        Value::Object(read)
    }

    /// A time in milliseconds, from either of its two fields.
    fn time(&mut self, field: &Value, at: &str, seconds: Option<Value>, ms: Option<Value>) -> Option<u64> {
        let given = |value: Option<Value>| value.filter(|value| !is_absent("", value));
        let (seconds, ms) = (given(seconds), given(ms));
        let alias = format!("{}{MILLISECONDS}", at.strip_suffix(SECONDS).unwrap_or(at));
        let from_seconds = match seconds {
            Some(value) => Some(self.value(field, value, at)?.as_f64()?),
            None => None,
        };
        let from_ms = match ms {
            Some(value) => Some(self.value(&in_milliseconds(field), value, &alias)?.as_f64()? / 1000.0),
            None => None,
        };
        if let (Some(one), Some(other)) = (from_seconds, from_ms)
            && (one - other).abs() > f64::EPSILON * one.abs().max(other.abs())
        {
            self.wrong
                .push(format!("{at}: {alias} is the same time in milliseconds with another value; give one of them"));
        }
        let seconds = from_seconds.or(from_ms)?;
        if seconds > SECONDS_MAX {
            self.wrong.push(format!("{at}: must be at most {SECONDS_MAX}, which is ten years"));
            return None;
        }
        // A short time is not none: 0 may have a meaning of its own.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to ten years")]
        Some((seconds * 1000.0 - 1e-6).ceil().max(0.0) as u64)
    }

    /// A value as its schema wants it; else what is wrong is noted.
    fn value(&mut self, schema: &Value, given: Value, at: &str) -> Option<Value> {
        let kind = schema["type"].as_str().unwrap_or_default();
        let read = match kind {
            "string" => Some(given.clone()).filter(Value::is_string),
            "boolean" => boolean(&given).map(Value::from),
            "integer" => whole(&given),
            "number" => number(&given).map(Value::from),
            "array" | "object" => match text_as_json(given.clone()) {
                Value::Array(items) if kind == "array" => return Some(self.items(&schema["items"], items, at)),
                Value::Object(fields) if kind == "object" => return Some(self.fields(schema, fields, at)),
                _ => None,
            },
            _ => return Some(given),
        };
        let read = read.filter(|value| within(schema, value));
        if read.is_none() {
            self.wrong.push(format!("{at}: must be {}, not {}", shape(at, schema), shown(&given)));
        }
        read
    }

    fn items(&mut self, schema: &Value, items: Vec<Value>, at: &str) -> Value {
        let items = items.into_iter().enumerate();
        items.filter_map(|(index, item)| self.value(schema, item, &format!("{at}[{index}]"))).collect()
    }

    fn fields(&mut self, schema: &Value, fields: Map<String, Value>, at: &str) -> Value {
        if schema.get("properties").is_some() {
            return self.object(schema, fields, at, &[]);
        }
        let of_each = &schema["additionalProperties"];
        let fields = fields.into_iter().filter_map(|(name, value)| {
            let at = format!("{at}.{}", plain(head(&name, SHOWN)));
            Some((name, self.value(of_each, value, &at)?))
        });
        Value::Object(fields.collect())
    }
}

/// Whether this is another way not to give an optional field.
fn is_absent(name: &str, value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty() && !EMPTY_IS_A_VALUE.contains(&name),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// A list or a map that arrives as JSON in a string.
fn text_as_json(value: Value) -> Value {
    match value {
        Value::String(text) if text.trim_start().starts_with(['[', '{']) => {
            serde_json::from_str(&text).unwrap_or(Value::String(text))
        }
        other => other,
    }
}

fn boolean(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(yes) => Some(*yes),
        Value::String(text) if text.eq_ignore_ascii_case("true") => Some(true),
        Value::String(text) if text.eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => serde_json::from_str::<serde_json::Number>(text.trim()).ok()?.as_f64(),
        _ => None,
    }
}

/// A whole number, also where it is written with a fraction of zero.
fn whole(value: &Value) -> Option<Value> {
    let exact = match value {
        Value::String(text) => serde_json::from_str::<Value>(text.trim()).ok().filter(Value::is_number)?,
        other => other.clone(),
    };
    if exact.is_u64() || exact.is_i64() {
        return Some(exact);
    }
    // Beyond that a double does not distinguish whole numbers.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let number = exact.as_f64()?;
    #[expect(clippy::cast_possible_truncation, reason = "it is whole and within bounds")]
    (number.fract() == 0.0 && number.abs() <= EXACT).then(|| json!(number as i64))
}

/// Whether a value of the right type is one that the schema allows.
fn within(schema: &Value, value: &Value) -> bool {
    if let Some(choices) = schema["enum"].as_array() {
        return choices.contains(value);
    }
    let Some(number) = value.as_f64() else { return true };
    let bound = |word: &str| schema[word].as_f64();
    number.is_finite()
        && bound("minimum").is_none_or(|least| number >= least)
        && bound("exclusiveMinimum").is_none_or(|least| number > least)
        && bound("maximum").is_none_or(|most| number <= most)
}

/// The schema of a time's alias.
fn in_milliseconds(field: &Value) -> Value {
    let mut schema = json!({ "type": "number" });
    for bound in ["minimum", "exclusiveMinimum", "maximum"] {
        if let Some(seconds) = field[bound].as_f64() {
            schema[bound] = json!(seconds * 1000.0);
        }
    }
    schema
}

fn missing(at: &str, schema: &Value) -> String {
    format!("{at}: it is missing; it must be {}", shape(at, schema))
}

/// What a value has to be, in words and with an example.
fn shape(at: &str, schema: &Value) -> String {
    let field = at.rsplit('.').next().unwrap_or(at);
    let example = EXAMPLES.iter().find(|(name, _)| *name == field).map(|(_, example)| (*example).to_owned());
    let list = |choices: &Vec<Value>| choices.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", ");
    let (words, usual) = match schema["type"].as_str().unwrap_or_default() {
        "string" => match schema["enum"].as_array() {
            Some(choices) => return format!("one of {}", list(choices)),
            None => ("text".to_owned(), r#""text""#.to_owned()),
        },
        "boolean" => ("true or false".to_owned(), "true".to_owned()),
        "integer" => (format!("a whole number{}", bounds(schema)), number_for(schema, 1.0)),
        "number" => (format!("a number{}", bounds(schema)), number_for(schema, 60.0)),
        "array" if schema["items"]["type"] == "object" => ("a list of objects".to_owned(), "[{}]".to_owned()),
        "array" => ("a list of texts".to_owned(), r#"["a", "b"]"#.to_owned()),
        "object" if schema["properties"].get("guest_port").is_some() => {
            (r#"a port such as "8080:80", or an object"#.to_owned(), example_of(schema))
        }
        "object" if schema.get("properties").is_some() => ("an object".to_owned(), example_of(schema)),
        _ => ("an object with text values".to_owned(), r#"{"KEY": "value"}"#.to_owned()),
    };
    format!("{words}, for example {}", example.unwrap_or(usual))
}

fn bounds(schema: &Value) -> String {
    let least = &schema["minimum"];
    let above = &schema["exclusiveMinimum"];
    match (least.is_number(), above.is_number(), &schema["maximum"]) {
        (true, _, Value::Number(most)) => format!(" from {least} to {most}"),
        (true, ..) => format!(", at least {least}"),
        (_, true, _) => format!(" greater than {above}"),
        (.., Value::Number(most)) => format!(", at most {most}"),
        _ => String::new(),
    }
}

fn number_for(schema: &Value, usual: f64) -> String {
    let least = schema["minimum"].as_f64().unwrap_or(usual);
    let most = schema["maximum"].as_f64().unwrap_or(usual.max(least));
    json!(usual.clamp(least.min(most), most)).to_string().trim_end_matches(".0").to_owned()
}

/// An object with what it needs.
fn example_of(schema: &Value) -> String {
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let fields = required.map(|name| {
        let known = EXAMPLES.iter().find(|(field, _)| *field == name);
        format!("\"{name}\": {}", known.map_or("\"text\"", |(_, example)| example))
    });
    format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
}

/// A wrong value, short. For a long or nested one, its kind.
fn shown(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        Value::String(text) if text.len() > SHOWN => "a longer text".into(),
        other => plain(&other.to_string()),
    }
}

#[cfg(test)]
mod tests;
