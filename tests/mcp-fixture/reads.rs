//! The resources that the suite reads.

use rmcp::model::ErrorData;
use serde_json::{Value, json};

/// A PNG of one grey pixel, as base64.
pub const PNG: &str = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mOoBwAAgQCAfhwpxwAAAABJRU5ErkJggg==";

/// What can be read.
pub fn list() -> Value {
    json!([
        { "uri": "test://static-text", "name": "text", "description": "Always the same text", "mimeType": "text/plain" },
        { "uri": "test://static-binary", "name": "binary", "description": "Always the same picture", "mimeType": "image/png" },
        { "uri": "test://watched-resource", "name": "watched", "description": "Can be subscribed to", "mimeType": "text/plain" },
    ])
}

/// What can be read of each number.
pub fn templates() -> Value {
    json!([{
        "uriTemplate": "test://template/{id}/data",
        "name": "template",
        "description": "Says which number it was asked for",
        "mimeType": "application/json",
    }])
}

/// Reads one.
pub fn read(uri: &str) -> Result<Value, ErrorData> {
    let content = match uri {
        "test://static-text" => json!({ "mimeType": "text/plain", "text": "Always the same text." }),
        "test://static-binary" => json!({ "mimeType": "image/png", "blob": PNG }),
        "test://watched-resource" => json!({ "mimeType": "text/plain", "text": "It never changes." }),
        _ => {
            let id = uri.strip_prefix("test://template/").and_then(|rest| rest.strip_suffix("/data"));
            let nothing = || ErrorData::resource_not_found("there is no such resource", Some(json!({ "uri": uri })));
            let id = id.filter(|id| !id.is_empty() && !id.contains('/')).ok_or_else(nothing)?;
            let text = json!({ "id": id, "templateTest": true, "data": format!("of {id}") }).to_string();
            json!({ "mimeType": "application/json", "text": text })
        }
    };
    let mut content = content;
    content["uri"] = uri.into();
    Ok(json!({ "contents": [content] }))
}
