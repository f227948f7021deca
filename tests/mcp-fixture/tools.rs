//! The tools that the suite calls.

#![allow(deprecated, reason = "the suite for 2025-11-25 wants logging, which the next revision has given up")]

use std::time::Duration;

use rmcp::RoleServer;
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, ErrorData, LoggingLevel, LoggingMessageNotificationParam,
    ProgressNotificationParam,
};
use rmcp::service::RequestContext;
use serde_json::{Value, json};

use crate::asks::{self, CallStage, Retry};
use crate::reads::PNG;
use crate::server::{Changed, Server, complete};

/// Eight bytes of silence, as base64 of a WAV.
const WAV: &str = "UklGRiwAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQgAAACAgICAgICAgA==";
/// The time between two messages of a call, which the suite names.
const GAP: Duration = Duration::from_millis(50);

/// Those without arguments.
const PLAIN: [(&str, &str); 24] = [
    ("test_simple_text", "Answers with words"),
    ("test_image_content", "Answers with a picture"),
    ("test_audio_content", "Answers with a sound"),
    ("test_embedded_resource", "Answers with a resource"),
    ("test_multiple_content_types", "Answers with words, a picture and a resource"),
    ("test_error_handling", "Always fails"),
    ("test_tool_with_progress", "Tells how far it has come"),
    ("test_tool_with_logging", "Tells its session what it does"),
    ("test_logging_tool", "Tells what it does, if its request wants that"),
    ("test_reconnection", "Takes a while"),
    ("test_elicitation_sep1034_defaults", "Shows a form that is filled in already"),
    ("test_elicitation_sep1330_enums", "Shows a form with things to choose from"),
    ("test_trigger_tool_change", "Tells listeners that the tools have changed"),
    ("test_trigger_prompt_change", "Tells listeners that the prompts have changed"),
    ("test_streaming_elicitation", "Asks for a name, with no request of its own"),
    ("test_missing_capability", "Asks for words of a model"),
    ("test_input_required_result_elicitation", "Asks for a name"),
    ("test_input_required_result_sampling", "Asks for words of a model"),
    ("test_input_required_result_list_roots", "Asks for roots"),
    ("test_input_required_result_request_state", "Asks, and knows which call the answer is of"),
    ("test_input_required_result_multiple_inputs", "Asks for three things at once"),
    ("test_input_required_result_multi_round", "Asks twice"),
    ("test_input_required_result_tampered_state", "Asks, and takes no other state back than it gave"),
    ("test_input_required_result_capabilities", "Asks for what its client can be asked for"),
];

/// Which there are.
pub fn list() -> Value {
    let plain = PLAIN.map(|(name, words)| tool(name, words, &json!({ "type": "object", "properties": {} })));
    let of_one = |argument: &str, schema: Value| json!({ "type": "object", "properties": { argument: schema }, "required": [argument] });
    let text = || json!({ "type": "string" });
    let routed = json!({ "type": "string", "x-mcp-header": "Region" });
    let mut list = plain.to_vec();
    list.extend([
        tool("test_sampling", "Asks for words of a model", &of_one("prompt", text())),
        tool("test_elicitation", "Shows a form", &of_one("message", text())),
        tool("test_routed", "Has an argument that is in a header, too", &of_one("region", routed)),
        tool("json_schema_2020_12_tool", "Has a schema with all there is in schemas", &schema()),
    ]);
    list.into()
}

fn tool(name: &str, words: &str, schema: &Value) -> Value {
    json!({ "name": name, "description": words, "inputSchema": schema })
}

/// The schema that the suite wants to see unchanged.
fn schema() -> Value {
    let text = || json!({ "type": "string" });
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "$defs": { "address": { "$anchor": "addressDef", "type": "object", "properties": { "street": text(), "city": text() } } },
        "properties": {
            "name": text(),
            "address": { "$ref": "#/$defs/address" },
            "contactMethod": { "type": "string", "enum": ["phone", "email"] },
            "phone": text(),
            "email": text(),
        },
        "allOf": [{ "anyOf": [{ "required": ["phone"] }, { "required": ["email"] }] }],
        "if": { "properties": { "contactMethod": { "const": "phone" } }, "required": ["contactMethod"] },
        "then": { "required": ["phone"] },
        "else": { "required": ["email"] },
        "additionalProperties": false,
    })
}

/// Calls one.
pub async fn call(
    server: &Server,
    request: CallToolRequestParams,
    context: RequestContext<RoleServer>,
) -> Result<CallToolResponse, ErrorData> {
    let argument = |name: &str| {
        let value = request.arguments.as_ref().and_then(|arguments| arguments.get(name)).and_then(Value::as_str);
        value.ok_or_else(|| ErrorData::invalid_params(format!("{name} is missing"), None))
    };
    let done = || vec![words("It is done.")];
    let content = match request.name.as_ref() {
        "test_simple_text" => vec![words("Just words.")],
        "test_image_content" => vec![picture()],
        "test_audio_content" => vec![json!({ "type": "audio", "data": WAV, "mimeType": "audio/wav" })],
        "test_embedded_resource" => vec![resource("test://embedded-resource")],
        "test_multiple_content_types" => vec![words("And more:"), picture(), resource("test://mixed-content-resource")],
        "test_error_handling" => {
            return Ok(CallToolResponse::Complete(complete(
                json!({ "content": [words("It always fails.")], "isError": true }),
            )?));
        }
        "test_tool_with_progress" => progress(&context).await.map(|()| done())?,
        "test_tool_with_logging" | "test_logging_tool" => log(server, &context).await.map(|()| done())?,
        "test_reconnection" => {
            tokio::time::sleep(GAP * 4).await;
            done()
        }
        "test_trigger_tool_change" => notify(server, Changed::Tools),
        "test_trigger_prompt_change" => notify(server, Changed::Prompts),
        "test_sampling" => vec![words(&asks::sample(&context, argument("prompt")?).await?)],
        "test_elicitation" => vec![words(&asks::elicit(&context, argument("message")?, about_you()).await?)],
        "test_elicitation_sep1034_defaults" => {
            vec![words(&asks::elicit(&context, "Is that right?", filled_in()).await?)]
        }
        "test_elicitation_sep1330_enums" => vec![words(&asks::elicit(&context, "Choose.", to_choose()).await?)],
        "test_routed" => vec![words(argument("region")?)],
        "json_schema_2020_12_tool" => done(),
        name => {
            let rounds = asks::rounds(name).filter(|_| PLAIN.iter().any(|(tool, _)| *tool == name));
            let rounds = rounds.ok_or_else(|| ErrorData::invalid_params("there is no such tool", None))?;
            let retry = Retry { answers: request.input_responses, state: request.request_state };
            match asks::continue_call(server, &request.name, &rounds, retry, &context)? {
                CallStage::Again(result) => return Ok(CallToolResponse::InputRequired(*result)),
                CallStage::Done(answers) => vec![words(&answers)],
            }
        }
    };
    Ok(CallToolResponse::Complete(complete(json!({ "content": content }))?))
}

fn words(text: &str) -> Value {
    json!({ "type": "text", "text": text })
}

fn picture() -> Value {
    json!({ "type": "image", "data": PNG, "mimeType": "image/png" })
}

fn resource(uri: &str) -> Value {
    json!({ "type": "resource", "resource": { "uri": uri, "mimeType": "text/plain", "text": "What is in it." } })
}

fn notify(server: &Server, changed: Changed) -> Vec<Value> {
    // There may be no listener.
    let told = server.fixture.changes.send(changed).unwrap_or(0);
    vec![words(&format!("{told} listeners were told."))]
}

async fn progress(context: &RequestContext<RoleServer>) -> Result<(), ErrorData> {
    let token = context.meta.get_progress_token();
    for step in [0.0, 50.0, 100.0] {
        if let Some(token) = &token {
            let told = ProgressNotificationParam::new(token.clone(), step).with_total(100.0);
            context.peer.notify_progress(told).await.map_err(|e| ErrorData::internal_error(e.to_string(), None))?;
        }
        tokio::time::sleep(GAP).await;
    }
    Ok(())
}

async fn log(server: &Server, context: &RequestContext<RoleServer>) -> Result<(), ErrorData> {
    let wanted = server.level(context).is_some_and(|level| level as u8 <= LoggingLevel::Info as u8);
    for line in ["it begins", "it goes on", "it is over"] {
        if wanted {
            let told = LoggingMessageNotificationParam::new(LoggingLevel::Info, line.into()).with_logger("fixture");
            context
                .peer
                .notify_logging_message(told)
                .await
                .map_err(|e| ErrorData::internal_error(e.to_string(), None))?;
        }
        tokio::time::sleep(GAP).await;
    }
    Ok(())
}

fn about_you() -> Value {
    let text = |words: &str| json!({ "type": "string", "description": words });
    let fields = json!({ "username": text("Your name"), "email": text("Your address") });
    json!({ "type": "object", "properties": fields, "required": ["username", "email"] })
}

fn filled_in() -> Value {
    json!({ "type": "object", "properties": {
        "name": { "type": "string", "default": "John Doe" },
        "age": { "type": "integer", "default": 30 },
        "score": { "type": "number", "default": 95.5 },
        "status": { "type": "string", "enum": ["active", "inactive", "pending"], "default": "active" },
        "verified": { "type": "boolean", "default": true },
    }})
}

fn to_choose() -> Value {
    let options = ["option1", "option2", "option3"];
    let titled = [("value1", "First"), ("value2", "Second"), ("value3", "Third")]
        .map(|(value, title)| json!({ "const": value, "title": title }));
    json!({ "type": "object", "properties": {
        "untitledSingle": { "type": "string", "enum": options },
        "titledSingle": { "type": "string", "oneOf": titled },
        "legacyEnum": { "type": "string", "enum": ["opt1", "opt2", "opt3"], "enumNames": ["One", "Two", "Three"] },
        "untitledMulti": { "type": "array", "items": { "type": "string", "enum": options } },
        "titledMulti": { "type": "array", "items": { "anyOf": titled } },
    }})
}
