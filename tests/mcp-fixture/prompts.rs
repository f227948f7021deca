//! The prompts that the suite gets.

use rmcp::RoleServer;
use rmcp::model::{ErrorData, GetPromptRequestParams, GetPromptResponse};
use rmcp::service::RequestContext;
use serde_json::{Value, json};

use crate::asks::{self, CallStage, Retry};
use crate::reads::PNG;
use crate::server::{Server, complete};

/// Which there are.
pub fn list() -> Value {
    let argument = |name| json!({ "name": name, "description": "Said again in the prompt", "required": true });
    let prompt = |name: &str, words: &str, arguments: Vec<Value>| json!({ "name": name, "description": words, "arguments": arguments });
    json!([
        prompt("test_simple_prompt", "Some words", vec![]),
        prompt("test_prompt_with_arguments", "Says its arguments again", vec![argument("arg1"), argument("arg2")]),
        prompt("test_prompt_with_embedded_resource", "Has a resource in it", vec![argument("resourceUri")]),
        prompt("test_prompt_with_image", "Has a picture in it", vec![]),
        prompt("test_input_required_result_prompt", "Asks its client first", vec![]),
    ])
}

/// One of them.
pub fn get(
    server: &Server,
    request: GetPromptRequestParams,
    context: &RequestContext<RoleServer>,
) -> Result<GetPromptResponse, ErrorData> {
    let arguments = request.arguments.unwrap_or_default();
    let argument = |name: &str| {
        let missing = || ErrorData::invalid_params(format!("{name} is missing"), None);
        arguments.get(name).and_then(Value::as_str).ok_or_else(missing)
    };
    let text = |text: &str| json!({ "type": "text", "text": text });
    let contents = match request.name.as_str() {
        "test_simple_prompt" => vec![text("Say hello.")],
        "test_prompt_with_arguments" => {
            vec![text(&format!("arg1 is '{}', arg2 is '{}'", argument("arg1")?, argument("arg2")?))]
        }
        "test_prompt_with_embedded_resource" => {
            let resource =
                json!({ "uri": argument("resourceUri")?, "mimeType": "text/plain", "text": "What is in it." });
            vec![json!({ "type": "resource", "resource": resource }), text("Read that.")]
        }
        "test_prompt_with_image" => {
            vec![json!({ "type": "image", "data": PNG, "mimeType": "image/png" }), text("Look at that.")]
        }
        name => {
            let rounds = asks::rounds(name).filter(|_| name.ends_with("_prompt"));
            let rounds = rounds.ok_or_else(|| ErrorData::invalid_params("there is no such prompt", None))?;
            let retry = Retry { answers: request.input_responses, state: request.request_state };
            match asks::continue_call(server, name, &rounds, retry, context)? {
                CallStage::Again(result) => return Ok(GetPromptResponse::InputRequired(*result)),
                CallStage::Done(answers) => vec![text(&answers)],
            }
        }
    };
    let messages: Vec<_> = contents.into_iter().map(|content| json!({ "role": "user", "content": content })).collect();
    Ok(GetPromptResponse::Complete(complete(json!({ "messages": messages }))?))
}
