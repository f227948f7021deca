//! What of an operation's arguments may be recorded. Pure.
//!
//! Secrets are recognised by the names of what holds them: a secret in the middle of a shell script is not, and a script is never
//! taken for one. Of a `url` the host is kept: its path may be the secret, as that of Slack's endpoints is. Of standard input and contents
//! the SHA-256 is kept. Invariant: what comes out is JSON of at most [`LIMIT`] bytes; of every argument both ends are in it, what was
//! run comes first, and states how much was left out.

use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use url::Url;

use crate::hex;
use crate::sanitize::head;

/// The longest arguments that are recorded as they are, in bytes.
pub const LIMIT: usize = 4096;
/// How much is shown of each text of those that are longer: as much as fits.
const BUDGETS: [usize; 5] = [1024, 384, 128, 48, 16];
/// What comes first, and is never left out.
const FIRST: [&str; 10] =
    ["name", "argv", "command", "vm", "vm_name", "names", "snapshot", "path", "source", "destination"];
/// How many items of a list, and how many fields, are shown of those that are longer.
const ITEMS: usize = 24;
/// The longest name of a field there.
const NAME: usize = 64;
/// The field that names what was left out.
const CUT: &str = "cut";

/// Words in a name whose value is secret.
const SECRET: [&str; 6] = ["passphrase", "credential", "credentials", "authorization", "cookie", "apikey"];
/// Words in a name that mark that its value is too much for a log.
const DATA: [&str; 4] = ["stdin", "content", "contents", "data"];
/// Ends of such words: `PGPASSWORD`.
const SECRET_END: [&str; 4] = ["token", "secret", "password", "passwd"];

/// Redacted arguments that do not fit into a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OversizedArguments {
    /// Of the text, in hexadecimal.
    pub sha256: String,
    /// They, as JSON.
    pub text: String,
}

/// Arguments as they are recorded: redacted, as JSON, of limited length.
#[must_use]
pub fn params(arguments: &Value) -> String {
    params_and_whole(arguments).0
}

/// The same, and all of them where they are too long.
#[must_use]
pub fn params_and_whole(arguments: &Value) -> (String, Option<OversizedArguments>) {
    let redacted = value(arguments);
    let text = redacted.to_string();
    if text.len() <= LIMIT {
        return (text, None);
    }
    let sha256 = hex::encode(&Sha256::digest(text.as_bytes()));
    let cut = json!({ "bytes": text.len(), "sha256": &sha256 });
    let all = BUDGETS.iter().map(|budget| shortened(&redacted, *budget, &cut, false));
    let first = BUDGETS.iter().map(|budget| shortened(&redacted, *budget, &cut, true));
    let fits = all.chain(first).map(|short| short.to_string()).find(|short| short.len() <= LIMIT);
    (fits.unwrap_or_else(|| json!({ CUT: cut }).to_string()), Some(OversizedArguments { sha256, text }))
}

/// Both ends of every text; only what counts most, or everything.
fn shortened(redacted: &Value, budget: usize, cut: &Value, only_first: bool) -> Value {
    let Value::Object(fields) = redacted else {
        return json!({ "value": brief(redacted, budget), CUT: cut });
    };
    let mut short = Map::new();
    for key in FIRST {
        if let Some(value) = fields.get(key) {
            short.insert(key.into(), brief(value, budget));
        }
    }
    let others = fields.iter().filter(|(key, _)| !FIRST.contains(&key.as_str()) && *key != CUT);
    for (key, value) in others.take(if only_first { 0 } else { ITEMS }) {
        short.insert(ends(key, NAME), brief(value, budget));
    }
    short.insert(CUT.into(), cut.clone());
    Value::Object(short)
}

fn brief(value: &Value, budget: usize) -> Value {
    match value {
        Value::String(text) => ends(text, budget).into(),
        Value::Array(items) if items.len() > ITEMS => {
            let (first, last) = (ITEMS * 2 / 3, ITEMS / 3);
            let left_out = format!("[{} items left out]", items.len() - first - last);
            let shown = items[..first].iter().map(|item| brief(item, budget)).chain([left_out.into()]);
            shown.chain(items[items.len() - last..].iter().map(|item| brief(item, budget))).collect()
        }
        Value::Array(items) => items.iter().map(|item| brief(item, budget)).collect(),
        Value::Object(fields) => {
            let shown = fields.iter().take(ITEMS).map(|(key, value)| (ends(key, NAME), brief(value, budget)));
            Value::Object(shown.collect())
        }
        other => other.clone(),
    }
}

/// A text, or its beginning and its end.
fn ends(text: &str, budget: usize) -> String {
    if text.len() <= budget {
        return text.to_owned();
    }
    let first = head(text, budget / 2);
    let from = (text.len() - budget / 2..=text.len()).find(|at| text.is_char_boundary(*at)).unwrap_or(text.len());
    let last = &text[from..];
    format!("{first}[{} bytes left out]{last}", text.len() - first.len() - last.len())
}

fn value(from: &Value) -> Value {
    match from {
        Value::Object(fields) => {
            Value::Object(fields.iter().map(|(key, value)| (key.clone(), field(key, value))).collect())
        }
        Value::Array(items) => list(items),
        other => other.clone(),
    }
}

fn field(key: &str, from: &Value) -> Value {
    if matches!(key.to_ascii_lowercase().as_str(), "env" | "environment") {
        return names_only(from);
    }
    if words(key).iter().any(|word| DATA.contains(&word.as_str())) {
        return hashed(from);
    }
    if is_secret(key) {
        return hidden(from);
    }
    if words(key).iter().any(|word| word == "url") { host_only(from) } else { value(from) }
}

/// Scheme and host of a URL; anything else is omitted.
fn host_only(address: &Value) -> Value {
    let text = address.as_str().unwrap_or_default();
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let Some((url, host)) = url.as_ref().and_then(|url| Some((url, url.host_str()?))) else { return hidden(address) };
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    let kept = format!("{}://{host}{port}", url.scheme());
    match text.len().saturating_sub(kept.len()) {
        0 => kept.into(),
        bytes => format!("{kept}/{}", hint(bytes)).into(),
    }
}

/// Items of a list; of those that are arguments of a command, `--password x`, `--password=x`, `TOKEN=x` and `Cookie: x` lose
/// the value.
fn list(items: &[Value]) -> Value {
    let (mut secret_follows, mut code_follows) = (false, false);
    let redacted = items.iter().map(|item| {
        let text = item.as_str();
        let is_code = code_follows && text.is_some_and(|text| text.contains(|c: char| !is_word_char(c) && c != '='));
        code_follows = text.is_some_and(|text| takes_code(text) || (text == "--" && code_follows));
        if is_code {
            return item.clone();
        }
        if std::mem::take(&mut secret_follows) && !text.is_some_and(|text| text.starts_with("--")) {
            return hidden(item);
        }
        let Some(text) = text else { return value(item) };
        secret_follows = text.starts_with("--") && is_word(text) && is_secret(text);
        pair(text.as_bytes()).map_or_else(|| item.clone(), Value::from)
    });
    Value::Array(redacted.collect())
}

/// Whether the argument behind this one may be a program's text, as with `sh -c`, `bash -xc`, `perl -e`.
fn takes_code(option: &str) -> bool {
    let short = option.strip_prefix('-').filter(|letters| letters.bytes().all(|b| b.is_ascii_alphabetic()));
    short.is_some_and(|letters| letters.ends_with(['c', 'e'])) || matches!(option, "--command" | "--eval")
}

/// `NAME=VALUE` or `NAME: VALUE` without the value, if that is a secret.
fn pair(text: &[u8]) -> Option<String> {
    let at = text.iter().position(|b| matches!(b, b'=' | b':'))?;
    let name = std::str::from_utf8(&text[..at]).ok()?;
    (is_word(name) && is_secret(name)).then(|| format!("{name}{}{}", char::from(text[at]), hint(text.len() - at - 1)))
}

/// Of environment variables only the names.
fn names_only(environment: &Value) -> Value {
    let name = |pair: &str| Value::from(pair.split_once('=').map_or(pair, |(name, _)| name));
    match environment {
        Value::Array(pairs) => {
            pairs.iter().map(|pair| pair.as_str().map_or_else(|| hidden(pair), name)).collect::<Vec<_>>().into()
        }
        Value::Object(variables) => variables.keys().cloned().collect::<Vec<_>>().into(),
        Value::String(pair) => name(pair),
        other => hidden(other),
    }
}

fn hidden(from: &Value) -> Value {
    match from {
        Value::Null | Value::Bool(_) => from.clone(),
        Value::String(text) => hint(text.len()).into(),
        other => hint(other.to_string().len()).into(),
    }
}

/// Of what is too much for a log, how much it was, and a hash to compare it with known values.
fn hashed(from: &Value) -> Value {
    let text = match from {
        Value::Null | Value::Bool(_) => return from.clone(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    format!("[redacted: {} bytes, sha256:{}]", text.len(), hex::encode(&Sha256::digest(text.as_bytes()))).into()
}

fn hint(bytes: usize) -> String {
    format!("[redacted: {bytes} bytes]")
}

fn is_word(text: &str) -> bool {
    text.chars().all(is_word_char)
}

fn is_word_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// Whether one of the words a name is made of is secret: `apiToken`, `API_TOKEN`, `--api-token`;
/// or it is a key.
fn is_secret(name: &str) -> bool {
    let words = words(name);
    let has = |wanted: &[&str]| words.iter().any(|word| wanted.contains(&word.as_str()));
    let key = has(&["key"]) && has(&["api", "private", "access"]);
    key || words.iter().any(|word| {
        SECRET.contains(&word.as_str())
            || DATA.contains(&word.as_str())
            || SECRET_END.iter().any(|end| word.ends_with(end))
    })
}

fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut after_small = false;
    for c in name.chars() {
        if !c.is_ascii_alphanumeric() || (c.is_ascii_uppercase() && after_small) {
            words.push(String::new());
        }
        after_small = c.is_ascii_lowercase();
        if c.is_ascii_alphanumeric()
            && let Some(word) = words.last_mut()
        {
            word.push(c.to_ascii_lowercase());
        }
    }
    words
}

/// Bytes that need not be text, for arguments: as text where they are, else in hexadecimal.
#[must_use]
pub fn bytes(from: &[u8]) -> Value {
    match std::str::from_utf8(from) {
        Ok(text) => text.into(),
        // What is a secret must be known as one while it can be.
        Err(_) => pair(from).map_or_else(|| json!({ "hex": hex::encode(from) }), Value::from),
    }
}

#[cfg(test)]
mod tests;
