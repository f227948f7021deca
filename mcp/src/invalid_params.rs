//! Requests whose method is known and whose params do not fit that method. Pure.
//!
//! The protocol's library takes such a request for one of a method that it does not know; for the client it is the params that
//! are wrong, and which part of them.

use nido_api::sanitize::head;
use rmcp::model::{
    CallToolRequestParams, CompleteRequestParams, GetPromptRequestParams, ReadResourceRequestParams,
    SubscribeRequestParams, SubscriptionsListenRequestParams, UnsubscribeRequestParams,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::answer::plain;

/// How much of an invalid value is repeated, in bytes.
const SHOWN: usize = 300;

/// The method that calls a tool.
pub const CALL: &str = "tools/call";

/// What is wrong with the params of this method, or nothing if it is not served here: `modern` is the protocol of the client, because how
/// to listen differs between the eras.
pub fn wrong(method: &str, params: Option<&Value>, modern: bool) -> Option<String> {
    let check: fn(Value) -> Option<String> = match method {
        CALL => problem_of::<CallToolRequestParams>,
        "completion/complete" => problem_of::<CompleteRequestParams>,
        "prompts/get" => problem_of::<GetPromptRequestParams>,
        "resources/read" => problem_of::<ReadResourceRequestParams>,
        "resources/subscribe" if !modern => problem_of::<SubscribeRequestParams>,
        "resources/unsubscribe" if !modern => problem_of::<UnsubscribeRequestParams>,
        "subscriptions/listen" if modern => problem_of::<SubscriptionsListenRequestParams>,
        _ => return None,
    };
    let Some(params) = params else { return Some("params: they are missing".into()) };
    if !params.is_object() {
        return Some("params: they are an object".into());
    }
    let words = check(params.clone()).unwrap_or_else(|| "params: they are not those of this method".into());
    Some(plain(head(&words, SHOWN)))
}

fn problem_of<T: DeserializeOwned>(params: Value) -> Option<String> {
    let error = serde_path_to_error::deserialize::<_, T>(params).err()?;
    let path = error.path().to_string();
    let field = if path == "." { "params".to_owned() } else { path };
    Some(format!("{field}: {}", error.into_inner()))
}

/// Which tool was to be called, if that is known, and what the audit log gets of its arguments: what is not in its
/// place cannot be searched for secrets.
pub fn called(params: Option<&Value>) -> (String, Value) {
    let params = params.unwrap_or(&Value::Null);
    let name = params["name"].as_str().unwrap_or(CALL).to_owned();
    let arguments = match &params["arguments"] {
        given @ Value::Object(_) => given.clone(),
        _ => json!({}),
    };
    (name, arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_place() {
        for (method, params, words) in [
            (
                CALL,
                json!({"name": "vm_ls", "arguments": "{}"}),
                "arguments: invalid type: string \"{}\", expected a map",
            ),
            (CALL, json!({"name": "vm_ls", "arguments": []}), "arguments: invalid type: sequence, expected a map"),
            (CALL, json!({"name": 1}), "name: invalid type: integer `1`, expected a string"),
            (CALL, json!({}), "params: missing field `name`"),
            ("resources/read", json!({"uri": null}), "uri: invalid type: null, expected a string"),
            ("prompts/get", json!([]), "params: they are an object"),
        ] {
            for modern in [true, false] {
                assert_eq!(wrong(method, Some(&params), modern).as_deref(), Some(words));
            }
        }
        assert_eq!(wrong(CALL, None, true).as_deref(), Some("params: they are missing"));
        assert_eq!(wrong("no/such/method", Some(&json!({})), true), None);
        let long = wrong(CALL, Some(&json!({"name": "vm_ls", "arguments": "\u{1b}x".repeat(1000)})), true).unwrap();
        assert!(long.len() <= SHOWN && !long.contains('\u{1b}'), "{long}");
    }

    #[test]
    fn methods_of_the_other_protocol_version_are_unknown() {
        for (method, modern) in
            [("resources/subscribe", false), ("resources/unsubscribe", false), ("subscriptions/listen", true)]
        {
            assert!(wrong(method, None, modern).is_some() && wrong(method, None, !modern).is_none(), "{method}");
        }
    }

    #[test]
    fn values_that_cannot_be_redacted_are_not_recorded() {
        let problem_of = |params: Value| called(Some(&params));
        assert_eq!(problem_of(json!({"name": "vm_exec", "arguments": "stdin"})), ("vm_exec".into(), json!({})));
        assert_eq!(problem_of(json!({"arguments": {"a": 1}})), (CALL.into(), json!({"a": 1})));
        assert_eq!(called(None), (CALL.into(), json!({})));
    }
}
