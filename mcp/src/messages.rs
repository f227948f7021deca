//! Whether bytes from a client are a message, and the response if they are not. Pure.
//!
//! The protocol's library drops what it cannot read, and its client then waits for an answer until it gives up. So every message is
//! looked at here first.
//!
//! Invariant: what has an id that can be read is answered with that id.

use rmcp::RoleServer;
use rmcp::model::{ErrorCode, ErrorData, JsonRpcMessage, RequestId};
use rmcp::service::RxJsonRpcMessage;
use serde_json::Value;

/// The longest id that is looked for in bytes that are no JSON.
const ID_MAX: usize = 256;
/// What an editor may put in front of a message.
const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// What bytes are.
#[derive(Debug)]
pub enum ParsedMessage {
    /// A message.
    Message(Box<RxJsonRpcMessage<RoleServer>>),
    /// Invalid as a notification, or empty.
    Nothing,
    /// No message, and what its sender is answered.
    Refused(Refusal),
}

/// Why something is no message.
#[derive(Debug)]
pub struct Refusal {
    /// Of what it would have been.
    pub id: Option<RequestId>,
    /// In the protocol's words.
    pub error: ErrorData,
}

impl Refusal {
    /// The code -32600.
    pub fn invalid(id: Option<RequestId>, words: impl Into<String>) -> Self {
        Self { id, error: ErrorData::new(ErrorCode::INVALID_REQUEST, words.into(), None) }
    }

    /// The same as a message of its own.
    pub fn json(&self) -> Value {
        serde_json::json!({ "jsonrpc": "2.0", "id": self.id, "error": self.error })
    }
}

/// What these bytes are.
pub fn read(bytes: &[u8]) -> ParsedMessage {
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(bytes).trim_ascii();
    if bytes.is_empty() {
        return ParsedMessage::Nothing;
    }
    if let Ok(message) = serde_json::from_slice(bytes) {
        // The library takes a request with an invalid id for a notification, which gets no response.
        if !matches!(message, JsonRpcMessage::Notification(_)) || !has_id(bytes) {
            return ParsedMessage::Message(Box::new(message));
        }
    }
    let value: Value = match serde_json::from_slice(bytes) {
        Ok(value) => value,
        Err(error) => {
            // JSON that is nested too deeply is JSON nevertheless: it has an id.
            let is_deep = error.to_string().starts_with("recursion limit");
            let id = if is_deep { id_in(bytes) } else { None };
            let words = if is_deep { "the message is nested too deeply" } else { "the message is not JSON" };
            let code = if is_deep { ErrorCode::INVALID_REQUEST } else { ErrorCode::PARSE_ERROR };
            return ParsedMessage::Refused(Refusal { id, error: ErrorData::new(code, words, None) });
        }
    };
    let Value::Object(fields) = &value else {
        let words = if value.is_array() { "batches of messages are not supported" } else { "a message is an object" };
        return ParsedMessage::Refused(Refusal::invalid(None, words));
    };
    let id = fields.get("id");
    // A notification: it gets no response.
    if id.is_none() && fields.get("method").is_some_and(Value::is_string) {
        return ParsedMessage::Nothing;
    }
    let id = id.and_then(|id| serde_json::from_value::<RequestId>(id.clone()).ok());
    let words = match fields.get("method") {
        _ if fields.get("jsonrpc") != Some(&Value::from("2.0")) => "jsonrpc: it must be \"2.0\"",
        _ if id.is_none() => "id: it must be text or a whole number",
        Some(Value::String(_)) => "params: they must be an object",
        Some(_) => "method: it must be text",
        None => "the message is neither a request nor a response",
    };
    ParsedMessage::Refused(Refusal::invalid(id, words))
}

fn has_id(bytes: &[u8]) -> bool {
    serde_json::from_slice::<Value>(bytes).is_ok_and(|message| message.get("id").is_some())
}

/// The id in bytes that cannot be read as a whole.
pub fn id_in(bytes: &[u8]) -> Option<RequestId> {
    let mut seeker = IdScanner::default();
    seeker.feed(bytes);
    seeker.id()
}

/// Finds the id of a message that is too long to be kept: the value of `id` in its outermost object.
#[derive(Debug, Default)]
pub struct IdScanner {
    depth: usize,
    /// Within a text, and whether the next character is escaped.
    text: Option<bool>,
    /// The last text at depth 1, then after a colon the value.
    last: Vec<u8>,
    value: Option<Vec<u8>>,
    found: Option<Vec<u8>>,
}

impl IdScanner {
    /// More of the message.
    pub fn feed(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if self.found.is_some() {
                return;
            }
            self.take(byte);
        }
    }

    /// What was found.
    pub fn id(&self) -> Option<RequestId> {
        serde_json::from_slice(self.found.as_ref()?).ok()
    }

    fn take(&mut self, byte: u8) {
        if let Some(escaped) = self.text {
            self.keep(byte);
            self.text = match byte {
                _ if escaped => Some(false),
                b'\\' => Some(true),
                b'"' => None,
                _ => Some(false),
            };
            return;
        }
        match byte {
            b'"' => {
                self.text = Some(false);
                if self.value.is_none() {
                    self.last.clear();
                }
                self.keep(byte);
            }
            b'{' | b'[' => {
                self.depth += 1;
                // An id is no list and no object.
                self.value = None;
            }
            b':' if self.depth == 1 && self.last == b"\"id\"" => self.value = Some(Vec::new()),
            b',' | b'}' | b']' => {
                if self.depth == 1 {
                    self.found = self.value.take();
                    self.last.clear();
                }
                if byte != b',' {
                    self.depth = self.depth.saturating_sub(1);
                }
            }
            _ if byte.is_ascii_whitespace() => {}
            _ => self.keep(byte),
        }
    }

    fn keep(&mut self, byte: u8) {
        if self.depth != 1 {
            return;
        }
        let kept = self.value.as_mut().unwrap_or(&mut self.last);
        if kept.len() < ID_MAX {
            kept.push(byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(bytes: &[u8]) -> (Value, i32, String) {
        match read(bytes) {
            ParsedMessage::Refused(refusal) => {
                let json = refusal.json();
                (json["id"].clone(), refusal.error.code.0, refusal.error.message.into_owned())
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn invalid_messages_are_answered_with_their_id() {
        // Clients waited for ever for the answer to a message that the library had dropped.
        for (message, id, code) in [
            (r#"{bad json"#.to_owned(), json!(null), -32700),
            (r#"{"jsonrpc":"2.0","id":7,"method":7}"#.to_owned(), json!(7), -32600),
            (r#"{"jsonrpc":"2.0","id":"a","method":["x"]}"#.to_owned(), json!("a"), -32600),
            (r#"{"jsonrpc":"2.0","id":1.5,"method":"ping"}"#.to_owned(), json!(null), -32600),
            (r#"{"jsonrpc":"1.0","id":7,"method":"ping"}"#.to_owned(), json!(7), -32600),
            (r#"{"jsonrpc":"2.0","id":{},"method":"ping"}"#.to_owned(), json!(null), -32600),
            (r#"[{"jsonrpc":"2.0","id":7,"method":"ping"}]"#.to_owned(), json!(null), -32600),
            (r#""text""#.to_owned(), json!(null), -32600),
            (
                format!(
                    r#"{{"jsonrpc":"2.0","params":{}{},"id":9,"method":"ping"}}"#,
                    "[".repeat(500),
                    "]".repeat(500)
                ),
                json!(9),
                -32600,
            ),
        ] {
            let (found, said, words) = refused(message.as_bytes());
            assert_eq!((found, said), (id, code), "{message}: {words}");
        }
    }

    #[test]
    fn messages_and_notifications_are_let_through() {
        for message in [
            r#"{"jsonrpc":"2.0","id":1,"method":"ping"}"#,
            r#"{"jsonrpc":"2.0","id":1,"method":"no/such","params":{}}"#,
            "\u{feff}{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"ping\"}\r",
            r#"{"jsonrpc":"2.0","id":1,"result":{}}"#,
            r#"{"jsonrpc":"2.0","method":"notifications/initialized"}"#,
        ] {
            assert!(matches!(read(message.as_bytes()), ParsedMessage::Message(_)), "{message}");
        }
        for nothing in ["", "\r", r#"{"method":"textDocument/didOpen","params":[]}"#] {
            assert!(matches!(read(nothing.as_bytes()), ParsedMessage::Nothing), "{nothing}");
        }
    }

    #[test]
    fn an_id_is_found_at_any_position_of_the_outermost_object_only() {
        for (message, id) in [
            (r#"{"id":7,"x":"#.to_owned(), Some(json!(7))),
            (r#"{"params":{"id":1,"a":[{"id":2}]},"id":"x\"y"}"#.to_owned(), Some(json!("x\"y"))),
            (r#"{"a":"\"id\":3,","id" : 4 }"#.to_owned(), Some(json!(4))),
            (r#"{"params":{"id":1}}"#.to_owned(), None),
            (r#"{"id":{"id":1}}"#.to_owned(), None),
            (format!(r#"{{"x":"{}","id":5}}"#, "y".repeat(10_000)), Some(json!(5))),
        ] {
            let mut seeker = IdScanner::default();
            message.as_bytes().chunks(3).for_each(|piece| seeker.feed(piece));
            assert_eq!(seeker.id().map(|id| json!(id)), id, "{message}");
        }
    }

    #[test]
    fn fuzz_messages() {
        let seeds = [
            r#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}"#,
            r#"{"jsonrpc":"2.0","id":"a","method":"tools/call","params":{"name":"vm_exec","arguments":{"vm":"web","argv":["ls"]}}}"#,
            r#"{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":1}}"#,
            r#"{"jsonrpc":"2.0","id":2,"result":{"action":"accept","content":{}}}"#,
            r#"{"jsonrpc":"2.0","id":2,"error":{"code":-32600,"message":"no"}}"#,
        ];
        nido_fuzz::fuzz("mcp-messages", &seeds.map(|line| line.as_bytes().to_vec()), |input| {
            if let ParsedMessage::Refused(refusal) = read(input) {
                let json = refusal.json();
                assert!(json["error"]["code"].is_i64() && json["id"].is_null() == refusal.id.is_none(), "{json}");
            }
            // An id is found in pieces as in the whole.
            let mut seeker = IdScanner::default();
            input.chunks(3).for_each(|piece| seeker.feed(piece));
            assert_eq!(seeker.id(), id_in(input));
        });
    }
}
